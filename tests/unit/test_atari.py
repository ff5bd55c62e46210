"""Atari games: contract, whole games, state round trip, sticky actions. Frames are compared in tests/parity."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("ale_py", reason="Atari needs ale_py")
pytest.importorskip("cv2", reason="Atari needs cv2")

from rl_lab.envs import make
from rl_lab.envs.atari import AtariEnv
from rl_lab.episodes import evaluate
from rl_lab.vector import Step

BREAKOUT = "BreakoutNoFrameskip-v4"


def random_actions(env: AtariEnv, steps: int, seed: int = 0) -> Tensor:
    shape = (steps, len(env.seeds) * env.num_envs)
    return torch.from_numpy(np.random.default_rng(seed).integers(env.action_space.n, size=shape))


def equal(left: Step, right: Step) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_shapes_and_types() -> None:
    env = make(BREAKOUT, [1, 2], 2)
    obs = env.reset()
    assert (tuple(obs.shape), obs.dtype) == ((4, 4, 84, 84), torch.uint8)
    assert all(torch.equal(obs[:, 0], obs[:, i]) for i in range(4))  # the first frame, four times
    step = env.step(torch.zeros(4, dtype=torch.int64))
    assert [tuple(x.shape) for x in step] == [(4, 4, 84, 84), (4,), (4,), (4,), (4, 4, 84, 84)]
    assert [x.dtype for x in step] == [torch.uint8, torch.float32, torch.bool, torch.bool, torch.uint8]
    assert torch.equal(step.next_obs[:, :3], obs[:, 1:])  # the newest frame comes last
    assert (env.episode_returns.dtype, env.episode_lengths.tolist()) == (torch.float64, [1] * 4)


def test_lives_end_episodes_and_games_are_counted() -> None:
    """Breakout has five lives; the totals are of the game and start anew after it."""
    env = AtariEnv(BREAKOUT, [0], 1)
    env.reset()
    lives = rewards = steps = games = 0
    for action in random_actions(env, 400):
        step = env.step(action)
        lives, rewards, steps = lives + step.terminated.item(), rewards + step.rewards.item(), steps + 1
        assert not step.truncated and step.terminated >= env.game_over
        assert (env.episode_returns.item(), env.episode_lengths.item()) == (rewards, steps)  # bricks that are worth 1
        assert torch.equal(step.obs, step.next_obs) != bool(step.terminated)
        if env.game_over:
            assert lives == 5
            lives = rewards = steps = 0
            games += 1
    assert games >= 2


def test_rewards_are_signs_and_returns_are_not() -> None:
    env = AtariEnv("SpaceInvadersNoFrameskip-v4", [0], 2)
    env.reset()
    rewards = torch.stack([env.step(action).rewards for action in random_actions(env, 60)])
    assert set(rewards.unique().tolist()) == {0.0, 1.0}
    assert (env.episode_returns >= 5 * rewards.sum(0)).all()  # the cheapest invader is worth 5 points


def test_evaluation_plays_whole_games() -> None:
    """Guards against lives that are taken for games: what it reports adds up to the rewards of five lives."""
    env, paid = AtariEnv(BREAKOUT, [0], 2), []
    generator = torch.Generator().manual_seed(0)
    step = env.step

    def recording_step(actions: Tensor) -> Step:
        result = step(actions)
        paid.append((result.rewards, result.terminated))
        return result

    env.step = recording_step  # type: ignore[method-assign]
    returns, lengths = evaluate(lambda _: torch.randint(4, (2,), generator=generator), env, episodes=1)
    rewards, terminated = (torch.stack(column) for column in zip(*paid, strict=True))
    for row in range(2):
        length = int(lengths[row, 0])
        assert terminated[:length, row].sum() == 5
        assert returns[row, 0] == rewards[:length, row].sum()
    assert returns.sum() > 0


def test_rows_of_a_seed_do_not_depend_on_other_seeds() -> None:
    both, alone = AtariEnv(BREAKOUT, [3, 7], 2), AtariEnv(BREAKOUT, [7], 2)
    assert torch.equal(both.reset()[2:], alone.reset())
    ends = 0
    for action in random_actions(both, 60):
        a, b = both.step(action), alone.step(action[2:])
        assert all(torch.equal(x[2:], y) for x, y in zip(a, b, strict=True))
        ends += int(b.terminated.sum())
    assert ends > 0
    assert not torch.equal(b.obs[0], b.obs[1])


@pytest.mark.parametrize(("env_id", "sticky"), [(BREAKOUT, 0.0), (BREAKOUT, 0.25), ("MsPacmanNoFrameskip-v4", 0.25)])
def test_continues_bit_for_bit_from_a_saved_state(env_id: str, sticky: float) -> None:
    """In mid-game, through later lives and games, by way of JSON as a checkpoint does; the saved state is a copy."""
    env, other = (make(env_id, [0, 9], 1, sticky_actions=sticky) for _ in range(2))
    env.reset()
    actions = random_actions(env, 250)  # type: ignore[arg-type]
    for action in actions[:37]:
        env.step(action)
    state = env.state_dict()
    values = {row: {k: v for k, v in game.items() if not isinstance(v, Tensor)} for row, game in state["games"].items()}
    values = json.loads(json.dumps(values))
    expected = []
    for action in actions[37:]:
        step = env.step(action)
        expected.append((step, env.episode_returns, env.episode_lengths, env.game_over))
    games = {row: game | values[row] for row, game in state["games"].items()}
    other.load_state_dict({**state, "games": games})
    ends = 0
    for action, (step, *totals) in zip(actions[37:], expected, strict=True):
        assert equal(other.step(action), step)
        assert all(
            torch.equal(a, b)
            for a, b in zip((other.episode_returns, other.episode_lengths, other.game_over), totals, strict=True)
        )
        ends += int(step.terminated.sum())
    assert ends >= 2


def test_later_steps_leave_what_was_returned_alone() -> None:
    env = AtariEnv(BREAKOUT, [0], 1)
    env.reset()
    steps = [env.step(action) for action in random_actions(env, 60)]
    copies = [Step(*(x.clone() for x in step)) for step in steps]
    for action in random_actions(env, 30):
        env.step(action)
    assert all(equal(step, copy) for step, copy in zip(steps, copies, strict=True))


def test_sticky_actions_repeat_the_action_of_the_frame_before() -> None:
    """At 0.25, the share of frames whose action is not the agent's new one: 16,000 draws, four standard errors."""
    env = AtariEnv(BREAKOUT, [0], 1, sticky_actions=0.25)
    env.reset()
    (game,) = env._games.games
    game.rng = np.random.default_rng(1)
    repeated = 0
    for _ in range(16_000):
        game.held = 0
        if game.ale.game_over():
            game.ale.reset_game()
        game._act(1)
        repeated += game.held == 0
    assert abs(repeated / 16_000 - 0.25) < 4 * (0.25 * 0.75 / 16_000) ** 0.5


