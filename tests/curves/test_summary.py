"""Results that are kept say what the runs said, and the README shows what they give."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from rl_lab.curves import store, summary
from rl_lab.curves.compare import find_reference, judge
from rl_lab.curves.store import Run

ROOT = Path(__file__).resolve().parents[2]
CARTPOLE = ("CartPole-v1", 500_000, "Discrete", (470.0, 480.0, 490.0))
HOPPER = ("Hopper-v4", 1_000_000, "Box", (1000.0, 2000.0, 3000.0))


def train(
    root: Path,
    env: str,
    budget: int,
    space: str,
    returns: tuple[float, ...],
    end: int | None = None,
    algo: str = "ppo",
) -> list[Run]:
    """Run folders of seeds 1, 2, ... trained together, which returned the same in every episode, up to step `end`."""
    names = [f"{env}__{algo}__{seed}__1700000000" for seed in range(1, len(returns) + 1)]
    for seed, (name, level) in enumerate(zip(names, returns, strict=True), start=1):
        config = {
            "env": env,
            "algo": algo,
            "seed": seed,
            "seeds": list(range(1, len(returns) + 1)),
            "group": names,
            "total_timesteps": budget,
            "action_space": space,
            "semantics": "cleanrl",
            "args": {"runs_dir": "/home/somebody/runs"},
            "command": f"python -m rl_lab.ppo --env {env} --runs-dir /home/somebody/runs",
            "versions": {"numpy": "2.4.6"},
            "git_commit": "0123abc",
            "hardware": {"cpu": "a fast one"},
        }
        folder = root / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        rows = [f"{step},{level},1000" for step in range(1000, (end or budget) + 1, 1000)]
        text = "\n".join(["global_step,episodic_return,episodic_length", *rows, ""])
        (folder / "episodes.csv.gz").write_bytes(gzip.compress(text.encode()))
    return [run for name in names for run in store.load(root / name)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_kept_is_judged_as_the_runs_are(here: Path) -> None:
    runs = train(Path("runs/ppo"), *CARTPOLE)
    path = summary.keep(runs, Path("kept"))
    note = json.loads((here / "kept/ppo__CartPole-v1.json").read_text())
    assert path == Path("kept/ppo__CartPole-v1.csv.gz")
    assert note["command"] == "python -m rl_lab.ppo --env CartPole-v1 --runs-dir runs/ppo"
    assert (note["seeds"], note["git_commit"], note["total_timesteps"]) == ([1, 2, 3], "0123abc", 500_000)
    first = path.read_bytes()
    assert summary.keep(runs, Path("kept")).read_bytes() == first

    (kept,) = summary.judge_all(Path("kept"))
    direct = judge(runs, find_reference("cleanrl", "ppo", "CartPole-v1"))
    assert (kept.tests, kept.verdict, kept.versions) == (direct.tests, direct.verdict, direct.versions)
    np.testing.assert_array_equal(kept.curves["ours"], direct.curves["ours"])


def test_seeds_are_kept_all_or_none(here: Path) -> None:
    runs = train(Path("runs/ppo"), *CARTPOLE)
    with pytest.raises(ValueError, match="with 3 seeds in all, of which 2 are among the 2 runs given"):
        summary.keep(runs[1:], Path("kept"))
    other = train(Path("other"), "CartPole-v1", 500_000, "Discrete", (1.0, 2.0, 3.0, 4.0))
    with pytest.raises(ValueError, match="of which 3 are among the 4 runs given"):
        summary.keep([*runs, other[3]], Path("kept"))


def test_a_row_of_the_table(here: Path) -> None:
    summary.keep(train(Path("runs/ppo"), *CARTPOLE), Path("kept"))
    summary.keep(train(Path("runs/ppo"), *HOPPER), Path("kept"))
    lines = summary.table(summary.judge_all(Path("kept"))).splitlines()
    cartpole, hopper = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:4])
    # Three seeds, so the IQM is the mean. Of 27 samples with replacement one is (470, 470, 470): 3.7 % lie at -10,
    # hence the quantile of 2.5 %. It is stretched by sqrt(3 / 2) * t(0.975, 2) / z(0.975) = 1.2247 * 4.3027 / 1.9600.
    assert cartpole[:4] == ["CartPole-v1", "3 : 5", "480.0 [453.1, 506.9]", "480.0 ± 8.2"]  # sqrt(200 / 3) = 8.16
    assert cartpole[5].startswith("[490.0 ± 6.1](https://github.com/vwxyzjn/cleanrl/blob/")  # published.csv
    assert hopper[:2] == ["Hopper-v4", "3"]
    assert hopper[3:5] == ["2,000 ± 816.5", "–"]
    assert hopper[5].startswith("[2,383 ± 271.7](https://github.com/vwxyzjn/cleanrl/blob/")
    assert hopper[6:] == ["informative", "–"]


def test_a_row_of_one_run_that_was_stopped(here: Path) -> None:
    """It ended episodes up to step 990,000 of 10,000,000: no interval, and the published figure stays beside it."""
    (run,) = train(Path("runs/ppo"), "PongNoFrameskip-v4", 10_000_000, "Discrete", (-5.0,), end=990_000)
    summary.keep([run], Path("kept"))
    lines = summary.table(summary.judge_all(Path("kept"))).splitlines()
    row = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert row[:5] == ["PongNoFrameskip-v4 at 990,000 of 10,000,000 steps", "1", "-5.0", "-5.0", "–"]
    assert row[5].startswith("[20.4 ± 0.2](") and row[6:] == ["informative", "–"]
    (panel,) = summary.draw(summary.judge_all(Path("kept"))).axes
    assert panel.get_xlim() == (0, 990_000)


def test_a_row_of_a_smaller_budget_than_the_published(here: Path) -> None:
    """SAC's 300,000 of CleanRL's 1,000,000 steps, which were the whole budget: the row says so, no mark is drawn."""
    summary.keep(train(Path("runs/sac"), "Hopper-v4", 300_000, "Box", (900.0,), algo="sac"), Path("kept"))
    results = summary.judge_all(Path("kept"))
    row = [cell.strip() for cell in summary.table(results).splitlines()[2].split("|")[1:-1]]
    assert row[0] == "Hopper-v4 at 300,000 of 1,000,000 steps" and row[5].startswith("[")
    (panel,) = summary.draw(results).axes
    assert all(line.get_label() != "CleanRL, published: mean ± std" for line in panel.containers)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Ten normal seeds, 400 times: 95 % of 400 is 380, with a binomial deviation of 4.4."""
    low, high = summary.interval(np.random.default_rng(1).normal(size=(400, 10)))[1:]
    covered = int(((low < 0) & (high > 0)).sum())
    assert 367 <= covered <= 393


