"""Data sets in Minari's and D4RL's formats, written on the spot; expected numbers are worked out by hand."""

from __future__ import annotations

import csv
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete

from rl_lab.offline import load, reference_scores

h5py, minari, _ = (
    pytest.importorskip(name, reason="needs the extra offline") for name in ("h5py", "minari", "pyarrow")
)

INF = float("inf")
T, F = True, False
ID = "lab/point/hand-v0"
# A point on a line that moves by its action: from 0 to 3 and terminated, then from 5 to 4.5 and cut off.
EPISODES = [([0, 1, 2, 3], [1, 1, 1], [1, 2, 4], "terminations"), ([5, 4, 4.5], [-1, 0.5], [8, 16], "truncations")]
LINE, PUSH = Box(-10, 10, (1,)), Box(-1, 1, (1,))


def write_minari(
    episodes: Any = EPISODES,
    name: str = ID,
    data_format: str = "hdf5",
    observation_space: gym.Space[Any] = LINE,
    action_space: gym.Space[Any] = PUSH,
    env: str | None = None,
    **metadata: Any,
) -> Path:
    """Write a Minari set by its own functions; episodes are (observations, actions, rewards, how they end)."""
    buffers = []
    for obs, actions, rewards, end in episodes:
        flags = {key: [F] * (len(rewards) - 1) + [key == end] for key in ("terminations", "truncations")}
        if isinstance(observation_space, Box):
            obs = np.array(obs, observation_space.dtype).reshape(-1, *observation_space.shape)
        if isinstance(action_space, Box):
            actions = np.array(actions, np.float32).reshape(-1, *action_space.shape)
        buffers.append(
            minari.data_collector.EpisodeBuffer(observations=obs, actions=np.array(actions), rewards=rewards, **flags)
        )
    spaces = {"observation_space": observation_space, "action_space": action_space}
    with warnings.catch_warnings(action="ignore"):  # an author and a description are missed
        minari.create_dataset_from_buffers(name, buffers, env=env, data_format=data_format, **spaces, **metadata)
    return minari.storage.local.get_dataset_path(name)


def edit_metadata(folder: Path, **changes: Any) -> None:
    """Change entries of metadata.json; None removes one."""
    path = folder / "data/metadata.json"
    metadata = {key: x for key, x in {**json.loads(path.read_text()), **changes}.items() if x is not None}
    path.write_text(json.dumps(metadata))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own folder of Minari, and no network."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(minari, "download_dataset", offline)
    return tmp_path / "minari"


def offline(name: str) -> None:
    raise ConnectionError("no network\nat all")


def d4rl_columns(rows: int = 8) -> dict[str, Any]:
    """HalfCheetah's shapes; rows 0-2 end in a terminal, 3-5 in a time-out, from 6 on in nothing."""
    obs = np.repeat(np.arange(rows, dtype=np.float32)[:, None], 17, axis=1)
    columns = {"observations": obs, "actions": obs[:, :6] / 10, "rewards": 2.0 ** np.arange(rows)}
    return {**columns, "terminals": np.arange(rows) == 2, "timeouts": np.arange(rows) == 5}


def write_d4rl(folder: Path, name: str = "halfcheetah-medium-v2.hdf5", **columns: Any) -> str:
    """Write a D4RL file; a column given as None is left out."""
    with h5py.File(folder / name, "w") as file:
        for key, column in {**d4rl_columns(), **columns}.items():
            if column is not None:
                file[key] = column
        file["infos/qpos"] = np.zeros((8, 9))  # present in D4RL's files, and not used
    return str(folder / name)


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_minari_columns(data_format: str) -> None:
    write_minari(data_format=data_format)
    data = load(ID)
    assert (len(data), data.env_id, data.name, data.notes) == (5, None, ID, ())
    assert data.columns["obs"].tolist() == [[0], [1], [2], [5], [4]]
    assert data.columns["next_obs"].tolist() == [[1], [2], [3], [4], [4.5]]  # the true last ones
    assert data.columns["actions"].tolist() == [[1], [1], [1], [-1], [0.5]]
    assert data.columns["rewards"].tolist() == [1, 2, 4, 8, 16]
    assert data.columns["terminated"].tolist() == [F, F, T, F, F]
    assert data.columns["truncated"].tolist() == [F, F, F, F, T]
    assert {key: str(x.dtype) for key, x in data.columns.items()} == {
        **dict.fromkeys(("obs", "actions", "rewards", "next_obs"), "torch.float32"),
        **dict.fromkeys(("terminated", "truncated"), "torch.bool"),
    }
    assert (data.observation_space, data.action_space) == (LINE, PUSH)
    assert data.episode_lengths.tolist() == [3, 2]
    assert data.episode_returns.tolist() == [7, 24]
    assert data.episode_returns.dtype == torch.float64


