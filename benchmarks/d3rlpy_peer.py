"""d3rlpy's algorithms with rl_lab's hyper-parameters on a D4RL file; a line "SPS: ..." after every MARK gradient steps.

    d3rlpy_peer.py iql|td3_bc|cql|bc FILE STEPS MARK cpu|cuda [SEED FOLDER]

With FOLDER the policy's weights are in FOLDER/STEP.npz after as many. Runs in d3rlpy's own environment, so that nothing
of rl_lab is imported here. It writes its logs, as ours does.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import d3rlpy
import h5py
import numpy as np
import torch
from d3rlpy.models.encoders import VectorEncoderFactory
from d3rlpy.optimizers import AdamFactory
from d3rlpy.optimizers.lr_schedulers import CosineAnnealingLRFactory
from d3rlpy.preprocessing import StandardObservationScaler

NETWORK = VectorEncoderFactory([256, 256])


def learner(algo: str, steps: int) -> Any:
    """The algorithm with batches of 256 and networks of 256-256."""
    both = {"actor_encoder_factory": NETWORK, "critic_encoder_factory": NETWORK, "batch_size": 256}
    if algo == "iql":
        both["actor_optim_factory"] = AdamFactory(lr_scheduler_factory=CosineAnnealingLRFactory(T_max=steps))
        return d3rlpy.algos.IQLConfig(value_encoder_factory=NETWORK, expectile=0.7, weight_temp=3.0, **both)
    scaled = {"observation_scaler": StandardObservationScaler()}
    if algo == "td3_bc":
        return d3rlpy.algos.TD3PlusBCConfig(alpha=2.5, **scaled, **both)
    if algo == "cql":
        return d3rlpy.algos.CQLConfig(n_action_samples=10, conservative_weight=5.0, alpha_learning_rate=0.0, **both)
    return d3rlpy.algos.BCConfig(encoder_factory=NETWORK, batch_size=256, learning_rate=3e-4, **scaled)


def main() -> None:
    algo, path, steps, mark, device, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    with h5py.File(path) as file:
        names = ("observations", "actions", "rewards", "terminals", "timeouts")
        data = d3rlpy.dataset.MDPDataset(*(file[name][()] for name in names))
    if rest:
        d3rlpy.seed(int(rest[0]))
    begin = time.time()

    def told(model: Any, epoch: int, step: int) -> None:
        if rest:
            weights = model.impl.policy.state_dict()
            np.savez(Path(rest[1], f"{step}.npz"), **{name: x.numpy(force=True) for name, x in weights.items()})
        print("SPS:", int(step / (time.time() - begin)), flush=True)

    learner(algo, int(steps)).create(device=f"{device}:0").fit(
        data, n_steps=int(steps), n_steps_per_epoch=int(mark), show_progress=False, epoch_callback=told
    )


if __name__ == "__main__":
    main()