def test_the_plot_has_a_panel_for_each_environment(here: Path) -> None:
    summary.keep(train(Path("runs/ppo"), *CARTPOLE), Path("kept"))
    summary.keep(train(Path("runs/ppo"), *HOPPER), Path("kept"))
    results = summary.judge_all(Path("kept"))
    panels = summary.draw(results).axes
    titles = [(axes.get_title(loc="left"), axes.get_title(loc="right")) for axes in panels]
    assert titles == [("CartPole-v1", results[0].verdict), ("Hopper-v4", "informative")]
    cartpole, hopper = ([x.get_ydata() for x in axes.get_lines() if x.get_linewidth() > 1] for axes in panels)
    assert [set(y) for y in cartpole[1:]] == [{480.0}]  # first the reference, then ours
    assert [float(y[0]) for y in hopper[:2]] == [2000.0, 2382.86]  # ours, then the published mean and its whiskers


@pytest.mark.parametrize(
    ("command", "moved"),
    [
        ("python -m rl_lab.ppo --runs-dir runs --seed 1", "python -m rl_lab.ppo --runs-dir kept/x --seed 1"),
        ("python -m rl_lab.ppo --runs-dir=.", "python -m rl_lab.ppo --runs-dir=kept/x"),
        ("python -m rl_lab.ppo --env CartPole-v1", "python -m rl_lab.ppo --env CartPole-v1"),
    ],
)
def test_only_the_folder_of_a_command_is_moved(command: str, moved: str) -> None:
    """Guards against a replacement of the same letters elsewhere in it."""
    assert summary._in_folder(command, "kept/x") == moved


def test_the_command_replaces_what_stands_between_the_markers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(Path("runs/ppo"), *CARTPOLE)
    readme = here / "README.md"
    readme.write_text("before\n<!-- results:ppo -->\nold\n<!-- /results:ppo -->\nafter\n")
    summary.main("ppo", tuple(Path("runs/ppo").iterdir()))
    printed = capsys.readouterr().out
    text = readme.read_text()
    assert text.startswith("before\n<!-- results:ppo -->\n| environment |")
    assert text.endswith(" |\n<!-- /results:ppo -->\nafter\n") and "old" not in text
    assert text[text.index("| environment") : text.index("<!-- /")] in printed
    assert (here / "runs/results/ppo.png").read_bytes().startswith(b"\x89PNG")
    summary.main("ppo")
    assert readme.read_text() == text
    for end in (1, 3):  # torn
        readme.write_text(torn := "<!-- results:ppo -->\n" + "<!-- /results:ppo -->\n" * (end - 1))
        with pytest.raises(SystemExit, match=r"README.md needs the lines <!-- results:ppo -->"):
            summary.main("ppo")
        assert readme.read_text() == torn
    readme.write_text("no markers\n")
    capsys.readouterr()
    summary.main("ppo")  # which ends no recipe: the results are kept, and the next environment's turn comes
    assert "README.md has no place for this table: the lines <!-- results:ppo -->" in capsys.readouterr().err
    assert readme.read_text() == "no markers\n"
    next((here / "runs/results/ppo").glob("*.json")).unlink()
    with pytest.raises(SystemExit, match=r"summary: .*ppo__CartPole-v1.csv.gz lies without the JSON file"):
        summary.main("ppo")


def test_an_id_with_a_slash_is_kept_and_judged(here: Path) -> None:
    runs = train(Path("runs/ppo"), "MinAtar-Breakout-v1", 500_000, "Discrete", (10.0, 11.0))
    runs = [dataclasses.replace(run, env="MinAtar/Breakout-v1") for run in runs]
    assert summary.keep(runs, Path("kept")) == Path("kept/ppo__MinAtar-Breakout-v1.csv.gz")
    (result,) = summary.judge_all(Path("kept"))
    assert (result.env, result.verdict) == ("MinAtar/Breakout-v1", "no reference")


def test_the_readme_shows_the_results_kept() -> None:
    readme, folder = ROOT / "README.md", ROOT / "runs/results/ppo"
    if not readme.is_file() or "<!-- results:ppo -->\n" not in readme.read_text(encoding="utf-8"):
        pytest.skip("README.md has no place for the results of ppo")
    shown = readme.read_text(encoding="utf-8").split("<!-- results:ppo -->\n")[1].split("<!-- /results:ppo -->")[0]
    assert shown == summary.table(summary.judge_all(folder)) + "\n", "run python -m rl_lab.curves.summary ppo"
