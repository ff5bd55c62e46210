"""Loading language models, packing trees of tokens, and sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rl_lab.generation import Sampler, completions, generate
from rl_lab.language import (
    Tree,
    add_lora,
    encode_completion,
    encode_prompt,
    load_model,
    load_tokenizer,
    locate,
    longest_text,
    micro_batches,
    pack,
    save_model,
    token_logprobs,
)
from rl_lab.reward_models import require_room

TREES = [Tree([5, 6, 7, 8], ([9, 10, 2], [11, 2])), Tree([20, 21], ([22], [9, 10, 2], [5, 6, 7, 8, 2]))]
ALIKE = [Tree([5, 6, 7], ([9, 10, 2], [11, 2])), Tree([5, 6], ([22], [9, 2])), Tree([5, 6, 8, 9], ([5, 6, 7, 8, 2],))]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return load_model(str(tiny_model))


def alone(model: Any, prompt: list[int], tokens: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probabilities of a completion by the plain forward pass of a single sequence."""
    logits = model(torch.tensor([prompt + tokens])).logits[0] / temperature
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None]).squeeze(1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("trees", [TREES, ALIKE, ALIKE[:1]], ids=["apart", "alike", "one"])
def test_packed_trees_equal_single_sequences_and_their_gradients(
    model: Any, trees: list[Tree], temperature: float
) -> None:
    """Neither does a branch see its sibling, nor a tree its neighbour, nor is a token shifted by one."""
    packed = pack(trees)
    ours = token_logprobs(model, packed, temperature)
    peers = torch.cat([alone(model, tree.prompt, x, temperature) for tree in trees for x in tree.branches])
    torch.testing.assert_close(ours, peers, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, len(ours))
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad((weights * x).sum(), parameters) for x in (ours, peers)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_sums_and_lengths_are_of_branches() -> None:
    packed = pack(TREES)
    assert packed.lengths.tolist() == [3, 2, 1, 3, 5]
    assert packed.sums(torch.arange(14.0)).tolist() == [3, 7, 5, 21, 55]
    assert [packed.inputs["input_ids"][0, i].item() for i in packed.ends] == [2, 2, 22, 2, 2]


def test_micro_batches_keep_the_order_and_the_bound() -> None:
    trees = [Tree([1] * n, ([2],)) for n in (3, 4, 9, 1, 1)]  # of 4, 5, 10, 2 and 2 tokens
    assert micro_batches(trees, 9) == [[0, 1], [2], [3, 4]]


@pytest.mark.parametrize(
    "prompts", [[[5, 6, 7, 8, 9, 10], [20, 21], [30]], [[5, 6, 7, 8, 9], [5, 6], [5, 6, 8]], [[5, 6, 7], [5, 6, 7]]]
)
def test_greedy_generation_equals_transformers_own(model: Any, prompts: list[list[int]]) -> None:
    """Padding, positions and cache are right, whatever else is in the batch."""
    rollout = generate(model, prompts, 2, 12, 0.0, [2], torch.Generator())
    ours = completions(rollout)
    for i, prompt in enumerate(prompts):
        wanted = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12, do_sample=False
        )[0, len(prompt) :].tolist()
        assert ours[2 * i] == ours[2 * i + 1] == wanted


def test_a_completion_ends_with_the_first_of_all_its_ends(model: Any) -> None:
    rollout = generate(model, [[5, 6, 7]], 64, 20, 2.0, [2, *range(40, 80)], torch.Generator().manual_seed(0))
    found = completions(rollout)
    ended = rollout["terminated"].tolist()
    assert any(ended) and rollout["truncated"].tolist() == [not x for x in ended]
    for tokens, end in zip(found, ended, strict=True):
        last = [token for token in tokens if token == 2 or 40 <= token < 80]
        assert last == (tokens[-1:] if end else [])
        assert end or len(tokens) == 20
    assert not rollout["actions"][~rollout["alive"]].any()


