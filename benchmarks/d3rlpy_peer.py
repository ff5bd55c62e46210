"""d3rlpy's algorithms with rl_lab's hyper-parameters on a D4RL file; a line "SPS: ..." after every MARK gradient steps.

    d3rlpy_peer.py iql|td3_bc|cql|bc FILE STEPS MARK cpu|cuda

Runs in d3rlpy's own environment, so that nothing of rl_lab is imported here. It writes its logs, as ours does.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import d3rlpy
import h5py
import torch
from d3rlpy.models.encoders import VectorEncoderFactory
from d3rlpy.preprocessing import StandardObservationScaler

NETWORK = VectorEncoderFactory([256, 256])


def learner(algo: str) -> Any:
    """The algorithm with batches of 256 and networks of 256-256."""
    both = {"actor_encoder_factory": NETWORK, "critic_encoder_factory": NETWORK, "batch_size": 256}
    if algo == "iql":
        return d3rlpy.algos.IQLConfig(value_encoder_factory=NETWORK, expectile=0.7, weight_temp=3.0, **both)
    scaled = {"observation_scaler": StandardObservationScaler()}
    if algo == "td3_bc":
        return d3rlpy.algos.TD3PlusBCConfig(alpha=2.5, **scaled, **both)
    if algo == "cql":
        return d3rlpy.algos.CQLConfig(n_action_samples=10, conservative_weight=5.0, alpha_learning_rate=0.0, **both)
    return d3rlpy.algos.BCConfig(encoder_factory=NETWORK, batch_size=256, learning_rate=3e-4, **scaled)


def main() -> None:
    algo, path, steps, mark, device = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    torch.set_num_threads(1)
    with h5py.File(path) as file:
        names = ("observations", "actions", "rewards", "terminals", "timeouts")
        data = d3rlpy.dataset.MDPDataset(*(file[name][()] for name in names))
    begin = time.time()
    learner(algo).create(device=f"{device}:0").fit(
        data,
        n_steps=steps,
        n_steps_per_epoch=mark,
        show_progress=False,
        epoch_callback=lambda _, epoch, step: print("SPS:", int(step / (time.time() - begin)), flush=True),
    )


if __name__ == "__main__":
    main()
