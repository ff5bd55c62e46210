"""The HTML report: one file that needs nothing else, for light and dark screens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from rl_lab.curves import plot
from rl_lab.curves.compare import Result, seeds_lines, seeds_of

TONES = {"better": "good", "match": "good", "worse": "bad"}  # anything else decides nothing

STYLE = """
:root { color-scheme: light dark; --ink: #14171d; --soft: #5b6472; --line: #e2e5ea; --page: #f6f7f9; --card: #fff;
  --good: #12803f; --bad: #c02b2b; --open: #9a6500; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a1b0; --line: #2b313b; --page: #0f1217;
  --card: #171b22; --good: #4cc57c; --bad: #f07171; --open: #e5b04a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 0; letter-spacing: -.01em; }
h3 { font-size: 12px; margin: 28px 0 8px; color: var(--soft); text-transform: uppercase; letter-spacing: .07em; }
p { margin: 4px 0; } .soft { color: var(--soft); }
article { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 24px 28px; margin: 24px 0; }
header { display: flex; justify-content: space-between; gap: 24px; align-items: flex-start; }
.badge { border: 1.5px solid currentColor; border-radius: 99px; padding: 3px 14px; font-weight: 600;
  white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); } .open { color: var(--open); }
svg { width: 100%; height: auto; margin: 16px 0 0; } svg text { font-family: system-ui, sans-serif !important; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 500; font-size: 13px; text-align: right; }
td, th { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
tr:last-child td { border-bottom: 0; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 0 40px; }
ul { margin: 6px 0; padding-left: 18px; } li { margin: 3px 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 16px; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 20px; } summary { cursor: pointer; color: var(--soft); }
"""


def write_report(results: Sequence[Result], path: Path) -> Path:
    """Write the page at `path` and, beside it, one PNG a result named `{stem}-{env}-{algo}.png`; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    articles = []
    for result in results:
        figure = plot.draw(result)
        name = f"{path.stem}-{result.env}-{result.algo}.png".replace("/", "_")
        (path.parent / name).write_bytes(plot.png(figure))
        articles.append(_article(result, plot.svg(figure)))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Curves compared</title><style>{STYLE}</style></head>
<body><main><h1>Do the curves match?</h1>
<p class="soft">Equivalence test of the interquartile mean (IQM) over seeds. A statistic matches if the 90 % bootstrap
interval of the difference lies within the margin declared beforehand; the verdict is the worse of the two.</p>
{"".join(articles)}
</main></body></html>
"""
    path.write_text(page)
    return path


def _article(result: Result, figure: str) -> str:
    tests = _table(
        ["IQM of", "ours", "reference", "difference", "90 % interval", "margin", "P(ours better)", "verdict"],
        [
            [
                test.statistic,
                f"{test.ours:.1f}",
                f"{test.reference:.1f}",
                f"{test.difference:+.1f}",
                f"{test.low:+.1f} to {test.high:+.1f}",
                f"±{test.margin:.1f}",
                f"{test.improvement:.2f}",
                _tone(test.verdict),
            ]
            for test in result.tests
        ],
    )
    findings = [*seeds_lines(result), *result.notes]
    return f"""<article>
<header><div><h2>{escape(result.algo)} on {escape(result.env)}</h2>
<p class="soft">against {escape(result.reference)} · {result.budget:,} steps · {_counts(result)}</p></div>
<span class="badge {TONES.get(result.verdict, "open")}">{result.verdict}</span></header>
{figure}
{tests if result.tests else ""}
{"<h3>Margin</h3><p>" + escape(result.margin_reason) + "</p>" if result.margin_reason else ""}
{"<h3>Findings</h3><ul>" + "".join(f"<li>{escape(line)}</li>" for line in findings) + "</ul>" if findings else ""}
<div class="columns"><section><h3>Versions</h3>{_versions(result)}</section>
<section><h3>Reference</h3>{_provenance(result)}</section></div>
<details><summary>Scores of the single seeds</summary><div class="columns">{_seeds(result)}</div></details>
</article>"""


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """An HTML table; the last cells of the rows may be markup made here."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _tone(verdict: str) -> str:
    return f'<span class="{TONES.get(verdict, "open")}">{verdict}</span>'


def _counts(result: Result) -> str:
    return ", ".join(f"{seeds_of(len(seeds))} {side}" for side, seeds in result.seeds.items() if seeds)


def _versions(result: Result) -> str:
    ours, theirs = result.versions["ours"], result.versions["reference"]
    if not ours and not theirs:
        return '<p class="soft">not recorded</p>'
    names = sorted(set(ours) | set(theirs))
    rows = ([escape(name), *(escape(side.get(name, "–")) for side in (ours, theirs))] for name in names)
    return _table(["", "ours", "reference"], rows)


def _provenance(result: Result) -> str:
    told = {name: value for name, value in result.provenance.items() if name != "versions"}
    if not told:
        return f'<p class="soft">{escape(result.reference)}</p>'
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in told.items()}
    return "<dl>" + "".join(f"<dt>{escape(n)}</dt><dd>{escape(text)}</dd>" for n, text in texts.items()) + "</dl>"


def _seeds(result: Result) -> str:
    return "".join(
        f"<section><h3>{side}</h3>"
        + _table(
            ["seed", "last-100 score", "normalised area"],
            (
                [str(seed), f"{score:.1f}", f"{area:.1f}"]
                for seed, score, area in zip(result.seeds[side], result.scores[side], result.areas[side], strict=True)
            ),
        )
        + "</section>"
        for side in result.scores
    )
