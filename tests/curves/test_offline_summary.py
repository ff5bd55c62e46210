"""The table of offline results: scores, verdicts against behaviour cloning, figures of CORL, from kept results."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rl_lab import cli
from rl_lab.algorithms import bc, cql
from rl_lab.collect import Args, collect
from rl_lab.curves import offline
from rl_lab.curves.plot import png

SCORES = [-20.0, 3234.0]  # of a random policy and an expert
SPAN = SCORES[1] - SCORES[0]


def keep(
    folder: Path,
    algo: str,
    scores: list[float],
    name: str = "lab-hopper-medium-v0",
    env: str = "Hopper-v4",
    steps: int = 50000,
) -> None:
    """Results as they are kept: an early evaluation of 10 episodes, and the last of 100 around each seed's score."""
    spread = np.random.default_rng(0).normal(0, 5, 100)
    lines = ["seed,global_step,episodic_return"]
    for seed, score in enumerate(scores):
        returns = SCORES[0] + SPAN * (score + spread - spread.mean()) / 100
        lines += [f"{seed},10000,0.0"] * 10 + [f"{seed},{steps},{x!r}" for x in returns.tolist()]
    note = {"algo": algo, "env": env, "total_timesteps": steps, "seeds": list(range(len(scores)))}
    note |= {"data": {"scores": SCORES, "checksum": "a"}}
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / f"{algo}__{env}.csv.gz").write_bytes(gzip.compress("\n".join([*lines, ""]).encode()))
    (folder / name / f"{algo}__{env}.json").write_text(json.dumps(note))


def test_scores_and_verdicts(tmp_path: Path) -> None:
    """IQL is 20 points above BC in every seed, TD3+BC is BC itself; 20 % of 50 is the margin, 10 points."""
    keep(tmp_path, "bc", [49.0, 50, 50, 50, 51])
    keep(tmp_path, "iql", [69.0, 70, 70, 70, 71])
    keep(tmp_path, "td3_bc", [49.0, 50, 50, 50, 51])
    keep(tmp_path, "cql", [29.0, 30, 31])
    row = offline.judge_all(tmp_path)["lab-hopper-medium-v0"]
    np.testing.assert_allclose(row["iql"].scores, [69, 70, 70, 70, 71])
    assert {algo: cell.test and cell.test.verdict for algo, cell in row.items()} == {
        "bc": None, "iql": "better", "td3_bc": "match", "cql": "worse",
    }  # fmt: skip
    assert row["iql"].test and row["iql"].test.improvement == 1.0 and row["iql"].test.margin == pytest.approx(10.0)
    line = offline.table({"lab-hopper-medium-v0": row}).splitlines()[2]
    assert line.startswith("| lab-hopper-medium-v0 | 50.0 [")
    assert "5 × 50k (53.5) |" in line  # CORL's BC on hopper-medium-v2
    told = ": better, P 1.00 (67.5; 32.2)", ": worse, P 0.00 (59.1; 42.6)"  # then d3rlpy's on hopper-medium-v0, as long
    assert all(cell in line for cell in told)


def test_scores_by_gradient_step(tmp_path: Path) -> None:
    """Beside d3rlpy's after as many; a step that no curve of d3rlpy's has is no column, one not evaluated is a dash."""
    keep(tmp_path, "iql", [69.0, 70, 71])
    keep(tmp_path, "cql", [29.0, 30, 31], steps=40000)
    keep(tmp_path, "bc", [10.0], name="my-own-v3", steps=12345)
    results = offline.judge_all(tmp_path)
    assert offline.curves_table(results).splitlines() == [
        "| data set |  | 10,000 | 40,000 | 50,000 |",
        "| --- | --- | ---: | ---: | ---: |",
        "| lab-hopper-medium-v0 | IQL | 0.6 (25.4) | – | 70.0 (32.2) |",
        "| lab-hopper-medium-v0 | CQL | 0.6 (18.6) | 30.0 (35.3) | – |",
        "| my-own-v3 | BC | 0.6 | – | – |",
    ]
    first, _ = offline.draw(results).axes
    dashed = [line for line in first.get_lines() if line.get_linestyle() == "--"]
    assert [line.get_xdata()[-1] for line in dashed] == [50000, 40000]  # d3rlpy's, until ours end


