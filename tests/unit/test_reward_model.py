"""Reward models: losses, where rewards are read, data, gradients over micro-batches and ranks, resuming, adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from rl_lab import checkpoint, cli, language_training
from rl_lab.cli import Stopped
from rl_lab.language import (
    Tree,
    add_lora,
    encode_completion,
    encode_prompt,
    load_model,
    load_tokenizer,
    pack,
    rewards,
    save_model,
    score,
)
from rl_lab.language_training import LanguageRun, open_model
from rl_lab.preference import reward_model
from rl_lab.preference.reward_model import (
    Args,
    Item,
    aggregate,
    chain,
    load,
    outcome_loss,
    parts,
    predict,
    process_loss,
    rewards_of,
    targets_of,
    train,
)
from rl_lab.preference_data import place, read

PAIRS = [
    {
        "prompt": f"question {i}",
        "chosen": "a" * (i % 5 + 1),
        "rejected": "b" * (i % 3 + 1),
        "margin": (None, 1.5)[i == 7],
    }
    for i in range(40)
]
STEPS = [
    {
        "prompt": f"sum {i}",
        "completions": ["one", "xx", "three"][: i % 3 + 1],
        "labels": [True, False, False][: i % 3 + 1],
    }
    for i in range(40)
]
TREES = [Tree([5, 6, 7, 8], ([9, 10, 2], [11, 2])), Tree([20, 21], ([22, 2], [9, 10, 2]))]


@pytest.fixture
def arguments(tiny_model: Path, tmp_path: Path) -> Callable[..., Args]:
    """Makes the flags of a short run on the tiny model, of either kind."""

    def make(kind: str = "outcome", **flags: Any) -> Args:
        rows = PAIRS if kind == "outcome" else STEPS
        (data := tmp_path / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        short = {
            "steps": 4,
            "batch_size": 12,
            "warmup": 1,
            "learning_rate": 1e-3,
            "checkpoint_every": 2,
            "eval_every": 2,
        }
        process: dict[str, Any] = {} if kind == "outcome" else {"kind": "process", "aggregation": "min"}
        where = {"model": str(tiny_model), "data": str(data), "runs_dir": tmp_path / "runs", "device": "cpu"}
        return Args(**{**where, **short, **process, "holdout": (0.7, 1.0), "train": (0.0, 0.7), "bf16": False, **flags})

    return make


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    model = load_model(str(tiny_model), num_labels=1)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    return model


def test_outcome_loss_by_hand() -> None:
    """-log sigmoid(2 - 1 - 0.5) + 0.1 (2 + 1)^2 = 0.474077 + 0.9, and of equal rewards without either log 2."""
    chosen, rejected = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0])
    found = outcome_loss(chosen, rejected, torch.tensor([0.5, 0.0]), centring=0.1)
    torch.testing.assert_close(found, torch.tensor([0.474077 + 0.9, 0.693147 + 0.4]))


def test_outcome_gradient_in_closed_form() -> None:
    """dL/dr_c = -sigmoid(-(r_c - r_d - m)) + 2 eta (r_c + r_d); r_d has the opposite first term."""
    c, d = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()
    m, eta = torch.linspace(0, 2, 9, dtype=torch.float64), 0.3
    found = torch.autograd.grad(outcome_loss(c, d, m, eta).sum(), (c, d))
    push, pull = torch.sigmoid(-(c - d - m)), 2 * eta * (c + d)
    torch.testing.assert_close(found, (-push + pull, push + pull), rtol=1e-12, atol=1e-12)


def test_a_margin_asks_for_more() -> None:
    """A larger margin is a larger loss and a stronger push; its wrong sign would reward pairs that are hardly apart."""
    chosen = torch.tensor([1.0, 1.0], requires_grad=True)
    losses = outcome_loss(chosen, torch.zeros(2), torch.tensor([0.0, 2.0]))
    (slope,) = torch.autograd.grad(losses.sum(), chosen)
    assert losses[1] > losses[0] and slope[1] < slope[0] < 0


def test_process_loss_and_aggregations_by_hand() -> None:
    """-log sigmoid(1) = 0.313262, -log sigmoid(-1) = 1.313262."""
    values = torch.tensor([1.0, 1.0, 0.0])
    found = process_loss(values, torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(found, torch.tensor([0.313262, 1.313262, 0.693147]))
    p = torch.tensor([0.5, 0.4, 0.9])
    assert [aggregate(p, how) for how in ("min", "product", "last")] == pytest.approx([0.4, 0.18, 0.9])


def alone(model: Any, tokens: list[int], place: int = -1) -> Tensor:
    """The head's output by the plain forward pass of a single sequence."""
    hidden = model.model(torch.tensor([tokens])).last_hidden_state[0, place]
    return hidden @ model.score.weight[0]