def test_the_checksum_is_the_contents(tmp_path: Path) -> None:
    folder = write_minari()
    write_minari(name="lab/arrow-v0", data_format="arrow")
    write_minari([*EPISODES[:1], ([5, 4, 4.5], [-1, 0.5], [8, 17], "truncations")], name="lab/other-v0")
    names = [ID, str(folder), str(folder / "data"), "lab/arrow-v0", "lab/other-v0"]
    *same, other = (load(name).checksum for name in names)
    assert len(set(same)) == 1 and len(other) == 64 and other not in same


def test_d4rls_and_minaris_format_have_one_checksum(tmp_path: Path) -> None:
    obs = np.repeat(np.arange(9, dtype=np.float32)[:, None], 17, axis=1)
    obs[6:] += 1  # a reset after the time-out of row 5
    following = obs[1:].copy()
    following[5] = 6
    actions, rewards = d4rl_columns()["actions"], d4rl_columns()["rewards"]
    ends = [(0, 3, "terminations"), (3, 6, "truncations"), (6, 8, "nothing")]
    episodes = [([*obs[a:b], following[b - 1]], actions[a:b], rewards[a:b], end) for a, b, end in ends]
    half_cheetah = {"observation_space": Box(-INF, INF, (17,)), "action_space": Box(-1, 1, (6,))}
    write_minari(episodes, **half_cheetah)
    assert load(write_d4rl(tmp_path, observations=obs[:8], next_observations=following)).checksum == load(ID).checksum


def test_an_open_end_counts_as_truncated() -> None:
    first, second = EPISODES
    write_minari([(*first[:3], "nothing"), second, ([7, 8], [1], [32], "nothing")])
    data = load(ID)
    assert data.columns["truncated"].tolist() == [F, F, T, F, T, T] and not data.columns["terminated"].any()
    assert data.episode_returns.tolist() == [7, 24, 32]
    told = "2 of 3 episodes end neither terminated nor truncated; their last steps count as truncated."
    assert data.notes == (told,)


def test_discrete_actions_and_the_environment() -> None:
    own: dict[str, Any] = {"observation_space": None, "action_space": None, "env": "CartPole-v1"}
    obs = np.zeros((3, 4), np.float32)
    write_minari([(obs, [1, 0], [1, 1], "terminations")], **own)
    data = load(ID, env_id="CartPole-v1")
    assert data.env_id == "CartPole-v1" and data.action_space == Discrete(2)
    assert data.columns["actions"].tolist() == [1, 0] and data.columns["actions"].dtype == torch.int64
    write_minari([(obs, [1, 2], [1, 1], "terminations")], "lab/bad-v0", **own)
    with pytest.raises(ValueError, match=r"^lab/bad-v0: actions of step 1 is 2, outside of Discrete\(2\)$"):
        load("lab/bad-v0")


def test_images_stay_bytes() -> None:
    frames = np.arange(12).reshape(3, 2, 2, 1)
    write_minari([(frames, [1, 1], [1, 1], "truncations")], observation_space=Box(0, 255, (2, 2, 1), np.uint8))
    data = load(ID)
    assert data.columns["next_obs"].dtype == torch.uint8
    assert data.columns["next_obs"].flatten().tolist() == list(range(4, 12))


