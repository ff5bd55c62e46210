"""DPO's training: what is scored, what is logged, what is learned from, and what a run leaves and goes on from."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from rl_lab import checkpoint, reference
from rl_lab.cli import Stopped, parse
from rl_lab.language import Tree, encode_completion, encode_prompt, load_model, load_tokenizer, pack, save_model
from rl_lab.language_training import drawn
from rl_lab.preference import dpo, kto, reward_model, sft
from rl_lab.preference.dpo import LOSSES, NEED_KLS, REFERENCE_FREE
from rl_lab.preference_data import place
from rl_lab.reference import branch_logprobs, cached_logprobs
from tests.language_runs import (
    assert_equal_gradients,
    command,
    evaluation,
    folder,
    gradients,
    kl_alone,
    labelled,
    left,
    log_sigmoid,
    logp_alone,
    pairs,
    scalars,
    trained,
    write,
)

# Settings of each loss that are not the defaults.
SETTINGS: dict[str, dict[str, float]] = {
    "robust": {"label_smoothing": 0.1}, "conservative": {"label_smoothing": 0.1}, "simpo": {"beta": 2.0, "gamma": 0.3},
    "orpo": {"orpo_lambda": 0.25}, "tdpo2": {"alpha": 0.7},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RL_LAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "pairs.jsonl", pairs())


@pytest.fixture(scope="module")
def other(tiny_model: Path) -> Any:
    """Another model: the tiny one with all weights off a little."""
    model = load_model(str(tiny_model)).requires_grad_(False)
    random = torch.Generator().manual_seed(7)
    for p in model.parameters():
        p += 0.1 * torch.randn(p.shape, generator=random)
    return model


@pytest.fixture
def other_reference(monkeypatch: pytest.MonkeyPatch, other: Any) -> None:
    """Makes `other` the reference, so that log-ratios and KLs are not zero at the start."""
    monkeypatch.setattr(dpo, "cached_logprobs", lambda _, *rest: cached_logprobs(other, *rest))
    monkeypatch.setattr(dpo, "copy", SimpleNamespace(deepcopy=lambda _: other))


def tree_of(tiny_model: Path, row: dict[str, Any]) -> Tree:
    tokenizer = load_tokenizer(str(tiny_model))
    answers = tuple(encode_completion(tokenizer, row[side]) for side in ("chosen", "rejected"))
    return Tree(encode_prompt(tokenizer, row["prompt"]), answers)


def learned_from(tiny_model: Path, rows: list[dict[str, Any]], count: int) -> list[Tree]:
    """The pairs of the first batch, from the data's lines."""
    mine = [row for row in rows if place(row["prompt"]) < 0.9]
    return [tree_of(tiny_model, mine[i]) for i in drawn(len(mine), count, 1, 0)]


# L(h_w, h_l, p_w, p_l, D_l - D_w), with h and p sums over tokens of lengths n_w, n_l; l(x) = -log sigmoid(x).
def log_odds(p: float) -> float:
    return p - math.log(1 - math.exp(p))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


ORACLE: dict[str, Callable[..., float]] = {
    "sigmoid": lambda h, p, n, d: -log_sigmoid(0.1 * (h[0] - h[1])),
    "ipo": lambda h, p, n, d: (h[0] / n[0] - h[1] / n[1] - 5) ** 2,
    "hinge": lambda h, p, n, d: max(0.0, 1 - 0.1 * (h[0] - h[1])),
    "robust": lambda h, p, n, d: (
        (-0.9 * log_sigmoid(0.1 * (h[0] - h[1])) + 0.1 * log_sigmoid(-0.1 * (h[0] - h[1]))) / 0.8
    ),
    "conservative": lambda h, p, n, d: (
        -0.9 * log_sigmoid(0.1 * (h[0] - h[1])) - 0.1 * log_sigmoid(-0.1 * (h[0] - h[1]))
    ),
    "apo_zero": lambda h, p, n, d: -sigmoid(0.1 * h[0]) + sigmoid(0.1 * h[1]),
    "apo_down": lambda h, p, n, d: sigmoid(0.1 * h[0]) - sigmoid(0.1 * (h[0] - h[1])),
    "simpo": lambda h, p, n, d: -log_sigmoid(2 * (p[0] / n[0] - p[1] / n[1]) - 0.3),
    "orpo": lambda h, p, n, d: (
        -p[0] / n[0] - 0.25 * log_sigmoid(log_odds(p[0] / n[0]) - log_odds(p[1] / n[1]))
    ),
    "tdpo1": lambda h, p, n, d: -log_sigmoid(0.1 * (h[0] - h[1] - (d[1] - d[0]))),
    "tdpo2": lambda h, p, n, d: -log_sigmoid(0.1 * (h[0] - h[1] - 0.7 * (d[1] - d[0]))),
}  # fmt: skip