def test_a_reward_is_read_at_the_last_real_token(model: Any) -> None:
    """It is EOS, which is also the pad token and stands in prompts: transformers' own pooling reads the one before."""
    trees = [Tree([5, 2, 6, 2, 7], ([9, 10, 2], [11, 2]))]
    found = rewards(model, pack(trees))
    torch.testing.assert_close(found[0], alone(model, [5, 2, 6, 2, 7, 9, 10, 2]), rtol=1e-5, atol=1e-5)
    for wrong in (
        model(torch.tensor([[5, 2, 6, 2, 7, 9, 10, 2]])).logits[0, 0],
        alone(model, [5, 2, 6, 2, 7, 9, 10, 2, 2]),
    ):
        assert (found[0] - wrong).abs() > 0.01


def test_rewards_alone_and_packed_are_the_same(model: Any) -> None:
    singles = torch.stack([alone(model, tree.prompt + x) for tree in TREES for x in tree.branches])
    torch.testing.assert_close(rewards(model, pack(TREES)), singles, rtol=1e-5, atol=1e-5)
    for most in (1, 8, 1000):
        found = score(model, TREES, most)
        assert [len(x) for x in found] == [2, 2]
        assert [x for pair in found for x in pair] == pytest.approx(singles.tolist(), rel=1e-5, abs=1e-5)


def test_training_and_use_end_with_the_same_token(model: Any, arguments: Callable[..., Args]) -> None:
    args, tokenizer = arguments(), load_tokenizer(arguments().model)
    items = load(args, tokenizer)[0]
    assert all(branch[-1] == tokenizer.eos_token_id for item in items for branch in item.tree.branches)
    used = [
        Tree(
            encode_prompt(tokenizer, x["prompt"]),
            tuple(encode_completion(tokenizer, x[y]) for y in ("chosen", "rejected")),
        )
        for x in PAIRS
        if 0.0 <= place(x["prompt"]) < 0.7
    ]
    found = torch.stack(predict(model, items, args))
    torch.testing.assert_close(found, torch.tensor(score(model, used)), rtol=1e-4, atol=1e-5)


def test_margins_of_lines_and_of_the_flag(arguments: Callable[..., Args]) -> None:
    args = arguments(margin=0.25, holdout=(0.9, 1.0), train=(0.0, 0.9))
    wanted = [1.5 if i == 7 else 0.25 for i in range(40) if place(f"question {i}") < 0.9]
    assert [item.targets.item() for item in load(args, load_tokenizer(args.model))[0]] == wanted


@pytest.mark.parametrize("margin", [-1, "much"])
def test_a_margin_that_is_none_is_refused(margin: object, tmp_path: Path) -> None:
    (data := tmp_path / "pairs.jsonl").write_text(json.dumps({**PAIRS[0], "margin": margin}))
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: margin .* must be a finite number"):
        read(str(data), "pairs")


def test_steps_follow_each_other_in_one_branch() -> None:
    tree, back = chain(Tree([5, 6], ([9, 10, 2], [11, 2], [12, 13, 2])), [7, 8])
    assert tree == Tree([5, 6], ([9, 10, 7, 8, 11, 7, 8, 12, 13, 2],))
    assert back.tolist() == [6, 3, 0]
    assert [tree.branches[0][-1 - n] for n in back] == [8, 8, 2]