def test_d4rls_scores_go_before_the_data_sets_own_and_given_ones_before_both() -> None:
    folder = write_minari()
    data = load(ID)
    assert data.scores is None
    with pytest.raises(ValueError, match=rf"^{ID} has no reference scores; pass --scores RANDOM EXPERT"):
        data.normalized(7.0)
    edit_metadata(folder, env_spec=gym.spec("Hopper-v5").to_json())
    hopper = load(ID)
    assert hopper.env_id == "Hopper-v5" and hopper.scores == (-20.272305, 3234.3)
    assert hopper.normalized(3234.3) == 100 and hopper.normalized(-20.272305) == 0
    assert hopper.normalized(torch.tensor([1607.0138475])).tolist() == pytest.approx([50])
    assert not any("Normalized" in note for note in hopper.notes)
    edit_metadata(folder, ref_min_score=2.0, ref_max_score=12.0)
    told = "Normalized scores are by -20.2723 and 3234.3, not by the data set's own 2.0 and 12.0."
    assert load(ID).scores == hopper.scores and told in load(ID).notes
    given = load(ID, scores=(0, 24))
    told = "Normalized scores are by 0 and 24, not by D4RL's -20.272305 and 3234.3 or the data set's own 2.0 and 12.0."
    assert given.normalized(6.0) == 25 and told in given.notes
    edit_metadata(folder, ref_max_score=None)  # half of them counts for nothing, D4RL's being there
    assert load(ID).scores == hopper.scores and not any("Normalized" in note for note in load(ID).notes)
    edit_metadata(folder, ref_max_score=12.0)
    edit_metadata(folder, env_spec=gym.spec("Swimmer-v5").to_json())
    assert load(ID).normalized(load(ID).episode_returns).tolist() == [50, 220]
    edit_metadata(folder, ref_min_score="2", ref_max_score=[12.0])
    with pytest.raises(ValueError, match=rf"{ID}: its scores '2' and \[12.0\] are no numbers; pass both by --scores"):
        load(ID)