def test_margins_are_in_points_of_the_score(tmp_path: Path) -> None:
    """A share is BC's; Pendulum's 50 of the return are 50 / 32.54 points. Of -v5 it is another version's."""
    keep(tmp_path, "bc", [48.0, 50, 52], "lab-pendulum-v0", "Pendulum-v1")
    keep(tmp_path, "iql", [51.0, 53, 55], "lab-pendulum-v0", "Pendulum-v1")
    keep(tmp_path, "bc", [50.0], "lab-hopper-v0", "Hopper-v5")
    keep(tmp_path, "iql", [80.0], "lab-hopper-v0", "Hopper-v5")
    results = offline.judge_all(tmp_path)
    tests = [results[name]["iql"].test for name in ("lab-pendulum-v0", "lab-hopper-v0")]
    assert [test and test.margin for test in tests] == pytest.approx([50 / SPAN * 100, 10.0])


def test_d4rls_own_file_is_held_against_corl(tmp_path: Path) -> None:
    """After as many steps, and with an interval; of one seed or another budget the figure stands alone."""
    name = "hopper_medium-v2"  # as D4RL's file is named
    keep(tmp_path, "bc", [52.0, 53.0, 54.0], name, steps=1_000_000)
    keep(tmp_path, "iql", [20.0, 20.1, 20.2], name, steps=1_000_000)
    keep(tmp_path, "td3_bc", [20.0], name, steps=1_000_000)
    keep(tmp_path, "cql", [20.0, 20.1, 20.2], name)
    (line,) = offline.table(offline.judge_all(tmp_path)).splitlines()[2:3]
    assert "(53.5, within)" in line and "(67.5, outside)" in line and line.count("side)") == 1
    assert "(60.4)" in line and "(59.1; 42.6)" in line  # no seconds and more of d3rlpy's after a million