def test_labels_are_predicted_at_separators(model: Any, arguments: Callable[..., Args]) -> None:
    """And each sees the steps before it: what a plain forward pass gives at the line breaks, and at EOS."""
    args, tokenizer = arguments("process"), load_tokenizer(arguments().model)
    items = load(args, tokenizer)[0]
    assert {tuple(item.targets.tolist()) for item in items} == {(1,), (1, 0), (1, 0, 0)}
    found = iter(rewards_of(model, items))
    for item in items:
        text = tokenizer.decode(item.tree.branches[0])
        tokens = item.tree.prompt + item.tree.branches[0]
        (line_break,) = tokenizer("\n")["input_ids"]
        places = [i for i, token in enumerate(tokens) if token in (line_break, 2)]
        assert text.count("\n") == len(item.targets) - 1 and len(places) == len(item.targets)
        for i in places:
            torch.testing.assert_close(next(found), alone(model, tokens, i), rtol=1e-4, atol=1e-5)


def gradient(args: Args, batch: list[Item]) -> tuple[dict[str, Tensor], dict[str, float]]:
    model, tokenizer = open_model(args, num_labels=1)
    run = LanguageRun(args, "reward_model", model, tokenizer, args.generators(0)[0])
    rank, size = reward_model.ranks()
    metrics = run.learn(parts(model, batch[rank::size], args), len(targets_of(batch)))
    run.logs.close()
    return {name: p.grad for name, p in run.trained.items()}, metrics


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_the_gradient_does_not_depend_on_how_a_batch_is_split(
    kind: str, arguments: Callable[..., Args], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither over micro-batches nor over two ranks, one of which has a solution fewer."""

    def flags(name: str, micro_tokens: int = 1024) -> Args:
        return arguments(kind, micro_tokens=micro_tokens, max_grad_norm=1e9, runs_dir=tmp_path / name)

    batch = load(flags("whole"), load_tokenizer(flags("whole").model))[0][:7]
    whole, metrics = gradient(flags("whole"), batch)
    for most in (1, 60):
        found, again = gradient(flags(str(most), most), batch)
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
        assert again == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    parts = []
    monkeypatch.setattr(language_training, "summed", lambda _: None)
    for rank in range(2):
        monkeypatch.setattr(reward_model, "ranks", lambda rank=rank: (rank, 2))
        parts.append(gradient(flags(f"rank {rank}"), batch))
    torch.testing.assert_close(
        {name: parts[0][0][name] + x for name, x in parts[1][0].items()}, whole, rtol=1e-4, atol=1e-5
    )
    for name in metrics.keys() - {"losses/grad_norm"}:
        assert parts[0][1][name] + parts[1][1][name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-5)


def record(folder: Path) -> dict[str, Any]:
    """What a run leaves, but wall times and speeds."""
    events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "charts/SPS"]
    state = checkpoint.load(folder)["state"]
    return {
        "events": {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags},
        "params": {name: x.numpy().tobytes() for name, x in state["params"].items()},
        "evaluation": json.loads((folder / "evaluation.json").read_text()) | {"seconds": None},
        "model": {path.name: path.read_bytes() for path in (folder / "model").iterdir()},
    }


@pytest.mark.parametrize("flags", [{}, {"lora_rank": 2}], ids=["whole", "lora"])
def test_a_resumed_run_is_the_run(flags: dict[str, Any], arguments: Callable[..., Args], tmp_path: Path) -> None:
    """Stopped in the second epoch of 21 pairs."""
    whole = train(arguments(**flags, runs_dir=tmp_path / "whole")).logs.folders[0]
    with pytest.raises(Stopped):
        train(arguments(**flags, runs_dir=tmp_path / "parts", stop_at=2))
    (folder,) = (tmp_path / "parts").iterdir()
    train(cli.parse(["--resume", str(folder)], Args))  # type: ignore[arg-type]
    found, wanted = record(folder), record(whole)
    assert [step for step, _ in wanted["events"]["eval/accuracy"]] == [2, 4]
    assert found == wanted


def test_the_trained_head_is_loaded_again(arguments: Callable[..., Args], tiny_model: Path, tmp_path: Path) -> None:
    """Also with adapters, which are saved without the model; and from a model that adapters made."""
    pytest.importorskip("peft")
    start = add_lora(load_model(str(tiny_model)), 2, 0)
    for name, p in start.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p.data, std=0.3, generator=torch.Generator().manual_seed(0))
    (tmp_path / "sft").mkdir()
    save_model(tmp_path / "sft" / "model", start, load_tokenizer(str(tiny_model)))
    before = score(load_model(str(tiny_model), num_labels=1), TREES)
    for base in (tiny_model, tmp_path / "sft"):
        for rank in (0, 2):
            folder = tmp_path / f"{base.name} {rank}"
            run = train(arguments(model=str(base), lora_rank=rank, runs_dir=folder, eval_every=0))
            trained = score(run.model, TREES)
            loaded = score(load_model(str(run.logs.folders[0]), num_labels=1), TREES)
            torch.testing.assert_close(torch.tensor(loaded), torch.tensor(trained), rtol=1e-4, atol=1e-5)
            assert (torch.tensor(loaded) - torch.tensor(before)).abs().max() > 0.01


def test_a_new_head_is_small_and_of_the_seed(arguments: Callable[..., Args]) -> None:
    heads = [open_model(arguments(seed=seed), num_labels=1)[0].score.weight for seed in (1, 1, 2)]
    assert heads[0].equal(heads[1]) and not heads[0].equal(heads[2])
    assert 0.6 / 33 < heads[0].std() < 1.4 / 33


def test_what_a_run_says(arguments: Callable[..., Args]) -> None:
    run = train(arguments("process", steps=2))
    config = json.loads((run.logs.folders[0] / "config.json").read_text())
    assert config["args"]["aggregation"] == "min" and config["args"]["kind"] == "process"
    assert config["examples"] == {"train": 27, "holdout": 13}
    report = json.loads((run.logs.folders[0] / "evaluation.json").read_text())
    assert report["solutions"] == 13 and 0 <= report["solution_accuracy"]["mean"] <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train": (0.5, 1.2)}, r"--train \(0.5, 1.2\) must be two numbers with 0 <= low < high <= 1"),
        ({"holdout": (0.9, 0.8)}, r"--holdout \(0.9, 0.8\) must be two numbers"),
        ({"holdout": (0.5, 1.0)}, r"--holdout \(0.5, 1.0\) must be apart from --train"),
        ({"margin": -1.0}, "--margin -1.0 must be finite and 0 or more"),
        ({"aggregation": "min"}, "--aggregation min must be left out"),
        ({"kind": "process"}, "--aggregation None must be min, product or last"),
        ({"kind": "process", "aggregation": "min", "centring": 0.1}, "--centring 0.1 must be left out"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    flags: dict[str, Any], message: str, arguments: Callable[..., Args]
) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(**{"kind": "outcome"} | flags) if "kind" not in flags else Args(**vars(arguments()) | flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"max_tokens": 3},
            r"--train .* must be a share with examples to use: 21 of 21 examples have more than 3 tokens",
        ),
        ({"holdout": (0.999, 1.0)}, r"--holdout .* must be a share with examples to use: 0 of 0"),
        ({"kind": "process", "aggregation": "min"}, r"outcome.jsonl:1: has .*; lacks completions and labels"),
    ],
)
def test_data_that_do_not_fit_are_refused(flags: dict[str, Any], message: str, arguments: Callable[..., Args]) -> None:
    args = Args(**vars(arguments()) | flags)
    with pytest.raises(ValueError, match=message):
        train(args)
