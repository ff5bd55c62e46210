"""Runs in, verdicts out: the readers, the refusals, the exit codes, the report."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from rl_lab.compare import main
from rl_lab.curves import build, store
from rl_lab.curves.compare import Reference, find_reference, in_units, judge
from rl_lab.curves.plot import draw

BUDGET = 100_000
EPISODE = 200  # steps; 500 episodes a run


def episodes(level: float, seed: int, start: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    """A run that climbs from `start` to `level` within the first quarter; level and moment scatter a little."""
    generator = np.random.default_rng(seed)
    steps = np.arange(EPISODE, BUDGET + 1, EPISODE)
    climb = np.clip(steps / (BUDGET / 4 * generator.uniform(0.95, 1.05)), 0, 1)
    noise = generator.normal(0, 3, len(steps))
    return steps, start + (level + generator.normal(0, 3) - start) * climb + noise


def rows(steps: Sequence[float], returns: Sequence[float]) -> list[str]:
    return [f"{int(t)},{r:.6f},{EPISODE}" for t, r in zip(steps, returns, strict=True)]


def csv_bytes(steps: Sequence[float], returns: Sequence[float]) -> bytes:
    return "\n".join(["global_step,episodic_return,episodic_length", *rows(steps, returns), ""]).encode()


def run_folder(root: Path, seed: int, level: float = 480, env: str = "CartPole-v1", **config: Any) -> Path:
    """A run folder as the lab writes it."""
    path = root / f"{env}__ppo__{seed}__1700000000"
    path.mkdir(parents=True)
    known = {
        "env": env,
        "algo": "ppo",
        "seed": seed,
        "total_timesteps": BUDGET,
        "action_space": "Discrete",
        "semantics": "cleanrl",
        "versions": {"numpy": "2.4.6"},
        "args": {"learning_rate": 2.5e-4, "seed": seed},
    }
    (path / "config.json").write_text(json.dumps(known | config))
    (path / "episodes.csv.gz").write_bytes(gzip.compress(csv_bytes(*episodes(level, seed))))
    return path


def runs(root: Path, level: float, seeds: int = 10, **config: Any) -> list[str]:
    return [str(run_folder(root, seed, level, **config)) for seed in range(1, seeds + 1)]


@pytest.fixture
def reference(tmp_path: Path) -> str:
    """Ten seeds of CSV logs near 480, seeds 101 to 110."""
    folder = tmp_path / "reference"
    folder.mkdir()
    for seed in range(101, 111):
        (folder / f"ppo__CartPole-v1__{seed}.csv.gz").write_bytes(gzip.compress(csv_bytes(*episodes(480, seed))))
    return str(folder)


@pytest.mark.parametrize(
    ("level", "seeds", "code", "verdict"),
    [
        (480, 10, 0, "match"),
        (600, 10, 0, "better"),
        (380, 10, 1, "worse"),
        (480, 1, 2, "underpowered"),
    ],
)
def test_verdicts_and_exit_codes(
    tmp_path: Path,
    reference: str,
    capsys: pytest.CaptureFixture[str],
    level: float,
    seeds: int,
    code: int,
    verdict: str,
) -> None:
    folders = runs(tmp_path, level, seeds)
    assert main([*folders, "--reference", reference]) == code
    assert f"Verdict: {verdict}" in capsys.readouterr().out
    for folder in folders:
        record = json.loads((Path(folder) / "verdict.json").read_text())
        assert (record["verdict"], record["exit_code"]) == (verdict, code)
        assert len(record["scores"]["ours"]) == seeds and len(record["scores"]["reference"]) == 10


def test_a_slower_climb_to_the_same_score_is_worse(tmp_path: Path, reference: str) -> None:
    ours = []
    for run in store.load(Path(reference)):
        late = np.concatenate([np.full(100, 20.0), run.returns[:-100]])  # a fifth of the budget later
        ours.append(store.Run(Path("late"), run.env, "ppo", run.seed, run.steps, late, BUDGET))
    result = judge(ours, find_reference(reference, "ppo", "CartPole-v1"))
    assert [test.verdict for test in result.tests] == ["match", "worse"]
    assert result.verdict == "worse"
    # A fifth of the budget at 20 rather than 480; the few steps before the reference leaves 20 do not count.
    assert result.tests[1].difference == pytest.approx(-0.2 * 460, rel=0.05)


def test_a_partial_run_is_informative_as_far_as_it_was_run(reference: str) -> None:
    """Ours equal the reference up to a point, one run to 40,000 steps and one further; then they were stopped."""
    ours = [
        store.Run(Path("part"), run.env, "ppo", run.seed, run.steps[:count], run.returns[:count], BUDGET)
        for run, count in zip(store.load(Path(reference))[:2], (40_000 // EPISODE, 60_000 // EPISODE), strict=True)
    ]
    result = judge(ours, find_reference(reference, "ppo", "CartPole-v1"))
    assert (result.verdict, result.exit_code, result.budget) == ("informative", 2, 40_000)
    assert any("up to step 40,000 of 100,000" in note for note in result.notes)
    assert result.curves["ours"] == pytest.approx(result.curves["reference"][:2])


def test_underpowered_names_the_seeds(tmp_path: Path, reference: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*runs(tmp_path, 480, 3), "--reference", reference, "--margin", "4"]) == 2
    output = capsys.readouterr().out
    assert "seeds on either side would decide" in output
    assert "±4.0" in output


def test_no_reference_and_published_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*runs(tmp_path / "a", -100, 2, env="NoSuchTask-v0")]) == 3
    assert main([*runs(tmp_path / "b", -190, 2, env="MountainCar-v0")]) == 2  # CleanRL documents -200 ± 0
    output = capsys.readouterr().out
    assert "published, informs only: -200.0 ± 0.0" in output and "Verdict: informative" in output


def test_the_severest_of_several_comparisons_is_the_exit_code(tmp_path: Path, reference: str) -> None:
    good, unknown = runs(tmp_path / "a", 480), runs(tmp_path / "b", 480, 2, env="NoSuchTask-v0")
    assert main([*good, *unknown, "--reference", reference]) == 3
    informative = runs(tmp_path / "d", -190, 2, env="MountainCar-v0")
    assert main(informative) == 2 and main([*informative, *unknown]) == 3
    for seed in range(101, 106):
        log = gzip.compress(csv_bytes(*episodes(700, seed)))
        (Path(reference) / f"ppo__Acrobot-v1__{seed}.csv.gz").write_bytes(log)
    bad = runs(tmp_path / "c", 480, 10, env="Acrobot-v1")
    assert main([*good, *unknown, *bad, "--reference", reference]) == 1


@pytest.mark.parametrize(
    ("files", "config", "whole"),
    [(["model.safetensors"], {}, True), ([], {}, False), (["model.safetensors"], {"until_return": 300.0}, False)],
    ids=["finished", "stopped", "until a return"],
)
def test_a_finished_run_is_whole_whenever_its_last_episode_ended(
    tmp_path: Path, files: list[str], config: dict[str, Any], whole: bool
) -> None:
    """64 environments with episodes of one length end them all together, the last ones at 96 % of the budget here."""
    paths = runs(tmp_path, 480, 3, total_timesteps=BUDGET + BUDGET // 24, args=config)
    for path in paths:
        for name in files:
            (Path(path) / name).touch()
    ours = [run for path in paths for run in store.load(Path(path))]
    result = judge(ours, Reference("cleanrl"))
    assert (result.budget == result.whole) == whole
    assert any("as far as all of our runs were run" in note for note in result.notes) != whole


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("python -m rl_lab.dqn --env X-v1 --num-seeds 10 --runs-dir runs/dqn --stop-at=9 --seed 3", None),
        ("python -m rl_lab.dqn --env X-v1 --double --sticky-actions 0.25 --seed 3", "--double --sticky-actions 0.25"),
        ("python -m rl_lab.dqn --gamma=0.9 --no-compile --env X-v1", "--gamma=0.9"),
    ],
)
def test_flags_beside_the_reference_are_told(tmp_path: Path, command: str, told: str | None) -> None:
    """Not beside other runs of ours, whose own flags are in their folders."""
    ours, theirs = (
        [run for path in runs(tmp_path / side, 480, 2, command=command) for run in store.load(Path(path))]
        for side in ("ours", "theirs")
    )
    note = f"ours were trained with {told}, which the reference may not have had"
    found = [note for note in judge(ours, Reference("cleanrl")).notes if "trained with" in note]
    assert found == ([note] if told else [])
    assert not any("trained with" in note for note in judge(ours, Reference("ours", theirs)).notes)


def test_a_mean_curve_informs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["algo,env_id,global_step,episodic_return", "dqn,CartPole-v1,0,0"]
    lines += [f"ppo,CartPole-v1,{step},{20 + 460 * step / BUDGET}" for step in range(0, BUDGET + 1, 10_000)]
    curve = tmp_path / "curve.csv"
    curve.write_text("\n".join(lines))
    assert main([*runs(tmp_path, 480, 4), "--reference", str(curve)]) == 2
    output = capsys.readouterr().out
    assert "curve's end: 480.0 at step 100,000" in output
    # The line is half way up after 50,000 steps; ours climb within a quarter, so after about 12,500.
    assert "50% of the curve's climb, return 250.0: reference at step 50,000, ours at step 12,500" in output
    # Of a curve that goes on beyond our runs, the part until there; another project's names for algorithm and column.
    lines = ["algo,env_id,global_step,return_mean", "sac,CartPole-v1,0,7"]
    lines += [f"ppo,CartPole-v1,{step},{20 + 460 * step / BUDGET}" for step in range(0, 4 * BUDGET, 10_000)]
    curve.write_text("\n".join(lines))
    assert main([*runs(tmp_path / "again", 480, 4), "--reference", str(curve)]) == 2
    assert "curve's end: 480.0 at step 100,000" in capsys.readouterr().out
    assert main([*runs(tmp_path / "v5", 480, 1, env="CartPole-v5"), "--reference", str(curve)]) == 4


@pytest.mark.parametrize(
    ("script", "algo", "found"),
    [
        ("ppo_atari", "ppo", True),
        ("ppo_atari", "PPO", True),
        ("ppo_atari_lstm", "ppo_lstm", True),
        ("sac_continuous_action", "SAC", True),
        ("ppo_atari_lstm", "ppo", False),
        ("td3_bc", "td3", False),
    ],
)
def test_a_curve_is_of_the_algorithm(tmp_path: Path, script: str, algo: str, found: bool) -> None:
    """Guards against the curve of another one, and against a file without ours taken for episodes."""
    curve = tmp_path / "curve.csv"
    curve.write_text(f"algo,env_id,global_step,return_mean\n{algo},Pong-v4,0,1\n{algo},Pong-v4,9,5\n")
    if found:
        reference = find_reference(str(curve), script, "Pong-v4")
        assert reference.curve is not None and reference.curve.tolist() == [[0, 1], [9, 5]]
    else:
        with pytest.raises(ValueError, match=f"has no curve of {script} on Pong-v4; it has {algo} on Pong-v4"):
            find_reference(str(curve), script, "Pong-v4")
    with pytest.raises(ValueError, match=f"has no curve of {script} on Qbert-v4; it has {algo} on Pong-v4"):
        find_reference(str(curve), script, "Qbert-v4")


def test_a_reference_that_never_learns_is_uninformative(tmp_path: Path) -> None:
    steps = np.arange(EPISODE, BUDGET + 1, EPISODE)
    flat = np.full(len(steps), -200.0)
    sides = [
        [store.Run(Path("run"), "MountainCar-v0", "ppo", seed, steps, flat, BUDGET) for seed in seeds]
        for seeds in (range(5), range(5, 10))
    ]
    result = judge(sides[0], Reference("flat", sides[1]))
    assert result.verdict == "informative" and result.exit_code == 2
    assert any(note.startswith("uninformative: the reference never leaves") for note in result.notes)


def test_a_run_on_data_counts_from_its_first_evaluation() -> None:
    """Cloned behaviour is there before it is played: that its curve is flat says nothing against the comparison."""
    steps = np.repeat(np.arange(10_000, 50_001, 10_000), 20)
    generator = np.random.default_rng(0)
    learned = {"data": {"name": "lab/hopper/medium-v0"}}

    def side(level: float, algo: str, seeds: range) -> list[store.Run]:
        returns = [level + generator.normal(0, 5, len(steps)) for _ in seeds]
        return [
            store.Run(Path("run"), "Hopper-v4", algo, seed, steps, x, 50_000, learned)
            for seed, x in zip(seeds, returns, strict=True)
        ]

    result = judge(side(2500, "iql", range(5)), Reference("bc", side(1500, "bc", range(5))))
    assert result.verdict == "better" and result.start == 20 and len(result.tests) == 2
    assert result.unit == "gradient steps" and not any("uninformative" in note for note in result.notes)
    (curves,) = (axes for axes in draw(result).axes if axes.get_xlabel() == "gradient steps")
    assert {line.get_xdata()[0] for line in curves.get_lines()} == {10_250.0}  # none before anything was played


def test_the_area_of_a_run_on_data_leaves_out_what_was_not_played() -> None:
    """Guards against a first evaluation that counts for all gradient steps before it, in which nothing was played."""
    learned = {"data": {"name": "lab/hopper/medium-v0"}}
    steps, returns = np.repeat([25_000.0, 50_000.0], 100), np.repeat([0.0, 100.0], 100)
    run = store.Run(Path("run"), "Hopper-v4", "iql", 1, steps, returns, 50_000, learned)
    other = dataclasses.replace(run, steps=np.repeat([10_000.0, 50_000.0], 100))
    result = judge([run], Reference("other", [other]))
    assert result.areas["ours"] == pytest.approx(np.linspace(0, 100, 50).mean())  # from the later first one of the two
    assert result.start == 50


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        ({"env": "CartPole-v0"}, "different task: train with --env CartPole-v1"),
        ({"total_timesteps": 200_000}, r"ends at step 100000 of 200000: finish it with --resume"),
    ],
)
def test_refusals(
    tmp_path: Path, reference: str, capsys: pytest.CaptureFixture[str], ours: dict[str, Any], message: str
) -> None:
    assert main([*runs(tmp_path, 480, 2, **ours), "--reference", reference]) == 4
    assert message in capsys.readouterr().err


def test_refuses_another_version_than_the_packages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path, 1, env="HalfCheetah-v5", action_space="Box")
    assert main([str(folder)]) == 4
    assert "the reference is on HalfCheetah-v4, a different task" in capsys.readouterr().err


def test_refuses_what_is_no_sample(tmp_path: Path, reference: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = run_folder(tmp_path / "a", 1), run_folder(tmp_path / "b", 1)
    assert main([str(first), str(second), "--reference", reference]) == 4
    assert "seed 1 occurs 2 times" in capsys.readouterr().err
    other = run_folder(tmp_path / "c", 2, total_timesteps=BUDGET + 1)
    assert main([str(first), str(other), "--reference", reference]) == 4
    assert re.search(
        r"the budgets differ, 100,000 steps of \S+, 100,001 steps of \S+: compare", capsys.readouterr().err
    )
    for bad in (["--margin", "wide"], ["--margin", "-5"], ["--no-such-flag"]):
        assert main([str(first), "--reference", reference, *bad]) == 4
    assert main([]) == 4
    assert main([str(tmp_path / "absent")]) == 4
    (tmp_path / "picture__of__1.csv").write_bytes(b"\x89PNG\xff")
    assert main([str(tmp_path / "picture__of__1.csv")]) == 4
    assert "picture__of__1.csv is no text" in capsys.readouterr().err
    assert main([str(run_folder(tmp_path / "d", 4, total_timesteps="many"))]) == 4
    assert "seed and total_timesteps must be whole numbers" in capsys.readouterr().err
    (tmp_path / "mean.csv").write_text("algo,env_id,global_step,episodic_return\nppo,CartPole-v1,10,\n")
    assert main([str(first), "--reference", str(tmp_path / "mean.csv")]) == 4
    assert "mean.csv: could not convert string to float" in capsys.readouterr().err
    assert main([str(run_folder(tmp_path, 5, env="Chess-v0")), "--margin", "wide"]) == 4
    assert main([str(run_folder(tmp_path, 3, env="Chess-v0")), "--reference", reference]) == 3


def test_the_order_of_runs_does_not_matter(tmp_path: Path, reference: str) -> None:
    """The bootstrap draws by place."""
    ours = [run for folder in runs(tmp_path, 485, 6) for run in store.load(Path(folder))]
    found = find_reference(reference, "ppo", "CartPole-v1")
    results = [judge(given, found) for given in (ours, ours[::-1], ours[3:] + ours[:3])]
    assert len({result.to_json() for result in results}) == 1


def test_what_is_refused_says_nothing_of_the_others(
    tmp_path: Path, reference: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good, short = runs(tmp_path, 480), run_folder(tmp_path, 1, env="Acrobot-v1")
    steps, returns = episodes(-80, 1)
    (short / "episodes.csv.gz").write_bytes(gzip.compress(csv_bytes(steps[-50:], returns[-50:])))
    assert main([str(short), *good, "--reference", reference]) == 4
    shown = capsys.readouterr()
    assert "Verdict: match" in shown.out
    assert re.search(r"ppo on Acrobot-v1: \S+Acrobot-v1__ppo__1\S+ seed 1: a run has 50 episodes", shown.err)


def test_a_published_figure_of_another_budget_has_no_difference(tmp_path: Path) -> None:
    """CleanRL's of SAC is of a million steps."""
    for steps in (300_000, 1_000_000):
        run = run_folder(tmp_path, steps, env="Hopper-v4", algo="sac", action_space="Box", total_timesteps=steps)
        times, returns = episodes(2000, 1)
        (run / "episodes.csv.gz").write_bytes(gzip.compress(csv_bytes(times * steps / BUDGET, returns)))
        result = judge(store.load(run), find_reference("cleanrl", "sac_continuous_action", "Hopper-v4"))
        (note,) = (note for note in result.notes if note.startswith("published"))
        assert ("difference" in note) == (steps == 1_000_000)