def test_a_file_of_another_task_has_no_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D4RL's mazes of the ant are named Ant_maze_..., and are scored otherwise."""
    entry = "gymnasium.envs.mujoco.half_cheetah_v4:HalfCheetahEnv"
    (tmp_path / "mazes.py").write_text(f"import gymnasium as gym\n\ngym.register('Maze-v0', {entry!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load(write_d4rl(tmp_path, "Halfcheetah_maze.hdf5"), env_id="mazes:Maze-v0").scores is None


@pytest.mark.parametrize("score", [{"ref_min_score": 2.0}, {"ref_max_score": 2.0}])
def test_one_reference_score_is_refused(score: dict[str, float]) -> None:
    edit_metadata(write_minari(), **score)
    name = next(iter(score))
    with pytest.raises(ValueError, match=rf"has only one reference score, {name} 2.0; pass both by --scores"):
        load(ID)
    assert load(ID, scores=(1, 2)).scores == (1, 2)


@pytest.mark.parametrize("scores", [(2.0, 2.0), (3.0, 2.0), (float("nan"), 2.0), (0.0, INF)])
def test_scores_without_a_scale_are_refused(scores: tuple[float, float]) -> None:
    write_minari()
    with pytest.raises(ValueError, match="must be finite, the expert's the larger one"):
        load(ID, scores=scores)


def test_d4rls_scores_are_the_tables(shared: Path) -> None:
    with (shared / "references/d4rl_reference_scores.csv").open() as file:
        table = {row["env_id"]: row for row in csv.DictReader(file)}
    for task in ("ant", "halfcheetah", "hopper", "walker2d", "door", "hammer", "pen", "relocate"):
        rows = [row for name, row in table.items() if name.startswith(f"{task}-")]
        figures = {(float(row["ref_min_score"]), float(row["ref_max_score"])) for row in rows}
        assert figures == {reference_scores(task)}
    assert reference_scores("Walker2d-v3") == reference_scores("walker2d") == (1.629008, 4592.3)
    assert reference_scores("Swimmer-v5") is None


def test_d4rl_with_next_observations(tmp_path: Path) -> None:
    following = np.repeat(np.array([1, 2, 9, 4, 5, 9, 7, 9])[:, None], 17, axis=1)
    data = load(write_d4rl(tmp_path, next_observations=following))
    assert (len(data), data.env_id, data.scores) == (8, "HalfCheetah-v4", (-280.178953, 12135.0))
    assert data.columns["next_obs"].tolist() == following.astype(np.float32).tolist()
    assert data.columns["truncated"].tolist() == [F, F, F, F, F, T, F, T]
    assert data.episode_returns.tolist() == [7, 56, 192]
    assert data.action_space.shape == (6,) and data.notes == (
        "The data end within an episode; its last step counts as truncated.",
    )


def test_d4rls_next_observations_tell_time_outs_that_no_flag_does(tmp_path: Path) -> None:
    """Row 3 does not lead to row 4, as the IQL authors' loader has it: an episode ends there."""
    following = np.repeat(np.array([1, 2, 9, 8, 5, 9, 7, 9])[:, None], 17, axis=1)
    data = load(write_d4rl(tmp_path, next_observations=following))
    assert data.columns["truncated"].tolist() == [F, F, F, T, F, T, F, T]
    assert data.columns["next_obs"][:, 0].tolist() == following[:, 0].tolist()
    assert data.episode_lengths.tolist() == [3, 1, 2, 2]
    assert data.notes[0].startswith(
        "Rows within an episode that do not lead to the next one: 1; they count as truncated"
    )


def test_d4rls_next_observations_made_of_the_next_rows_are_not_used(tmp_path: Path) -> None:
    """At the time-out of row 5 they hold a reset's observation, which a target would take for its successor."""
    made = load(write_d4rl(tmp_path, next_observations=np.roll(d4rl_columns()["observations"], -1, axis=0)))
    assert made.checksum == load(write_d4rl(tmp_path)).checksum
    assert made.notes[0].startswith("At all time-outs next_observations hold the next row's observation")


@pytest.mark.parametrize("following", [False, True])
def test_a_d4rl_file_that_flags_too_few_time_outs_is_refused(tmp_path: Path, following: bool) -> None:
    """HalfCheetah's episodes end after 1,000 steps: a longer one has a reset in it, which next_observations tell."""
    rows = 1002
    columns = d4rl_columns(rows) | {"actions": np.zeros((rows, 6)), "rewards": np.ones(rows)}
    columns |= {"terminals": np.zeros(rows), "timeouts": np.zeros(rows)}
    if following:
        columns["next_observations"] = columns["observations"] + np.where(np.arange(rows) == 999, 5, 1)[:, None]
        assert load(write_d4rl(tmp_path, **columns)).episode_lengths.tolist() == [1000, 2]
        return
    told = "has an episode of 1,001 steps, HalfCheetah-v4 ends after 1,000: flag every time-out in `timeouts`, or add"
    with pytest.raises(ValueError, match=told):
        load(write_d4rl(tmp_path, **columns))


def test_d4rl_without_next_observations_loses_its_time_outs(tmp_path: Path) -> None:
    data = load(write_d4rl(tmp_path, "halfcheetah_medium-v2.hdf5"))  # as the server spells it
    assert data.columns["obs"][:, 0].tolist() == [0, 1, 2, 3, 4, 6]  # rows 5 and 7 have no known successor
    assert data.columns["next_obs"][:, 0].tolist() == [1, 2, 2, 4, 5, 7]
    assert data.columns["terminated"].tolist() == [F, F, T, F, F, F]
    assert data.columns["truncated"].tolist() == [F, F, F, F, T, T]
    assert data.episode_returns.tolist() == [7, 24, 64]
    assert len(data.notes) == 1 and "2 of 8 transitions are left out" in data.notes[0]


def test_a_time_out_of_one_step_takes_its_episode_along(tmp_path: Path) -> None:
    """Row 3 is an episode; what comes before it ended by itself. The last row is a terminal and stays."""
    flags = {"terminals": np.isin(np.arange(8), (2, 7)), "timeouts": np.arange(8) == 3}
    data = load(write_d4rl(tmp_path, **flags))
    assert data.columns["obs"][:, 0].tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert data.columns["next_obs"][:, 0].tolist() == [1, 2, 2, 5, 6, 7, 7]
    assert data.columns["truncated"].sum() == 0
    assert data.episode_lengths.tolist() == [3, 4]


def test_the_environment_of_a_file_can_be_said(tmp_path: Path) -> None:
    name = write_d4rl(tmp_path, "mine.hdf5")
    with pytest.raises(ValueError, match=r"begins with none of ant, halfcheetah, hopper, walker2d; say .* by --env$"):
        load(name)
    data = load(name, env_id="HalfCheetah-v5")
    assert data.env_id == "HalfCheetah-v5" and data.scores == (-280.178953, 12135.0)
    data = load(write_d4rl(tmp_path, "pen-human-v1.hdf5"), env_id="HalfCheetah-v5")
    assert data.scores == (96.262799, 3076.8331017826877)  # those of the task that the file is named after


def test_d4rls_ant_has_an_environment_with_contact_forces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = "gymnasium.envs.mujoco.ant_v4:AntEnv"
    registered = (
        f"import gymnasium as gym\n\ngym.register('Ant-v9', {entry!r}, kwargs={{'use_contact_forces': True}})\n"
    )
    (tmp_path / "contact.py").write_text(registered)
    monkeypatch.syspath_prepend(tmp_path)
    shapes = {"observations": np.zeros((8, 111)), "actions": np.zeros((8, 8))}
    name = write_d4rl(tmp_path, "ant-medium-v2.hdf5", **shapes)
    with pytest.raises(ValueError, match=r"obs has shape \(8, 111\); \(8, 27\) fits"):
        load(name)
    data = load(name, env_id="contact:Ant-v9")
    assert data.observation_space.shape == (111,) and data.env_id == "Ant-v4" and data.scores == reference_scores("ant")


def test_half_a_bound_is_one(tmp_path: Path) -> None:
    write_minari([(EPISODES[0][0], [1, -1, 1], [1, 1, 1], "terminations")], action_space=Box(0, INF, (1,)))
    with pytest.raises(ValueError, match=r"actions of step 1 is -1, outside of Box\(0.0, inf"):
        load(ID)


def with_value(key: str, value: float) -> dict[str, Any]:
    column = np.array(d4rl_columns()[key], np.float64)
    column[3] = value
    return {key: column}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"timeouts": None, "rewards": None}, "is no D4RL file: it lacks rewards, timeouts and holds actions"),
        ({"timeouts": np.zeros(7)}, r"truncated has shape \(7,\); \(8,\) fits"),
        ({"actions": np.zeros((8, 5))}, r"actions has shape \(8, 5\); \(8, 6\) fits"),
        ({"observations": np.zeros((8, 11))}, r"obs has shape \(8, 11\); \(8, 17\) fits"),
        ({"next_observations": np.zeros((8, 16))}, r"next_obs has shape \(8, 16\); \(8, 17\) fits"),
        ({"rewards": np.zeros((8, 1))}, r"rewards has shape \(8, 1\); \(8,\) fits"),
        ({"rewards": 1.0}, r"rewards has shape \(\); \(1,\) fits"),
        (with_value("rewards", np.nan), "rewards of step 3 is nan, not finite"),
        (with_value("observations", INF), "obs of step 3 is inf, not finite"),
        (with_value("observations", 1e39), "obs of step 3 is inf, not finite"),  # beyond float32
        (with_value("actions", -1.1), r"actions of step 3 is -1.1, outside of Box\(-1.0, 1.0, \(6,\)"),
        (with_value("terminals", 2), "terminated holds float64 values that are no bool"),
        (with_value("terminals", np.nan), "terminated holds float64 values that are no bool"),
        ({"rewards": ["one"] * 8}, "rewards holds object values that are no float32"),
        ({key: column[:0] for key, column in d4rl_columns().items()}, "holds no transition"),
        ({"terminals": np.zeros(8), "timeouts": np.ones(8)}, "holds no transition"),
    ],
)
def test_a_damaged_d4rl_file_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    name = write_d4rl(tmp_path, **columns)
    with pytest.raises(ValueError, match=message) as error:
        load(name)
    assert str(error.value).startswith(name) and "\n" not in str(error.value)