def test_samples_follow_the_model_at_the_temperature(model: Any) -> None:
    """Frequencies of the first token against the softmax of the tempered logits, and of the second given the first."""
    rollout = generate(model, [[5, 6], [7]], 4000, 2, 0.5, [2], torch.Generator().manual_seed(1))
    first = rollout["actions"][0, :4000]
    wanted = (model(torch.tensor([[5, 6]])).logits[0, -1] / 0.5).softmax(0)
    error = (torch.bincount(first, minlength=len(wanted)) / 4000 - wanted).abs()
    assert (error <= 5 * (wanted * (1 - wanted) / 4000).sqrt() + 1e-3).all()
    common = int(wanted.argmax()) if int(wanted.argmax()) != 2 else int(wanted.topk(2).indices[1])
    second = rollout["actions"][1, :4000][first == common]
    wanted = (model(torch.tensor([[5, 6, common]])).logits[0, -1] / 0.5).softmax(0)
    error = (torch.bincount(second, minlength=len(wanted)) / len(second) - wanted).abs()
    assert (error <= 5 * (wanted * (1 - wanted) / len(second)).sqrt() + 1e-3).all()


def test_log_probabilities_of_samples_are_those_they_were_drawn_with(model: Any) -> None:
    """Sampled with a cache and padding, scored without: the ratio of a first update is 1."""
    prompts = [[5, 6, 7, 8], [20, 21]]
    rollout = generate(model, prompts, 3, 6, 1.0, [2], torch.Generator().manual_seed(0))
    groups = completions(rollout)
    trees = [Tree(prompt, tuple(groups[3 * i : 3 * i + 3])) for i, prompt in enumerate(prompts)]
    scored = token_logprobs(model, pack(trees))
    plain = torch.cat([alone(model, tree.prompt, x) for tree in trees for x in tree.branches])
    torch.testing.assert_close(scored, plain, rtol=1e-5, atol=1e-5)