def test_sticky_actions_change_the_game() -> None:
    steps = []
    for sticky in (0.0, 0.5):
        env = AtariEnv(BREAKOUT, [0], 1, sticky_actions=sticky)
        env.reset()
        steps.append([env.step(action).next_obs for action in random_actions(env, 30)])
    assert not all(torch.equal(a, b) for a, b in zip(*steps, strict=True))


@pytest.mark.parametrize("num_processes", [2, 3, 9])
def test_processes_change_nothing(num_processes: int) -> None:
    """Whole games, of which some end, and a state that goes from processes to none and back."""
    one, many = (AtariEnv(BREAKOUT, [0, 1], 2, sticky_actions=0.25, num_processes=n) for n in (1, num_processes))
    assert len(many._connections) == min(num_processes, 4)
    assert torch.equal(one.reset(), many.reset())
    played = random_actions(one, 200)
    for env in (one, many):
        env.step(played[0])
    state = many.state_dict()
    ended = 0
    for actions in played:
        step = one.step(actions)
        assert equal(step, many.step(actions))
        for name in ("game_over", "episode_returns", "episode_lengths"):
            assert torch.equal(getattr(one, name), getattr(many, name))
        ended += int(step.terminated.sum())
    assert ended > 4
    assert np.array_equal(one.render(), many.render())
    one.load_state_dict(state)
    many.load_state_dict(state)
    assert equal(one.step(played[1]), many.step(played[1]))
    many.close()


def test_a_process_that_ends_is_told() -> None:
    env = AtariEnv(BREAKOUT, [0], 2, num_processes=2)
    env.reset()
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    with pytest.raises(RuntimeError, match="a process of --env-threads has ended"):
        env.step(torch.zeros(2, dtype=torch.int64))


def test_processes_outlive_signals_and_end_with_their_environment() -> None:
    """Signals to a group reach them too; what has to be saved then is theirs."""
    env = AtariEnv(BREAKOUT, [0], 2, num_processes=2)
    env.reset()
    children = multiprocessing.active_children()
    assert len(children) == 2
    for child in children:
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
    assert len(env.state_dict()["games"]) == 2
    del env
    for child in children:
        child.join(10)
        assert child.exitcode == 0


def test_a_program_with_processes_ends() -> None:
    program = f"""
        from rl_lab.envs import make
        if __name__ == "__main__":
            env = make({BREAKOUT!r}, [0], 2, num_threads=2)
            env.reset()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60)


@pytest.mark.parametrize(
    ("env_id", "arguments", "message"),
    [
        ("CartPole-v1", {"sticky_actions": 0.25}, "sticky_actions=0.25: only native Atari games"),
        (BREAKOUT, {"sticky_actions": 0.25, "backend": "gymnasium"}, "only native Atari games"),
        (BREAKOUT, {"sticky_actions": 1.0}, "sticky_actions=1.0 must be a probability"),
        (BREAKOUT, {"num_threads": 2, "backend": "gymnasium"}, r"num_threads=2 \(--env-threads\): only native MuJoCo"),
        (BREAKOUT, {"num_threads": 0}, "num_processes=0 must be at least 1"),
        ("BrakoutNoFrameskip-v4", {}, "the nearest ids are BreakoutNoFrameskip-v4"),
    ],
)
def test_bad_arguments_are_refused(env_id: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(env_id, [0], 1, **arguments)
    assert "\n" not in str(caught.value)


def test_bad_actions_and_foreign_states_are_refused() -> None:
    env, other = AtariEnv(BREAKOUT, [0], 2), AtariEnv(BREAKOUT, [0], 1)
    env.reset()
    other.reset()
    with pytest.raises(ValueError, match=r"\(1,\) must be \(2,\)"):
        env.step(torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="a state of 1 games does not fit"):
        env.load_state_dict(other.state_dict())


@pytest.mark.parametrize("module", ["ale_py", "cv2"])
def test_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # importing it now fails as if it were not installed
    monkeypatch.delitem(sys.modules, "rl_lab.envs.atari")
    with pytest.raises(ValueError) as caught:
        make(BREAKOUT, [0], 1)
    assert f'it needs {module}: pip install -c constraints.txt -e ".[atari]"' in str(caught.value)