def test_float32s_rounding_of_a_bound_passes(tmp_path: Path) -> None:
    assert len(load(write_d4rl(tmp_path, **with_value("actions", 1.000001)))) == 6
    with pytest.raises(ValueError, match="outside"):
        load(write_d4rl(tmp_path, **with_value("actions", 1.0001)))


def test_a_cut_foreign_or_missing_file_is_refused(tmp_path: Path) -> None:
    name = write_d4rl(tmp_path)
    whole = Path(name).read_bytes()
    for content in (whole[: len(whole) // 2], b"foreign"):
        Path(name).write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read \(.*\); a whole file that you may read works$"):
            load(name)
    with pytest.raises(ValueError, match=r"^no\.hdf5 is no file; D4RL's are at http"):
        load("no.hdf5")
    (tmp_path / "hopper.hdf5.gz").write_bytes(whole)
    with pytest.raises(ValueError, match=r"gz is no data set: D4RL's files end in \.hdf5 or \.h5, Minari's sets are"):
        load(str(tmp_path / "hopper.hdf5.gz"))


def test_another_environment_is_refused(tmp_path: Path) -> None:
    name = write_d4rl(tmp_path)
    with pytest.raises(ValueError, match=r"^--env Walker2d-v4: .* is of HalfCheetah-v4, of which this is no version;"):
        load(name, env_id="Walker2d-v4")  # with the same spaces
    own = write_d4rl(tmp_path, "mine.hdf5")
    with pytest.raises(ValueError, match=r"obs has shape \(8, 17\); \(8, 11\) fits"):
        load(own, env_id="Hopper-v4")
    with pytest.raises(ValueError, match="--env HalfCheater-v4 cannot be made: "):
        load(own, env_id="HalfCheater-v4")
    newer = load(name, env_id="HalfCheetah-v5")
    assert newer.env_id == "HalfCheetah-v4"
    assert "The data are of HalfCheetah-v4, judged in HalfCheetah-v5." in newer.notes
    write_minari()
    data = load(ID)  # which does not say what it is of
    with pytest.raises(ValueError, match=rf"^--env CartPole-v1 has observations Box\(.*, {ID} has Box\(-10"):
        data.require_env("CartPole-v1", Box(-1, 1, (4,)), Discrete(2))
    data.require_env("Line-v0", LINE, PUSH)
    for other in (Box(-2, 2, (1,)), Box(-1, 1, (2,)), Discrete(1)):
        with pytest.raises(ValueError, match=rf"^--env Line-v0 has actions .*, {ID} has Box\(-1.0, 1.0"):
            data.require_env("Line-v0", LINE, other)


def cut_hdf5(folder: Path) -> None:
    path = folder / "data/main_data.hdf5"
    path.write_bytes(path.read_bytes()[:2000])


def lose_an_episode(folder: Path) -> None:
    with h5py.File(folder / "data/main_data.hdf5", "a") as file:
        del file["episode_1"]


def lose_an_observation(folder: Path) -> None:
    with h5py.File(folder / "data/main_data.hdf5", "a") as file:
        file["episode_1/observations"].resize(2, axis=0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_hdf5, "truncated file"),
        (lose_an_episode, "episode_1"),
        (lose_an_observation, "episode 1 has 2 observations for 2, 2, 2, 2 actions, rewards, terminations"),
        (lambda folder: (folder / "data/main_data.hdf5").unlink(), "No data found"),
        (lambda folder: (folder / "data/metadata.json").write_text("{"), "Expecting property name"),
        (lambda folder: edit_metadata(folder, total_steps=6), "holds 2 episodes, 5 steps, its metadata say 2 .*, 6"),
        (lambda folder: edit_metadata(folder, minari_version="9.9"), "does not support"),
        (lambda folder: edit_metadata(folder, data_format="pickle"), "pickle"),
    ],
)
def test_a_damaged_minari_set_is_refused(damage: Callable[[Path], Any], message: str) -> None:
    damage(write_minari())
    with pytest.raises(ValueError, match=message) as error:
        load(ID)
    assert str(error.value).startswith(f"{ID}: /") and "\n" not in str(error.value)
    assert str(error.value).endswith("; a complete Minari data set of Box observations works")


