"""Put the measured training speeds of `benchmarks/results` into the README, between its speed marks.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ALGORITHMS = ("ppo", "dqn", "sac")
PEERS = ("Stable-Baselines3", "CleanRL")


def row(algo: str, report: dict[str, Any]) -> list[str]:
    """One algorithm on one environment: steps per CPU-second with one seed and with many, ratios, time to result."""
    results = report["results"]
    sps = {name: result["sps"] for name, result in results.items()}

    def ratio(name: str, peer: str) -> str:
        return f"{median(a / b for a, b in zip(sps[name], sps[peer], strict=True)):.1f} ×" if peer in sps else "–"

    cells = [algo.upper(), report["env"]]
    for name in (name for name in sps if name.startswith("rl_lab")):
        many = name.removeprefix("rl_lab").replace(", ", "") + ": " * (name != "rl_lab")
        cells.append(f"{many}{median(sps[name]):,.0f} ({' / '.join(ratio(name, peer) for peer in PEERS)})")
    cells += ["–"] * (4 - len(cells))
    cells += [f"{median(sps[peer]):,.0f}" if peer in sps else "–" for peer in PEERS]
    seconds = [f"{results['rl_lab'][start]['cpu']:,.0f} s" for start in ("warm", "cold")]
    seconds += [f"{results[peer]['warm']['cpu']:,.0f} s" if peer in results else "–" for peer in PEERS]
    steps = f"{report['budget']:,} steps" + (", extrapolated" if report["steps"] < 0.99 * report["budget"] else "")
    return [*cells, f"{' / '.join(seconds)} ({steps})"]


def table(folder: Path) -> str:
    """Markdown of every report in `folder`."""
    paths = [path for algo in ALGORITHMS for path in sorted(folder.glob(f"{algo}-*.json"))]
    reports = [json.loads(path.read_text()) for path in paths]
    header = ["", "environment", "rl_lab, one seed (× SB3 / CleanRL)", "many seeds in all (likewise)", *PEERS]
    header.append("CPU time to result: rl_lab warm / cold / SB3 / CleanRL")
    rows = [header, ["---"] * 2 + ["---:"] * 5]
    rows += [row(path.name.partition("-")[0], report) for path, report in zip(paths, reports, strict=True)]
    machines = {f"{report['machine']['cpu']}, {report['machine']['cores']} cores" for report in reports}
    return (
        "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + f"\n\nMeasured on {' and '.join(sorted(machines))}."
    )


def main() -> None:
    readme = ROOT / "README.md"
    begin, end = "<!-- speed -->\n", "\n<!-- /speed -->"
    text = begin + table(ROOT / "benchmarks/results") + end
    new, count = re.subn(f"{begin}.*?{end[1:]}", lambda _: text, readme.read_text(encoding="utf-8"), flags=re.S)
    if count != 1:
        raise SystemExit(f"{readme} needs the marks {begin.strip()} and {end.strip()} once each")
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
