"""Talking with a model, and writing merged weights."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from rl_lab.generate import complete, end_ids, main, say, stream
from rl_lab.generation import completions, generate
from rl_lab.language import Tree, add_lora, encode_prompt, load_model, load_tokenizer, pack, save_model, token_logprobs


def test_a_stream_is_what_a_batch_would_be(tiny_model: Path) -> None:
    model, prompt = load_model(str(tiny_model)), [5, 6, 7]
    (batch,) = completions(generate(model, [prompt], 1, 20, 0.8, [2], torch.Generator().manual_seed(3)))
    streamed = list(stream(model, prompt, 20, 0.8, [2], torch.Generator().manual_seed(3)))
    assert streamed == [token for token in batch if token != 2] and streamed


def test_completed_texts_keep_the_order_of_their_prompts(tiny_model: Path) -> None:
    model, tokenizer = load_model(str(tiny_model)), load_tokenizer(str(tiny_model))
    prompts = [[5 + i] * (1 + 7 * i % 5) for i in range(40)]  # three batches
    texts, cut = complete(model, tokenizer, prompts, 6, 0.0, torch.Generator())
    for prompt, text, was_cut in zip(prompts, texts, cut, strict=True):
        alone = list(stream(model, prompt, 6, 0.0, [2], torch.Generator()))
        assert text == tokenizer.decode(alone) and was_cut == (len(alone) == 6)


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
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load_model(str(tiny_model)), load_tokenizer(str(tiny_model))
    ends = end_ids(model, tokenizer)
    for flags, prompt in (([], [{"role": "user", "content": "hi"}]), (["--raw"], "hi")):
        main([str(tiny_model), "--prompt", "hi", "--temperature", "0", "--max-new-tokens", "8", *flags])
        wanted = list(stream(model, encode_prompt(tokenizer, prompt), 8, 0.0, ends, torch.Generator()))
        assert capsys.readouterr().out == tokenizer.decode(wanted) + "\n"


def test_a_talk_remembers_what_was_said(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, said, answers = load_model(str(tiny_model)), load_tokenizer(str(tiny_model)), [], []
    for text in ("one", "two"):
        said.append({"role": "user", "content": text})
        tokens = list(stream(model, encode_prompt(tokenizer, said), 8, 0.0, [2], torch.Generator()))
        answers.append(tokenizer.decode(tokens))
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