def test_a_lost_arrow_episode_is_refused() -> None:
    folder = write_minari(data_format="arrow")
    next((folder / "data/1").glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(ID)


def test_dictionaries_are_refused() -> None:
    space = Dict({"obs": LINE})
    write_minari([({"obs": np.zeros((3, 1), np.float32)}, [1, 1], [1, 1], "truncations")], observation_space=space)
    with pytest.raises(ValueError, match=r"Dict\(.*: a Box and a Box or Discrete are supported"):
        load(ID)


def test_what_a_data_set_describes_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point in the metadata may be any function of any package."""
    folder = write_minari()
    spec = {**json.loads(gym.spec("CartPole-v1").to_json()), "entry_point": "pytest:fail"}
    edit_metadata(folder, env_spec=json.dumps(spec))
    assert load(ID).env_id == "CartPole-v1"
    edit_metadata(folder, observation_space=None)
    with pytest.raises(ValueError, match="its metadata lack observation_space"):
        load(ID)


def test_settings_of_the_recorded_environment_are_told() -> None:
    """An agent is judged in what the id alone makes."""
    folder = write_minari()
    edit_metadata(folder, env_spec=gym.spec("Pendulum-v1").to_json())
    assert load(ID).notes == ()
    spec = gym.make("Pendulum-v1", g=2.0, max_episode_steps=50).spec
    assert spec
    edit_metadata(folder, env_spec=spec.to_json(), eval_env_spec=spec.to_json())
    (note,) = load(ID).notes
    assert note == (
        "The data set names g=2.0, max_episode_steps=50, an eval_env_spec besides Pendulum-v1; agents are judged in "
        "Pendulum-v1 as it is registered."
    )


def test_a_missing_set_is_named_with_the_command(home: Path) -> None:
    with pytest.raises(ValueError) as error:
        load("mujoco/hopper/medium-v0")
    assert str(error.value) == (
        f"mujoco/hopper/medium-v0 is not in {home} and could not be downloaded (no network); where the network allows: "
        "minari download mujoco/hopper/medium-v0; or set MINARI_DATASETS_PATH to the folder that has it, or give a path"
    )
    (home / "mujoco/hopper/medium-v0/data").mkdir(parents=True)  # what an interruption leaves
    with pytest.raises(ValueError, match=r"medium-v0 is incomplete: remove it, then: minari download mujoco/hopper/"):
        load("mujoco/hopper/medium-v0")
    made = r"make it anew, by runs/make_offline_data.sh or rl_lab.collect; or set MINARI_DATASETS_PATH"
    with pytest.raises(ValueError, match=rf"lab/hopper/medium-v0 is not in {home}: {made}"):  # without asking a hub
        load("lab/hopper/medium-v0")
    write_minari(name="lab/hopper/medium-v0")
    with pytest.raises(ValueError, match=r"the nearest there are lab/hopper/medium-v0; or set"):
        load("lab/hopper/medum-v0")
    with pytest.raises(ValueError, match=r"^hopper is no file, no folder and no Minari id; mujoco/hopper/medium-v0"):
        load("hopper")
    with pytest.raises(ValueError, match=r"^.* is no Minari folder: metadata.json is neither in it nor in its data$"):
        load(str(home))


def test_a_remote_set_is_downloaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(minari, "download_dataset", lambda name: names.append(name) or write_minari(name=name))
    remote = "mujoco/pendulum/random-v0"
    assert load(remote).checksum == load(remote).checksum
    assert names == [remote]


def test_an_unreadable_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_minari()

    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(ValueError, match=r"cannot be read \(.*Permission denied.*\); a whole file that you may read"):
        load(str(folder))


@pytest.mark.parametrize("package", ["minari", "h5py"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(write_minari()) if package == "minari" else write_d4rl(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf": {package} is not installed; .*'\.\[offline\]'$"):
        load(name)