def run_folder(folder: Path, data: str, episodes: int, steps: int = 50000, flags: str = "") -> Path:
    """A run of IQL whose last evaluation has so many episodes, after so many of 50,000 gradient steps."""
    run = folder / "Hopper-v4__iql__1__1"
    run.mkdir(exist_ok=True)
    rows = ["global_step,episodic_return,episodic_length", *["10000,0,9"] * 90, *[f"{steps},3234,9"] * episodes, ""]
    (run / "episodes.csv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    config = {"env": "Hopper-v4", "algo": "iql", "seed": 1, "seeds": [1], "total_timesteps": 50000, "semantics": ""}
    command = f"python -m rl_lab.iql --dataset lab/hopper/medium-v0 --scores 0 3234 --num-seeds 1 {flags}"
    config |= {"group": [run.name], "command": command, "args": {"runs_dir": "runs"}, "action_space": "Box"}
    config |= {"data": {"name": "lab/hopper/medium-v0", "scores": SCORES, "checksum": data}}
    (run / "config.json").write_text(json.dumps(config))
    return run


def test_what_cannot_stand_in_the_table_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = Path("runs/results/offline")
    for given, message in (
        ({"episodes": 20}, r"\(seed 1\) has 20 episodes after step 50,000, its last; the table takes 100"),
        ({"episodes": 100, "steps": 12000}, "has 0 episodes after step 50,000"),
        ({"episodes": 100, "flags": "--beta 0"}, "was trained with --beta 0; the table is of the defaults"),
    ):
        with pytest.raises(SystemExit, match=message):
            offline.main((run_folder(tmp_path, "a", **given),))
        assert not kept.exists()
    keep(kept, "bc", [50.0])
    with pytest.raises(SystemExit, match=r"bc__Hopper-v4.csv.gz is of other data of this name"):
        offline.main((run_folder(tmp_path, "b", 100),))
    keep(kept, "iql", [50.0, 60.0], steps=100_000)
    told = r"iql__Hopper-v4.csv.gz is of 2 seeds × 100,000 gradient steps, \S+ is of 1 × 50,000: remove it"
    with pytest.raises(SystemExit, match=told):
        offline.main((run_folder(tmp_path, "a", 100),))
    (kept / "lab-hopper-medium-v0/iql__Hopper-v4.csv.gz").unlink()
    keep(kept, "bc", [50.0], env="Hopper-v5")
    with pytest.raises(SystemExit, match=r"bc__Hopper-v5.csv.gz was judged in Hopper-v5 by .*: remove one of them"):
        offline.main((run_folder(tmp_path, "a", 100),))
    (kept / "lab-hopper-medium-v0/bc__Hopper-v5.csv.gz").unlink()
    offline.main((run_folder(tmp_path, "a", 100),))
    assert offline.judge_all(kept)["lab-hopper-medium-v0"]["iql"].scores == pytest.approx([100.0])


def test_sets_without_bc_or_a_published_figure_are_shown(tmp_path: Path) -> None:
    """And an algorithm without results is not."""
    keep(tmp_path, "iql", [10.0, 20.0], name="my-own-v3")
    keep(tmp_path, "bc", [10.0], name="one-seed-v0")
    results = offline.judge_all(tmp_path)
    assert results["my-own-v3"]["iql"].test is None
    lines = offline.table(results).splitlines()
    assert lines[:2] == ["| data set | BC | IQL |", "| --- | ---: | ---: |"]
    assert lines[2].startswith("| my-own-v3 | – |") and lines[3].startswith("| one-seed-v0 | 10.0, 1 × 50k |")
    assert png(offline.draw(results)).startswith(b"\x89PNG")


@pytest.mark.parametrize("source", ["d4rl", "minari"])
def test_from_a_data_set_to_the_table(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BC and CQL learn from a file as D4RL's and from a Minari set, are judged, kept, and stand in the README."""
    h5py = pytest.importorskip("h5py", reason="data sets need h5py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rl_lab.envs.mujoco_tasks.Task.max_episode_steps", 10)
    if source == "d4rl":
        name, numbers = "halfcheetah_medium-v2.hdf5", np.random.default_rng(0)
        with h5py.File(name, "w") as file:
            for key, width in (("observations", 17), ("next_observations", 17), ("actions", 6)):
                file[key] = numbers.uniform(-1, 1, (64, width)).astype(np.float32)
            file["rewards"] = numbers.normal(size=64).astype(np.float32)
            file["terminals"], file["timeouts"] = np.zeros(64, bool), np.arange(64) % 16 == 15
    else:
        pytest.importorskip("minari", reason="Minari's sets need minari")
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))
        name = "lab/halfcheetah/medium-v0"
        collect(Args(dataset=name, env="HalfCheetah-v4", random=True, steps=60))
    Path("README.md").write_text("<!-- results:offline -->\n<!-- /results:offline -->\n")
    flags = ["--dataset", name, "--total-timesteps=20", "--log-every=10", "--batch-size=8", "--num-seeds=2"]
    monkeypatch.setattr(sys, "orig_argv", ["python"])  # where the run takes its command from, which is this test's
    for algorithm in (bc, cql):
        monkeypatch.setattr(algorithm, "HIDDEN", (8, 8))
        args = cli.parse([*flags, "--no-compile", "--device=cpu"], algorithm.Args, algorithm.defaults)
        offline.main(tuple(algorithm.train(args).logs.folders))
    lines = Path("README.md").read_text().splitlines()
    row = "halfcheetah_medium-v2" if source == "d4rl" else "lab-halfcheetah-medium-v0"
    cell = r"-?\d+\.\d \[-?\d+\.\d, -?\d+\.\d\], 2 × 0k"
    assert lines[1] == "| data set | BC | CQL |"
    assert re.fullmatch(rf"\| {row} \| {cell} \(42\.4\) \| {cell}: \w+, P \d\.\d\d \(47\.0\) \|", lines[3]), lines[3]
    note = json.loads(next(Path("runs/results/offline").glob("*/cql*.json")).read_text())
    assert note["env"] == "HalfCheetah-v4" and note["data"]["scores"] == [-280.178953, 12135.0]


RECIPE = Path(__file__).parents[2] / "runs/offline.sh"
STUB = """#!/usr/bin/env bash
# Stands for Python: what is called, and a run folder of each of two seeds, the first time an unfinished one; what
# `diverge` names is killed, as if memory were short. The data's checksum is "b".
[[ $1 != -c ]] || { echo b; exit; }
echo "$@" >> calls
[[ $2 != "$(cat diverge 2> /dev/null)" ]] || kill -9 $$
[[ $2 == rl_lab.curves.offline ]] && exit
while (($#)); do [[ $1 == --runs-dir ]] && folder=$2; shift; done
for seed in 1 2; do
    run=${folder:-runs/bc/hopper-medium}/Hopper-v4__bc__${seed}__1
    mkdir -p "$run"
    [[ ! -f interrupt ]] || continue
    touch "$run/model.safetensors"
done
[[ ! -f interrupt ]] || { rm interrupt; exit 130; }
"""