@pytest.mark.usefixtures("other_reference")
@pytest.mark.parametrize("loss", LOSSES)
def test_the_first_loss_is_that_of_plain_sequences(loss: str, tiny_model: Path, other: Any, data: Path) -> None:
    """Guards the completion mask, the shift by one, EOS, padding that is EOS, the reference's rows, the loss's name.

    Each completion alone behind its prompt, all its tokens and EOS scored, none of the prompt.
    """
    log = scalars(folder(trained(dpo, tiny_model, data, loss=loss, micro_tokens=40, **SETTINGS.get(loss, {}))))
    model, expected, logps = load_model(str(tiny_model)), [], []
    for prompt, branches in learned_from(tiny_model, pairs(), 4):
        assert all(tokens[-1] == 2 and tokens.count(2) == 1 for tokens in branches) and 2 not in prompt
        p = [logp_alone(model, prompt, tokens) for tokens in branches]
        h = [x - logp_alone(other, prompt, tokens) for x, tokens in zip(p, branches, strict=True)]
        d = [kl_alone(model, other, prompt, tokens) for tokens in branches]
        assert abs(h[0]) > 1e-3 and d[0] > 1e-3
        expected.append(ORACLE[loss](h, p, [len(tokens) for tokens in branches], d))
        logps.append(p)
    assert log["losses/loss"] == pytest.approx([sum(expected) / 4], rel=2e-5, abs=1e-6)
    for side, name in enumerate(("chosen", "rejected")):
        assert log[f"logps/{name}"] == pytest.approx([sum(p[side] for p in logps) / 4], rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        *((name, math.log(2)) for name in ("sigmoid", "robust", "conservative", "tdpo1", "tdpo2")),
        *(("ipo", 25.0), ("hinge", 1.0), ("apo_zero", 0.0), ("apo_down", 0.0)),
    ],
)
def test_the_first_step_is_at_the_reference(loss: str, value: float, tiny_model: Path, data: Path) -> None:
    """Guards dropout, another reference, and rows out of order: the margin is 0."""
    log = scalars(folder(trained(dpo, tiny_model, data, loss=loss, **SETTINGS.get(loss, {}))))
    assert log["losses/loss"] == pytest.approx([value], rel=1e-6, abs=1e-6)
    for name in ("margin", "chosen", "rejected"):
        assert log[f"rewards/{name}"] == pytest.approx([0.0], abs=1e-6)
    assert abs(log["logps/chosen"][0] - log["logps/rejected"][0]) > 0.1