def test_messages_by_the_template_text_as_it_is(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    messages = [{"role": "user", "content": "hi"}]
    assert (
        tokenizer.decode(encode_prompt(tokenizer, messages))
        == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")) == "hi"
    assert encode_prompt(tokenizer, "") == [1]  # something must come before the first token
    assert encode_completion(tokenizer, "ok")[-1] == tokenizer.eos_token_id


def test_a_folder_is_found_from_everywhere(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter remembers its model's folder, and may be loaded elsewhere."""
    monkeypatch.chdir(tiny_model.parent)
    assert Path(load_model(tiny_model.name).name_or_path) == tiny_model.resolve()


def test_a_model_without_all_its_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_model / "model.safetensors")
    lost = weights.popitem()[0]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    with pytest.raises(ValueError, match=f"its files lack {lost}"):
        load_model(str(tmp_path))


def test_an_adapter_changes_nothing_at_first_and_is_merged_when_loaded(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    packed = pack(TREES)
    before = token_logprobs(load_model(str(tiny_model)), packed)
    adapted = add_lora(load_model(str(tiny_model)), rank=4, seed=0)
    torch.testing.assert_close(token_logprobs(adapted, packed), before, rtol=0, atol=0)
    for name, p in adapted.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(p.data, std=0.1)
    after = token_logprobs(adapted, packed)
    save_model(tmp_path / "model", adapted, load_tokenizer(str(tiny_model)))
    loaded = load_model(str(tmp_path))  # a run folder
    torch.testing.assert_close(token_logprobs(loaded, packed), after, rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("smollm2-135m", "rl_lab.models smollm2-135m"), ("empty", "folder without a model"), ("no/such", "local folder")],
)
def test_a_model_that_is_not_there_is_named(
    name: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RL_LAB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    name = str(tmp_path / name) if name == "empty" else name
    with pytest.raises(ValueError, match=f"--model {name}.*{wanted}"):
        load_model(locate(name))


def test_a_tokenizer_without_an_end_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    with pytest.raises(ValueError, match="no EOS token"):
        load_tokenizer(str(tmp_path))


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("kind", "flags", "refused"),
    [
        ("Qwen2", {"intermediate_size": 64, "num_key_value_heads": 2}, False),
        ("Gemma2", {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}, False),  # adds its masks
        ("GPTNeoX", {"intermediate_size": 64}, False),
        ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}, True),  # a place's distance is a bias
        ("Bloom", {"n_layer": 2, "n_head": 4}, True),
    ],
)
def test_a_model_whose_branches_would_see_each_other_is_refused(
    kind: str, flags: dict[str, Any], refused: bool, tmp_path: Path
) -> None:
    """Guards attention that adds the mask it is given, to which true and false are 1 and 0, and biases by places."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**SMALL | flags | {"initializer_range": 0.3})
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}ForCausalLM")(config)
    made.save_pretrained(tmp_path)
    if refused:
        with pytest.raises(ValueError, match=f"^--model .*: {kind}ForCausalLM cannot be trained here: its attention"):
            load_model(str(tmp_path))
        return
    model = load_model(str(tmp_path))
    found = token_logprobs(model, pack(TREES))
    peers = torch.cat([alone(model, tree.prompt, x) for tree in TREES for x in tree.branches])
    torch.testing.assert_close(found, peers, rtol=1e-4, atol=1e-5)


def test_texts_end_within_a_sliding_window(tmp_path: Path, tiny_model: Path) -> None:
    """Beyond it a packed branch would see what one alone does not; sampled, the model has its window."""
    transformers = pytest.importorskip("transformers")
    flags = {"intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": 8, "initializer_range": 0.3}
    torch.manual_seed(0)
    transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL | flags)).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert longest_text(model) == 8 and longest_text(model, packed=False) == model.config.max_position_embeddings
    for length, same in ((7, True), (17, False)):
        prompt = [*range(3, 3 + length)]
        apart = token_logprobs(model, pack([Tree(prompt, ([4],))])) - alone(model, prompt, [4])
        assert (float(apart.detach().abs()) < 1e-5) == same
    with pytest.raises(ValueError, match=r"^x: 1 of 2 texts are longer than its 8 tokens"):
        require_room(model, [Tree([1] * 7, ([2],)), Tree([1] * 8, ([2],))], "x")
    assert longest_text(load_model(str(tiny_model))) == 2048


def test_a_prompt_without_room_for_its_completion_is_refused(tiny_model: Path) -> None:
    sample = Sampler(load_model(str(tiny_model)), load_tokenizer(str(tiny_model)), "", 8, torch.Generator(), False)
    sample.room = 16
    assert len(sample(["12345678"], 1, 0.0)[1]) == 1
    told = "^9 tokens of a prompt and 8 of its completion are more than the 16 that the model was made for$"
    with pytest.raises(ValueError, match=told):
        sample(["1", "123456789"], 1, 0.0)


def test_an_adapter_that_would_be_unpickled_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match=r"an adapter without adapter_model\.safetensors, which alone is read"):
        load_model(str(tmp_path))


def test_a_config_without_a_cache_still_samples(model: Any) -> None:
    """As of models that were saved after training with checkpointed activations."""
    prompts = [[5, 6, 7, 8], [5, 6, 9]]
    wanted = generate(model, prompts, 2, 4, 0.0, [2], torch.Generator())
    model.config.use_cache = False
    try:
        found = generate(model, prompts, 2, 4, 0.0, [2], torch.Generator())
    finally:
        model.config.use_cache = True
    assert torch.equal(found["actions"], wanted["actions"])


def test_logits_that_are_not_finite_are_told(model: Any) -> None:
    head = model.get_output_embeddings().weight.data
    kept = head.clone()
    head.fill_(float("nan"))
    try:
        with pytest.raises(FloatingPointError, match="the model's logits are not finite"):
            generate(model, [[5, 6]], 2, 4, 1.0, [2], torch.Generator())
    finally:
        head.copy_(kept)