def test_the_recipe_goes_on_and_keeps_what_it_went_on_with(tmp_path: Path) -> None:
    """Interrupted, resumed, already finished: the results of the same two runs are kept; not of another budget.

    An interrupt ends it, a training that fails does not, but its status tells.
    """
    (tmp_path / "runs").mkdir()
    shutil.copy(RECIPE, tmp_path / "runs")
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "interrupt").touch()

    def calls(status: int = 0, says: str = "", **environ: str) -> list[str]:
        """What a call of the recipe calls in turn; it ends with this status and says so."""
        (tmp_path / "calls").write_text("")
        variables = os.environ | {"PYTHON": str(tmp_path / "python"), "ALGORITHMS": "bc"} | environ
        ended = subprocess.run(
            [tmp_path / "runs/offline.sh", "hopper-medium"], env=variables, stderr=subprocess.PIPE, text=True
        )
        assert ended.returncode == status and says in ended.stderr
        return (tmp_path / "calls").read_text().splitlines()

    folder = "runs/bc/hopper-medium"
    both = f"{folder}/Hopper-v4__bc__1__1 {folder}/Hopper-v4__bc__2__1"
    (training,) = calls(status=130)
    assert training.startswith("-m rl_lab.bc --dataset lab/hopper/medium-v0 --total-timesteps 50000 --num-seeds 5")
    resumed = f"-m rl_lab.bc --resume {folder}/Hopper-v4__bc__1__1"
    assert calls() == [resumed, f"-m rl_lab.curves.offline {both}"]
    assert calls() == [f"-m rl_lab.curves.offline {both}"]
    (kept := tmp_path / "runs/results/offline/lab-hopper-medium-v0").mkdir(parents=True)
    (kept / "bc__Hopper-v4.csv.gz").touch()
    assert calls() == []
    (training,) = calls(STEPS="9", SEEDS="2")
    assert "--total-timesteps 9 --num-seeds 2" in training and f"{folder}-9-steps-2-seeds" in training
    assert calls(STEPS="9", SEEDS="2") == []  # finished
    (tmp_path / "diverge").write_text("rl_lab.iql")
    failed, training, keeping = calls(status=1, says="failed: iql on hopper-medium", ALGORITHMS="iql td3_bc")
    assert "rl_lab.iql" in failed and "rl_lab.td3_bc" in training and "rl_lab.curves.offline" in keeping
    (tmp_path / "diverge").write_text("rl_lab.curves.offline")
    assert len(calls(status=1, says="failed: keeping td3_bc on hopper-medium", ALGORITHMS="td3_bc awac")) == 4
    (kept / "bc__Hopper-v4.json").write_text('{"data": {"checksum": "a"}}')
    told = "failed: td3_bc on hopper-medium: runs/results/offline/lab-hopper-medium-v0 is of other data"
    assert calls(status=1, says=told, ALGORITHMS="td3_bc") == []
    (kept / "bc__Hopper-v4.json").write_text('{"data": {"checksum": "b"}}')
    assert len(calls(status=1, ALGORITHMS="td3_bc")) == 2


def test_other_runs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="keeps no results: name run folders"):
        offline.main()
    run = tmp_path / "CartPole-v1__ppo__1__1"
    run.mkdir()
    rows = b"global_step,episodic_return,episodic_length\n10,1.0,1\n"
    (run / "episodes.csv.gz").write_bytes(gzip.compress(rows))
    config = {"env": "CartPole-v1", "algo": "ppo", "seed": 1, "total_timesteps": 10, "args": {}}
    for more, message in (
        ({}, "has not learned from a data set"),
        (
            {"algo": "discrete_cql", "data": {"name": "x", "scores": SCORES}},
            "is of discrete_cql; the table has bc, td3_bc",
        ),
    ):
        (run / "config.json").write_text(json.dumps(config | more))
        with pytest.raises(SystemExit, match=message):
            offline.main((run,))
    assert not (tmp_path / "runs").exists()
