"""Talking with a model, and writing merged weights."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from rl_lab.generate import complete, main, say, stream
from rl_lab.generation import Sampler
from rl_lab.language import (
    Message,
    Prompt,
    Tree,
    add_lora,
    load_model,
    load_tokenizer,
    pack,
    save_model,
    token_logprobs,
)


@pytest.fixture
def sampler(tiny_model: Path) -> Sampler:
    """Of at most 8 tokens."""
    model, tokenizer = load_model(str(tiny_model)), load_tokenizer(str(tiny_model))
    return Sampler(model, tokenizer, "", 8, torch.Generator(), False)


def streamed(sampler: Sampler, prompt: Prompt, temperature: float = 0.0) -> str:
    text: str = sampler.tokenizer.decode(list(stream(sampler, prompt, temperature)))
    return text


def test_a_stream_is_what_a_batch_would_be(sampler: Sampler) -> None:
    for seed in range(5):
        sampler.generator.manual_seed(seed)
        (batch,) = sampler(["hello"], 1, 0.8)[1]
        sampler.generator.manual_seed(seed)
        assert streamed(sampler, "hello", 0.8) == batch != ""


def test_completed_texts_keep_the_order_of_their_prompts(sampler: Sampler) -> None:
    prompts = [chr(ord("a") + i % 26) * (1 + 7 * i % 5) for i in range(40)]  # three batches
    texts, cut = complete(sampler, prompts, 0.0)
    assert texts == [streamed(sampler, prompt) for prompt in prompts]
    assert cut == [len(list(stream(sampler, prompt, 0.0))) == 8 for prompt in prompts]


def test_an_answer_is_shown_as_it_comes_in_whole_letters(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    seen = []

    def tokens() -> object:
        for token in tokenizer("aé!", add_special_tokens=False)["input_ids"]:  # é is two tokens
            yield token
            seen.append(capsys.readouterr().out)

    assert say(tokenizer, tokens()) == "aé!"  # type: ignore[arg-type]
    assert seen == ["a", "", "é", "!"]


def test_a_prompt_is_put_into_the_chat_template_unless_raw(
    sampler: Sampler, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts: list[Prompt] = [[{"role": "user", "content": "hi"}], "hi"]
    for flags, prompt in zip(([], ["--raw"]), prompts, strict=True):
        main([str(tiny_model), "--prompt", "hi", "--temperature", "0", "--max-new-tokens", "8", *flags])
        assert capsys.readouterr().out == streamed(sampler, prompt) + "\n"


def test_a_talk_remembers_what_was_said(
    sampler: Sampler, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Message] = []
    answers = []
    for text in ("one", "two"):
        said.append({"role": "user", "content": text})
        answers.append(streamed(sampler, said))
        said.append({"role": "assistant", "content": answers[-1]})
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    main([str(tiny_model), "--temperature", "0", "--max-new-tokens", "8"])
    assert capsys.readouterr().out == f"> {answers[0]}\n> {answers[1]}\n> \n"


@pytest.mark.parametrize("labels", [0, 1])
def test_merged_weights_are_those_of_the_adapter(tiny_model: Path, tmp_path: Path, labels: int) -> None:
    pytest.importorskip("peft")
    adapted = add_lora(load_model(str(tiny_model), num_labels=labels), rank=4, seed=0)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p.data, std=0.1)
    save_model(tmp_path / "run" / "model", adapted, load_tokenizer(str(tiny_model)))
    main([str(tmp_path / "run"), "--merge", str(tmp_path / "new" / "merged")])
    assert not (tmp_path / "new/merged/adapter_config.json").exists()
    merged, ids = load_model(str(tmp_path / "new/merged"), num_labels=labels), torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-5)
    if not labels:
        packed = pack([Tree([5, 6], ([7, 2],))])
        torch.testing.assert_close(token_logprobs(merged, packed), token_logprobs(adapted, packed))


def test_a_reward_model_without_a_language_models_head_is_one_still(tiny_model: Path, tmp_path: Path) -> None:
    """Where the head is not tied to the embeddings a reward model's files have none to talk with."""
    model, tokenizer = load_model(str(tiny_model), num_labels=1), load_tokenizer(str(tiny_model))
    model.config.tie_word_embeddings = False
    save_model(tmp_path / "scores", model, tokenizer)
    with pytest.raises(SystemExit, match="a reward model, which scores"):
        main([str(tmp_path / "scores"), "--prompt", "hi"])
    main([str(tmp_path / "scores"), "--merge", str(tmp_path / "merged")])
    assert torch.equal(load_model(str(tmp_path / "merged"), num_labels=1).score.weight, model.score.weight)


def test_sampled_answers_follow_from_their_seed(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for seed in ("1", "1", "2"):
        main([str(tiny_model), "--prompt", "hi", "--temperature", "1", "--max-new-tokens", "20", "--seed", seed])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_what_cannot_be_done_is_said(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer, model = load_tokenizer(str(tiny_model)), load_model(str(tiny_model), num_labels=1)
    save_model(tmp_path / "scores", model, tokenizer)
    tokenizer.chat_template = None
    save_model(tmp_path / "plain", load_model(str(tiny_model)), tokenizer)
    for flags, wanted in (
        ([str(tmp_path / "scores"), "--prompt", "hi"], "a reward model"),
        ([str(tmp_path / "plain"), "--prompt", "hi"], "--raw continues"),
        ([str(tiny_model), "--merge", str(tmp_path)], "exists"),
        ([str(tiny_model), "--temperature", "-1"], "--temperature -1.0 must be"),
        ([str(tiny_model), "--max-new-tokens", "0"], "--max-new-tokens 0 must be"),
        ([str(tmp_path), "--prompt", "hi"], "RUN .*: a folder without a model"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{wanted}"):
            main(flags)
