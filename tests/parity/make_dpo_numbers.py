"""Writes dpo_numbers.json: losses and gradients of TRL's own trainers on given log-probabilities, in float64.

    python3.11 -m venv peers
    peers/bin/pip install trl==1.16.0 torch==2.13.0 transformers==5.23.0
    peers/bin/python tests/parity/make_dpo_numbers.py

Its methods run unbound, on a stand-in for the trainer and on a model that answers with these log-probabilities, shared
out evenly over each completion's tokens. One pair at a time, so that its means are the losses of pairs.

    sigmoid, ipo, hinge, robust, apo_zero, apo_down    DPOTrainer._compute_loss
    conservative                                       the same, loss_type aot: on one pair it is this loss
    simpo                                              CPOTrainer.cpo_loss
    orpo                                               ORPOTrainer.get_batch_loss_metrics; the likelihood term is given
    kto                                                KTOTrainer._compute_loss, on the whole batch

TRL has no TDPO.
"""

from __future__ import annotations

import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
import trl
from torch import Tensor
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

HERE = Path(__file__).resolve().parent
PAIRS, PROMPT = 6, 2
SETTINGS = {"beta": 0.3, "label_smoothing": 0.15, "gamma": 0.7, "orpo_lambda": 0.25}
KTO = {"beta": 0.3, "desirable_weight": 1.25, "undesirable_weight": 0.75}
PAIRED = {name: name for name in ("sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down")} | {
    "conservative": "aot"
}


def inputs(seed: int) -> dict[str, list[float]]:
    """Log-probabilities of two kinds of completions, near to each other in policy and reference; their lengths."""
    random = np.random.RandomState(seed)
    found = {}
    for side in ("chosen", "rejected"):
        reference = -random.uniform(5, 30, PAIRS)
        found[f"policy_{side}_logps"] = np.minimum(reference + random.normal(0, 4, PAIRS), -0.5)
        found[f"reference_{side}_logps"] = reference
        found[f"{side}_lengths"] = random.randint(1, 12, PAIRS)
    return {name: np.round(x, 3).tolist() for name, x in found.items()}


def trainer(**attributes: Any) -> SimpleNamespace:
    """A stand-in with what the methods look at."""
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    model = SimpleNamespace(training=True)
    return SimpleNamespace(
        accelerator=accelerator, model=model, aux_loss_enabled=False, precompute_ref_logps=True, _tp_size=1,
        _total_train_tokens=0, _metrics=defaultdict(lambda: defaultdict(list)), **attributes,
    )  # fmt: skip


def tokens(sums: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities per token after PROMPT tokens, and the mask of completions, prompt included."""
    mask = torch.arange(PROMPT + int(lengths.max())) >= PROMPT
    mask = mask & (torch.arange(len(mask)) < PROMPT + lengths[:, None])
    return mask[:, 1:] * (sums / lengths)[:, None], mask.long()


def outputs(log_probs: Tensor) -> SimpleNamespace:
    """A model's answer; what only the logged metrics read is zero."""
    zeros = torch.zeros_like(log_probs)
    return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def paired(loss_type: str, policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
    """DPOTrainer's loss of one pair, (2,) each."""
    log_probs, mask = tokens(policy, lengths)
    batch = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    batch |= {"ref_chosen_logps": reference[:1], "ref_rejected_logps": reference[1:]}
    this = trainer(
        beta=SETTINGS["beta"], label_smoothing=SETTINGS["label_smoothing"], loss_types=[loss_type], loss_weights=[1.0],
        ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False,
    )  # fmt: skip
    return DPOTrainer._compute_loss(this, lambda **_: outputs(log_probs), batch, False)


def simpo(policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
    this = trainer(
        loss_type="simpo", alpha=0.0, label_smoothing=0.0, beta=SETTINGS["beta"], simpo_gamma=SETTINGS["gamma"]
    )
    return CPOTrainer.cpo_loss(this, *(policy / lengths).chunk(2))[0].squeeze()


def orpo(policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
    """Its likelihood term is of all tokens with the prompt's; here it is given: the completion's average."""
    this = trainer(beta=SETTINGS["orpo_lambda"])
    chosen, rejected = (policy / lengths).chunk(2)
    this.concatenated_forward = lambda *_: (chosen, rejected, chosen, rejected, -chosen.squeeze())
    this.odds_ratio_loss = partial(ORPOTrainer.odds_ratio_loss, this)
    return ORPOTrainer.get_batch_loss_metrics(this, None, {})[0]


def kto(given: dict[str, list[float]], mismatched: dict[str, list[float]], labels: list[bool]) -> dict[str, Any]:
    """The mean loss of the batch, its gradient, and the reference point that was logged."""
    policy = torch.tensor(given["policy_chosen_logps"], requires_grad=True)
    log_probs, mask = tokens(policy, torch.tensor(given["chosen_lengths"]))
    kl_log_probs, kl_mask = tokens(
        torch.tensor(mismatched["policy_chosen_logps"]), torch.tensor(mismatched["chosen_lengths"])
    )
    batch = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask, "label": torch.tensor(labels)}
    batch |= {"KL_input_ids": kl_mask, "KL_attention_mask": kl_mask, "KL_completion_mask": kl_mask}
    batch |= {"ref_logps": torch.tensor(given["reference_chosen_logps"])}
    batch |= {"ref_KL_logps": torch.tensor(mismatched["reference_chosen_logps"])}
    this = trainer(calculate_KL=True, loss_type="kto", **KTO)
    this._compute_kl_logps = partial(KTOTrainer._compute_kl_logps, this)

    def model(input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return outputs(kl_log_probs if input_ids is batch["KL_input_ids"] else log_probs)

    loss = KTOTrainer._compute_loss(this, model, batch, False)
    loss.backward()
    return {"loss": loss.item(), "gradient": policy.grad.tolist(), "z_0": this._metrics["train"]["kl"][0]}


def main() -> None:
    torch.set_default_dtype(torch.float64)
    given = inputs(0)
    losses = {name: partial(paired, loss_type) for name, loss_type in PAIRED.items()} | {"simpo": simpo, "orpo": orpo}
    sides = [
        torch.tensor([given[name.format(side)] for side in ("chosen", "rejected")], dtype=torch.float64).T
        for name in ("policy_{}_logps", "reference_{}_logps", "{}_lengths")
    ]
    found: dict[str, Any] = {"settings": SETTINGS, "inputs": given, "losses": {}, "gradients": {}}
    for name, loss in losses.items():
        policy = sides[0].clone().requires_grad_()
        values = torch.stack([loss(*pair) for pair in zip(policy, *sides[1:], strict=True)])
        values.sum().backward()
        found["losses"][name], found["gradients"][name] = values.tolist(), policy.grad.T.tolist()
    labels, mismatched = [True, False, False, True, True, False], inputs(17)  # its mean log-ratio is above 0
    found["kto"] = {"settings": KTO, "labels": labels, "mismatched": mismatched, **kto(given, mismatched, labels)}
    found["versions"] = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    (HERE / "dpo_numbers.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
