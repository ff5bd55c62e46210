"""Writes peer_numbers.json: what rliable and scipy say about fixed scores. Run in an environment with these peers:

python -m venv peers
peers/bin/pip install rliable==1.2.0 "arch<8" "pandas<3"
peers/bin/python tests/curves/make_peer_numbers.py
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import scipy.stats
from rliable import library, metrics

generator = np.random.default_rng(20)
ours = np.round(generator.normal(1.0, 0.5, (10, 3)), 3)  # (runs, tasks)
reference = np.round(generator.normal(0.8, 0.5, (5, 3)), 3)
thresholds = np.round(np.linspace(-0.5, 2.5, 13), 3)

np.random.seed(0)  # rliable draws from the global generator
numbers: dict[str, object] = {"versions": {name: version(name) for name in ("rliable", "scipy", "arch", "numpy")}}
numbers |= {"ours": ours.tolist(), "reference": reference.tolist(), "thresholds": thresholds.tolist()}
for side, scores in (("ours", ours), ("reference", reference)):
    _, intervals = library.get_interval_estimates(
        {"x": scores}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=50_000, confidence_interval_size=0.90
    )
    numbers[side + "_iqm"] = metrics.aggregate_iqm(scores)
    numbers[side + "_iqm_by_task"] = scipy.stats.trim_mean(scores, 0.25, axis=0).tolist()
    numbers[side + "_interval"] = intervals["x"].ravel().tolist()
profile, _ = library.create_performance_profile({"x": ours}, thresholds, reps=10)
numbers["profile"] = profile["x"].tolist()
numbers["improvement_by_task"] = [
    float(metrics.probability_of_improvement(ours[:, [task]], reference[:, [task]])) for task in range(3)
]
rows = [[1.0, 2.0, 2.0, 3.0], [2.0, 2.0, 5.0]]  # with ties
numbers["improvement_ties"] = [
    *rows,
    float(metrics.probability_of_improvement(*(np.array(row)[:, None] for row in rows))),
]
numbers["t_0.95"] = {str(freedom): float(scipy.stats.t.ppf(0.95, freedom)) for freedom in (1, 2, 4, 9, 29, 199)}
Path(__file__).with_name("peer_numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