def test_a_model_s_own_dropout_is_off(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """Or the margin at the start would not be 0, and half of the attention missing."""
    shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    log = scalars(folder(trained(dpo, tmp_path / "model", data)))
    assert log["rewards/margin"] == pytest.approx([0.0], abs=1e-6)
    assert log["logps/chosen"] == pytest.approx(scalars(folder(trained(dpo, tiny_model, data)))["logps/chosen"])


@pytest.mark.usefixtures("other_reference")
@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_do_not_change_the_gradient(loss: str, tiny_model: Path, data: Path) -> None:
    """Guards means of micro-batches' means, which weigh the pairs of a small one more."""
    found = [
        gradients(trained(dpo, tiny_model, data, loss=loss, batch_size=5, micro_tokens=most, **SETTINGS.get(loss, {})))
        for most in (1, 64, 100_000)
    ]
    for other in found[1:]:
        assert_equal_gradients(found[0], other, 1e-6)


def test_the_gradient_is_that_of_the_mean_over_pairs(tiny_model: Path, data: Path) -> None:
    """Against autograd over plain sequences: detached losses, wrong signs and wrong counts have another one."""
    ours = gradients(trained(dpo, tiny_model, data))
    model = load_model(str(tiny_model))
    total = torch.zeros(())
    for prompt, branches in learned_from(tiny_model, pairs(), 4):
        logps = []
        for tokens in branches:
            scores = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(1)
            logps.append(scores.gather(1, torch.tensor(tokens)[:, None]).sum())
        h = [x - x.detach() for x in logps]
        total = total - torch.nn.functional.logsigmoid(0.1 * (h[0] - h[1])) / 4
    total.backward()
    assert_equal_gradients({name: p.grad for name, p in model.named_parameters()}, ours, 1e-5)


@pytest.mark.usefixtures("other_reference")
def test_the_evaluation_is_of_all_held_out_pairs(tiny_model: Path, other: Any, tmp_path: Path) -> None:
    """And of no other; by the model as it is at the end."""
    rows = pairs(80)
    run = trained(dpo, tiny_model, write(tmp_path / "many.jsonl", rows), eval_examples=99, eval_every=1)
    held_out = [tree_of(tiny_model, row) for row in rows if place(row["prompt"]) >= 0.9]
    logps, margins, longer = [], [], []
    for prompt, branches in held_out:
        p = [logp_alone(run.model, prompt, tokens) for tokens in branches]
        h = [x - logp_alone(other, prompt, tokens) for x, tokens in zip(p, branches, strict=True)]
        logps.append(p[0])
        margins.append(0.1 * (h[0] - h[1]))
        longer.append((len(branches[0]) > len(branches[1])) + (len(branches[0]) == len(branches[1])) / 2)
    report, count = evaluation(folder(run)), len(held_out)
    assert report["pairs"] == count >= 5
    assert report["accuracy"]["mean"] == pytest.approx(sum(x > 0 for x in margins) / count)
    assert 0 < report["accuracy"]["mean"] < 1
    assert report["length_baseline"]["mean"] == pytest.approx(sum(longer) / count)
    assert report["rewards_margin"] == pytest.approx(sum(margins) / count, rel=1e-4)
    assert report["logps_chosen"] == pytest.approx(sum(logps) / count, rel=1e-5)
    log = scalars(folder(run))
    assert log["eval/loss"] == pytest.approx([report["losses_loss"]])
    assert log["eval/accuracy"] == pytest.approx([report["accuracy"]["mean"]])


def test_chosen_that_is_rejected_has_no_gradient(tiny_model: Path, tmp_path: Path) -> None:
    rows = [row | {"rejected": row["chosen"]} for row in pairs()]
    run = trained(dpo, tiny_model, write(tmp_path / "same.jsonl", rows))
    assert max(float(x.abs().max()) for x in gradients(run).values()) < 1e-6
    assert scalars(folder(run))["rewards/accuracy"] == [0.5]


def test_an_adapter_alone_is_trained_and_its_start_is_the_reference(tiny_model: Path, data: Path) -> None:
    """Guards base weights that move, and a reference that moves with them (trl#1340)."""
    peft = pytest.importorskip("peft")
    run = trained(dpo, tiny_model, data, lora_rank=4, steps=3, learning_rate=1e-2, decay=False)
    log, base = scalars(folder(run)), load_model(str(tiny_model)).state_dict()
    assert log["losses/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert log["rewards/margin"][0] == pytest.approx(0.0, abs=1e-6) and abs(log["rewards/margin"][2]) > 1e-3
    assert run.trained and all("lora_" in name for name in run.trained)
    kept = {name.replace("base_layer.", ""): x for name, x in run.model.get_base_model().state_dict().items()}
    for name, x in base.items():
        assert torch.equal(kept[name], x), name

    saved = peft.AutoPeftModelForCausalLM.from_pretrained(folder(run) / "model").eval()
    merged = load_model(str(folder(run)))
    tree = learned_from(tiny_model, pairs(), 1)
    ours, peers, plain = (branch_logprobs(x, tree, 1, False) for x in (run.model, saved, merged))
    torch.testing.assert_close(ours, peers, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert (ours - branch_logprobs(load_model(str(tiny_model)), tree, 1, False)).abs().max() > 1e-2


def test_transformers_loads_what_is_saved(tiny_model: Path, data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run = trained(dpo, tiny_model, data, learning_rate=1e-3)
    where = folder(run) / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    for name, x in load_model(str(tiny_model)).state_dict().items():
        assert torch.equal(model.state_dict()[name], run.model.state_dict()[name])
        assert not torch.equal(model.state_dict()[name], x), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    assert tokenizer("abc")["input_ids"] == load_tokenizer(str(tiny_model))("abc")["input_ids"]
    assert tokenizer.chat_template == load_tokenizer(str(tiny_model)).chat_template


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many pairs' log-probabilities under the reference were computed, by call."""
    calls: list[int] = []

    def counted(model: Any, trees: list[Tree], *rest: Any) -> Any:
        calls.append(len(trees))
        return branch_logprobs(model, trees, *rest)

    monkeypatch.setattr(reference, "branch_logprobs", counted)
    yield calls


def test_the_references_numbers_are_kept_and_used(
    tiny_model: Path, data: Path, tmp_path: Path, computed: list[int]
) -> None:
    """A second run computes none, and learns from what the file says: here a planted margin."""
    count = len(pairs())
    trained(dpo, tiny_model, data, eval_examples=99)
    assert computed == [count]
    (path,) = (tmp_path / "cache" / "reference").iterdir()
    logps = checkpoint.load_tensors(path)[0]["logps"]
    checkpoint.save_tensors(path, {"logps": logps - torch.tensor([3.0, 1.0]).repeat(count)}, {})
    log = scalars(folder(trained(dpo, tiny_model, data, eval_examples=99)))
    assert computed == [count]
    assert log["rewards/margin"] == pytest.approx([0.2], abs=1e-6) and log["rewards/chosen"] == pytest.approx([0.3])


def test_the_references_numbers_are_of_this_model_and_these_data(
    tiny_model: Path, other: Any, data: Path, tmp_path: Path, computed: list[int]
) -> None:
    """Guards numbers of another model, of other settings or pairs, and those of a damaged file (trl#1962)."""
    trained(dpo, tiny_model, data)
    (path,) = (tmp_path / "cache" / "reference").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    log = scalars(folder(trained(dpo, tiny_model, data)))
    assert len(computed) == 2 and log["rewards/margin"] == pytest.approx([0.0], abs=1e-6)

    changed = tmp_path / "changed"
    load_tokenizer(str(tiny_model)).save_pretrained(changed)
    other.save_pretrained(changed)
    log = scalars(folder(trained(dpo, changed, data)))
    assert len(computed) == 3 and log["rewards/margin"] == pytest.approx([0.0], abs=1e-6)

    config = json.loads((changed / "config.json").read_text())
    config["rms_norm_eps"] = 1e-2  # the weights are the same
    (changed / "config.json").write_text(json.dumps(config))
    log = scalars(folder(trained(dpo, changed, data)))
    assert len(computed) == 4 and log["rewards/margin"] == pytest.approx([0.0], abs=1e-6)

    rows = [row | {"chosen": row["chosen"] + "a"} for row in pairs()]  # as many, of the same prompts
    log = scalars(folder(trained(dpo, tiny_model, write(tmp_path / "more.jsonl", rows))))
    assert len(computed) == 5 and log["rewards/margin"] == pytest.approx([0.0], abs=1e-6)
    trained(dpo, tiny_model, data, micro_tokens=100)
    assert len(computed) == 6
    trained(dpo, tiny_model, data)
    assert len(computed) == 6
    trained(dpo, tiny_model, data, bf16=True)
    assert len(computed) == 7


@pytest.mark.parametrize("loss", sorted(REFERENCE_FREE))
def test_without_a_reference_none_is_computed(
    loss: str, tiny_model: Path, data: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpo, "copy", None)
    trained(dpo, tiny_model, data, loss=loss, **({"beta": 2.0} if loss == "simpo" else {}))
    assert computed == []


@pytest.mark.parametrize("loss", sorted(NEED_KLS))
def test_the_reference_of_the_kls_does_not_move(
    loss: str, tiny_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards a reference that is the model itself, whose KLs would always be zero."""
    seen: list[float] = []
    whole = dpo.sequential_kls

    def watched(*arguments: Any) -> Any:
        seen.append(float(whole(*arguments).detach().max()))
        return whole(*arguments)

    monkeypatch.setattr(dpo, "sequential_kls", watched)
    trained(dpo, tiny_model, data, loss=loss, steps=2, learning_rate=1e-2)
    assert seen[0] == pytest.approx(0.0, abs=1e-5) and seen[-1] > 1e-3


def test_sequential_kls_by_hand() -> None:
    """Three tokens in two branches, a vocabulary of two: KL((1/2, 1/2) || (p, 1 - p)) = -log(4 p (1 - p)) / 2."""
    packed = pack([Tree([5, 6], ([7, 2], [2]))])
    policy = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]]).log() + 3.0  # logits are free up to a constant
    found = dpo.sequential_kls(policy, torch.zeros(3, 2), packed)
    assert found.tolist() == pytest.approx([-math.log(0.75) / 2, -math.log(0.36) / 2], abs=1e-6)


def test_bfloat16_is_near_and_keeps_the_weights_in_float32(tiny_model: Path, data: Path) -> None:
    run = trained(dpo, tiny_model, data, bf16=True)
    log, plain = scalars(folder(run)), scalars(folder(trained(dpo, tiny_model, data)))
    assert log["losses/loss"] == pytest.approx([math.log(2)], abs=1e-6)  # the reference's are rounded alike
    assert log["logps/chosen"] == pytest.approx(plain["logps/chosen"], rel=2e-2)
    assert log["logps/chosen"] != plain["logps/chosen"]
    assert {p.dtype for p in run.trained.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"loss": "sigmoid", "label_smoothing": 0.1},
            r"--label-smoothing 0.1 must be in \(0, 0.5\) if --loss takes it, else 0",
        ),
        ({"loss": "robust"}, r"--label-smoothing 0.0 must be in \(0, 0.5\) if --loss takes it"),
        ({"loss": "simpo"}, "--beta 0.1 must be finite, above 0 or simpo's 1"),
        ({"loss": "orpo", "beta": 0.3}, "--beta 0.3 must be left out: --loss orpo does not take it"),
        ({"steps": 10, "warmup": 10}, "--warmup 10 must be below --steps 10"),
        ({"max_tokens": 100_000}, "--max-tokens 100000 must be at most 2048, what --model .* was made for"),
        ({"loss": "orpo", "gamma": 1.0}, "--gamma 1.0 must be left out"),
        ({"loss": "tdpo1", "alpha": 0.3}, "--alpha 0.3 must be left out"),
        ({"loss": "simpo", "beta": 2.0, "orpo_lambda": 0.3}, "--orpo-lambda 0.3 must be left out"),
        ({"loss": "robust", "label_smoothing": 0.5}, r"--label-smoothing 0.5 must be in \(0, 0.5\)"),
        ({"beta": 0.0}, "--beta 0.0 must be finite, above 0"),
        ({"train": (0.0, 0.95)}, r"--holdout \(0.9, 1.0\) must be apart from --train"),
        ({"max_tokens": 3}, "--train .* 24 of 24 examples have more than 3 tokens"),
        ({"holdout": (0.9, 0.900001)}, "--holdout .* a share with examples to use"),
    ],
)
def test_flags_that_are_refused(flags: dict[str, Any], message: str, tiny_model: Path, data: Path) -> None:
    rows = 24 if flags.get("max_tokens") != 3 else sum(place(row["prompt"]) < 0.9 for row in pairs())
    with pytest.raises(ValueError, match=message.replace("24", str(rows))):
        trained(dpo, tiny_model, data, **flags)


@pytest.mark.parametrize(("method", "rows"), [(dpo, pairs), (sft, pairs), (kto, labelled), (reward_model, pairs)])
def test_a_run_goes_on_with_what_it_began_with(method: ModuleType, rows: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Guards against a file that was written anew under the same name."""
    data = write(tmp_path / "data.jsonl", rows())
    with pytest.raises(Stopped):
        trained(method, tiny_model, data, steps=3, stop_at=1)
    (run,) = (folder for child in tmp_path.iterdir() if child.is_dir() for folder in child.glob("*__1__*"))
    write(data, [row | {name: row[name] + "a" for name in ("chosen", "completion") if name in row} for row in rows()])
    args = parse(["--resume", str(run)], method.Args)
    with pytest.raises(
        ValueError, match=r"--resume .*: its model, prompts or examples are not those that it began with"
    ):
        method.train(args)
    moved = write(tmp_path / "moved.jsonl", rows())
    args = parse(["--resume", str(run), "--data", str(moved)], method.Args)
    assert method.train(args).iteration == 3


def test_an_adapter_goes_on_with_its_model(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """Guards against weights beneath it that were written anew under the same name, and a reference of these."""
    changed = tmp_path / "model"
    shutil.copytree(tiny_model, changed)
    with pytest.raises(Stopped):
        trained(dpo, changed, data, steps=3, stop_at=1, lora_rank=2)
    (run,) = (folder for child in data.parent.iterdir() if child.is_dir() for folder in child.glob("model__dpo__1__*"))
    model = load_model(str(changed))
    model.model.embed_tokens.weight.data[5] += 1
    model.save_pretrained(changed)
    args = parse(["--resume", str(run)], dpo.Args)
    with pytest.raises(ValueError, match=r"--resume .*: its model, prompts or examples are not those"):
        dpo.train(args)


def test_adapters_of_all_seeds_share_the_reference(tiny_model: Path, data: Path, computed: list[int]) -> None:
    """At its start an adapter changes nothing, whatever its random half."""
    for seed, rank in ((1, 2), (2, 2), (1, 4)):
        log = scalars(folder(trained(dpo, tiny_model, data, seed=seed, lora_rank=rank)))
        assert len(computed) == 1 and log["rewards/margin"] == pytest.approx([0.0], abs=1e-6)


@pytest.mark.parametrize(("method", "rows"), [(kto, labelled), (sft, pairs), (reward_model, pairs)])
def test_the_others_compute_in_bfloat16_too(method: ModuleType, rows: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Guards a flag without effect, and a reference in another precision than the policy."""
    data = write(tmp_path / "rows.jsonl", rows())
    runs = [trained(method, tiny_model, data, bf16=bf16) for bf16 in (True, False)]
    rough, exact = (gradients(run) for run in runs)
    assert_equal_gradients(rough, exact, 0.1)
    assert any(not torch.equal(x, exact[name]) for name, x in rough.items())
    if method is kto:
        assert scalars(folder(runs[0]))["losses/kl"] == [0.0]


def test_a_reward_model_is_no_start(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """Guards against a policy from the body of one, whose head is left aside."""
    scores = tmp_path / "scores"
    save_model(scores, load_model(str(tiny_model), num_labels=1), load_tokenizer(str(tiny_model)))
    with pytest.raises(ValueError, match=f"--model {scores}: a reward model, which scores answers and gives none"):
        trained(dpo, scores, data)


def test_a_weight_that_is_no_number_is_refused(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """Before a run folder is made, and also one that the first batch does not meet."""
    model = load_model(str(tiny_model))
    model.model.embed_tokens.weight.data[77, 0] = math.nan
    save_model(tmp_path / "torn", model, load_tokenizer(str(tiny_model)))
    with pytest.raises(ValueError, match=r"--model .*torn: model.embed_tokens.weight has numbers that are not finite"):
        trained(dpo, tmp_path / "torn", data)


def test_pairs_that_are_too_long_are_left_out_whole(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards truncation: an answer cut off, or one that is empty afterwards and divides by zero (trl#6548)."""
    rows = pairs()
    mine = [i for i, row in enumerate(rows) if place(row["prompt"]) < 0.9]
    for i in mine[:-2]:
        rows[i]["rejected"] = "z" * 70
    run = trained(dpo, tiny_model, write(tmp_path / "long.jsonl", rows), loss="ipo", batch_size=2)
    assert f"--train: {len(mine) - 2} of {len(mine)} examples have more than 64 tokens" in capsys.readouterr().out
    model, (a, b) = load_model(str(tiny_model)), mine[-2:]
    tokenizer = load_tokenizer(str(tiny_model))
    logps = [
        logp_alone(model, encode_prompt(tokenizer, rows[i]["prompt"]), encode_completion(tokenizer, rows[i]["chosen"]))
        for i in (a, b)
    ]
    assert scalars(folder(run))["logps/chosen"] == pytest.approx([sum(logps) / 2], rel=1e-5)


LONGER = ["--steps", 4, "--batch-size", 3, "--warmup", 2, "--no-bf16", "--eval-every", 2, "--device", "cpu"]


@pytest.mark.parametrize("more", [[], ["--lora-rank", 2], ["--loss", "tdpo2"]], ids=["all", "adapter", "KLs"])
def test_a_stopped_run_goes_on_bit_for_bit(
    more: list[object], tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, optimizer, order of the data, schedule, logs and evaluation are those of the run that was not."""
    flags = ["--model", tiny_model, "--data", data, "--learning-rate", 1e-3, *LONGER, *more]
    assert command(dpo, monkeypatch, *flags, "--runs-dir", tmp_path / "whole") == 0
    assert command(dpo, monkeypatch, *flags, "--runs-dir", tmp_path / "parts", "--stop-at", 2) == 0
    (whole,), (parts,) = ((tmp_path / name).iterdir() for name in ("whole", "parts"))
    assert not (parts / "model").exists() and checkpoint.load(parts)["run"]["iteration"] == 2
    assert command(dpo, monkeypatch, "--resume", parts) == 0
    assert left(parts) == left(whole)
    assert len(left(whole)["logs"]["losses/loss"]) == 4 and len(left(whole)["logs"]["eval/accuracy"]) == 2
    moments = checkpoint.load(whole)["state"]["moments"]
    assert all(x["step"] == 4 and x["exp_avg_sq"].abs().sum() > 0 for x in moments.values())


def test_the_learning_rate_rises_and_falls(tiny_model: Path, data: Path) -> None:
    log = scalars(folder(trained(dpo, tiny_model, data, steps=6, warmup=2, learning_rate=1.0, max_grad_norm=1e-9)))
    assert log["charts/learning_rate"] == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def preferring(first: str, second: str, path: Path) -> Path:
    """Prompts of random letters, the answer to prefer and the other one, a letter three times each."""
    return write(path, [{"prompt": row["prompt"], "chosen": first * 3, "rejected": second * 3} for row in pairs(40)])


def test_it_learns_what_is_preferred(tiny_model: Path, tmp_path: Path) -> None:
    """On held-out prompts, with a negative control: from the same pairs reversed it learns the opposite."""
    flags = {"steps": 12, "learning_rate": 2e-3, "batch_size": 8, "max_grad_norm": 1.0, "eval_examples": 99}
    found = []
    for first, second in (("a", "b"), ("b", "a")):
        run = trained(dpo, tiny_model, preferring(first, second, tmp_path / f"{first}.jsonl"), **flags)
        report, tokenizer = evaluation(folder(run)), load_tokenizer(str(tiny_model))
        assert report["accuracy"]["mean"] == 1.0 and report["length_baseline"]["mean"] == 0.5
        tree = Tree(encode_prompt(tokenizer, "new"), tuple(encode_completion(tokenizer, x) for x in ("aaa", "bbb")))
        after, before = (branch_logprobs(m, [tree], 1, False) for m in (run.model, load_model(str(tiny_model))))
        found.append(float((after - before) @ torch.tensor([1.0, -1.0])))
    assert found[0] > 1 and found[1] < -1