def test_scripts_of_cleanrl(tmp_path: Path) -> None:
    for algo, env, space, script in (
        ("ppo_lstm", "BreakoutNoFrameskip-v4", "Discrete", "ppo_atari_lstm"),
        ("dqn", "BreakoutNoFrameskip-v4", "Discrete", "dqn_atari"),
        ("sac", "Hopper-v4", "Box", "sac_continuous_action"),
        ("dqn", "CartPole-v1", "Discrete", "dqn"),
    ):
        (run,) = store.load(run_folder(tmp_path / script, 1, env=env, algo=algo, action_space=space))
        assert run.script == script


def test_an_undeclared_margin_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "reference"
    folder.mkdir()
    for seed in (7, 8, 9):
        (folder / f"ppo__Chess-v0__{seed}.csv").write_bytes(csv_bytes(*episodes(480, seed)))
    ours = runs(tmp_path, 480, 3, env="Chess-v0")
    assert main([*ours, "--reference", str(folder)]) == 4
    assert "no margin is declared for Chess-v0: give --margin" in capsys.readouterr().err
    assert main([*ours, "--reference", str(folder), "--margin", "20%"]) == 0


def test_a_fault_is_no_verdict(tmp_path: Path, reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("rl_lab.compare.compare", broken)
    assert main([*runs(tmp_path, 480, 3), "--reference", reference]) == 4


def test_margins_in_units() -> None:
    scores = np.array([-100.0, -80, -120, -90, -110])  # IQM -100
    assert in_units("20%", scores) == pytest.approx(20)
    assert in_units(25.0, scores) == in_units("25", scores) == 25
    with pytest.raises(ValueError, match=r"--margin 20%: the reference's IQM is 0, give return units such as 25"):
        in_units("20%", np.zeros(5))


def test_notes_tell_what_a_reader_must_know(tmp_path: Path, reference: str, capsys: pytest.CaptureFixture[str]) -> None:
    ours = runs(tmp_path, 480, 3, semantics="correct")
    run_folder(tmp_path, 101, semantics="correct", args={"learning_rate": 1e-3})
    assert main([*ours, str(tmp_path / "CartPole-v1__ppo__101__1700000000"), "--reference", reference]) in (0, 2)
    output = " ".join(capsys.readouterr().out.split())
    assert "our seeds [101] are the reference's own runs" in output
    assert "ours ran with --semantics correct" in output
    assert "our runs differ among themselves in learning_rate" in output
    other = [str(run_folder(tmp_path / "other", seed, semantics="correct")) for seed in (201, 202)]
    assert len(other) == 2
    main([*ours, "--reference", str(tmp_path / "other")])
    assert "semantics" not in capsys.readouterr().out  # where both ran so


def test_differing_versions_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = runs(tmp_path / "reference", 480, 5, versions={"numpy": "1.26.4", "torch": "2.13.0"})
    assert len(theirs) == 5
    ours = [str(run_folder(tmp_path, seed)) for seed in range(11, 16)]
    assert main([*ours, "--reference", str(tmp_path / "reference")]) == 0
    assert "versions differ: numpy 2.4.6 (reference 1.26.4)\n" in capsys.readouterr().out


def test_reads_gzip_members_and_what_is_whole_of_a_broken_one(tmp_path: Path) -> None:
    path = tmp_path / "ppo__CartPole-v1__1.csv.gz"
    first = gzip.compress(b"global_step,episodic_return,episodic_length\n10,1.5,10\n")
    second = gzip.compress(b"20,2.5,10\n30,3.5,10\n")
    path.write_bytes(first + second)
    assert store.read_episodes(path)["episodic_return"].tolist() == [1.5, 2.5, 3.5]
    third = gzip.compress("".join(f"{40 + i},{i * 0.37:.5f},10\n" for i in range(2000)).encode())
    path.write_bytes(first + second + third[: len(third) // 2])
    table = store.read_episodes(path)
    kept = len(table["global_step"]) - 3
    assert 100 < kept < 2000
    assert table["global_step"].tolist() == [10, 20, 30, *range(40, 40 + kept)]
    assert table["episodic_return"][-1] == pytest.approx((kept - 1) * 0.37, abs=1e-5)  # no row cut in two
    path.write_bytes(first + b"\x1f\x8bnonsense")
    with pytest.raises(ValueError, match="ppo__CartPole-v1__1"):
        store.read_episodes(path)
    path.write_bytes(gzip.compress(b"step,reward\n1,2\n"))
    with pytest.raises(ValueError, match="needed are global_step and episodic_return"):
        store.load(path)


def test_reads_cleanrls_event_folders(tmp_path: Path) -> None:
    path = tmp_path / "HalfCheetah-v4__ppo_continuous_action__3__1700000000"
    writer = SummaryWriter(str(path))
    writer.add_text("hyperparameters", "|param|value|\n|-|-|\n|total_timesteps|100000|\n|seed|3|")
    for step, value in ((1000, -5.25), (2000, 7.5)):
        writer.add_scalar("charts/episodic_return", value, step)
        writer.add_scalar("charts/SPS", 1e3, step)
    writer.close()
    (run,) = store.load(tmp_path)
    assert (run.env, run.algo, run.seed, run.total_timesteps) == ("HalfCheetah-v4", "ppo_continuous_action", 3, BUDGET)
    assert run.steps.tolist() == [1000, 2000] and run.returns.tolist() == [-5.25, 7.5]


def test_maps_our_algorithms_to_scripts(tmp_path: Path) -> None:
    for space, script in (("Discrete", "ppo"), ("Box", "ppo_continuous_action")):
        (run,) = store.load(run_folder(tmp_path / space, 1, action_space=space))
        assert run.script == script


def test_builds_reference_sets_from_what_it_finds(tmp_path: Path) -> None:
    logs, target = tmp_path / "logs", tmp_path / "set"
    logs.mkdir(), target.mkdir()
    listing = ["file,script,env_id,seed,total_timesteps"]
    for seed in (2, 1):
        name = f"dqn__CartPole-v1__{seed}.csv.gz"
        (logs / name).write_bytes(gzip.compress(csv_bytes(*episodes(400, seed))))
        listing.append(f"{name},dqn.py,CartPole-v1,{seed},{BUDGET}")
    (logs / "runs.csv").write_text("\n".join(listing))
    (path,) = build.build([logs], target)
    content = path.read_bytes()
    assert build.build([logs], target)[0].read_bytes() == content
    first, second = store.load(target)
    assert (first.seed, second.seed, first.total_timesteps) == (1, 2, BUDGET)
    np.testing.assert_allclose(second.returns, episodes(400, 2)[1], atol=1e-5)
    note = store.provenance(path)
    with pytest.raises(ValueError, match="seed 1 occurs 2 times"):
        build.build([logs, target], target)
    (logs / "runs.csv").unlink()
    with pytest.raises(ValueError, match="its budget is unknown"):
        build.build([logs], target)
    assert note["seeds"] == [1, 2] and note["licence"] == "MIT" and note["command"].startswith("python cleanrl/dqn.py")


def test_the_packages_sets_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    sets = sorted(store.REFERENCE.glob("*__*.csv.gz"))
    assert {"ppo__CartPole-v1.csv.gz", "ppo_continuous_action__HalfCheetah-v4.csv.gz"} <= {path.name for path in sets}
    for path in sets:
        note, loaded = store.provenance(path), store.load(path)
        assert [run.seed for run in loaded] == note["seeds"]
        for key in ("repository", "commit", "command", "env", "versions", "licence", "total_timesteps"):
            assert note[key]
    assert main(["--list"]) == 0
    output = capsys.readouterr().out
    assert "HalfCheetah-v4" in output and "2287.95 ± 571.78" in output  # Walker2d-v4, as documented


def test_carried_sets_hold_the_measured_scores(shared: Path) -> None:
    listing = (shared / "references/cleanrl_runs/runs.csv").read_text().splitlines()
    expected = {}
    for line in listing[1:]:
        _, script, env, seed, _, count, score, *_ = line.split(",")
        expected[script.removesuffix(".py"), env, int(seed)] = (int(count), float(score))
    carried = [run for path in store.REFERENCE.glob("*__*.csv.gz") for run in store.load(path)]
    compared = 0
    for run in carried:
        if (run.algo, run.env, run.seed) in expected:
            count, score = expected[run.algo, run.env, run.seed]
            assert len(run.returns) == count
            assert run.returns[-100:].mean() == pytest.approx(score, abs=0.01)
            compared += 1
    assert compared >= 24


def test_report_is_one_file_with_all_it_tells(tmp_path: Path, reference: str) -> None:
    report = tmp_path / "out" / "report.html"
    ours = runs(tmp_path, 480, 5, versions={"numpy": "<2.4>"})
    assert main([*ours, "--reference", reference, "--report", str(report)]) == 0
    page = report.read_text()
    assert page.count("<svg") == 1 and "currentColor" in page
    assert "475 counts as solved" in page  # the margin's reason
    assert "&lt;2.4&gt;" in page and "<2.4>" not in page
    assert not re.search(r'(src|href)="(http|/)', page)  # nothing is loaded from elsewhere
    assert (tmp_path / "out" / "report-CartPole-v1-ppo.png").read_bytes().startswith(b"\x89PNG")


def test_d3rlpys_curves_are_condensed_to_scores(tmp_path: Path) -> None:
    """Hopper's random and expert returns are 0 and 100; other steps and random sets are left out."""
    rows = [("iql", "hopper-medium-v0", 10_000, -20.272305), ("iql", "hopper-medium-v0", 10_000, 3234.3)]
    rows += [("td3_plus_bc", "hopper-medium-v0", 110_000, 0.0), ("iql", "hopper-random-v0", 10_000, 0.0)]
    lines = ["algo,env_id,gradient_step,eval_return_raw", *(",".join(map(str, row)) for row in rows), ""]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    source, header, *found = build.build_offline(tmp_path / "table.csv", tmp_path).read_text().splitlines()
    assert source.startswith("# Normalized scores of d3rlpy") and header == "algo,dataset,gradient_step,mean,std,seeds"
    assert found == ["iql,hopper-medium-v0,10000,50.00,70.71,2"]
