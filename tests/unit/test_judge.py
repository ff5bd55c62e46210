"""Judges with planted truths, and an endpoint that misbehaves."""

from __future__ import annotations

import math
import re
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_lab.endpoint import Endpoint
from rl_lab.language import (
    Prompt,
    Tree,
    add_lora,
    encode_completion,
    encode_prompt,
    load_model,
    load_tokenizer,
    save_model,
)
from rl_lab.preference.judge import (
    EndpointJudge,
    LocalJudge,
    RewardJudge,
    Verifier,
    audit,
    longer,
    rate,
    require_room,
)
from rl_lab.preference_data import Example, plain
from rl_lab.preference_metrics import wilson
from rl_lab.reward_models import RewardModel

KEY = "sk-secret-0123456789"
PROMPTS: list[Prompt] = ["p", [{"role": "user", "content": "q"}], "r", "s"]


def test_a_verifier_gives_the_planted_rate() -> None:
    def reward(prompts: list[Prompt], completions: list[str]) -> list[float]:
        assert prompts == PROMPTS
        return [float(text) for text in completions]

    verdicts = Verifier(reward, "number")(PROMPTS, ["3", "1", "2", "5"], ["2", "1", "4", "-1"])
    assert verdicts.wins == [1.0, 0.5, 0.0, 1.0]
    assert verdicts.agreement is None
    assert rate(verdicts.wins) == (0.625, *wilson(2.5, 4), 4)
    with pytest.raises(ValueError, match="number: a score is not a number"):
        Verifier(reward, "number")(PROMPTS, ["3", "nan", "2", "5"], ["2", "1", "4", "-1"])


def test_length_is_audited_by_hand() -> None:
    pairs = [Example("p", x, (), "") for x in (("aaa", "b"), ("aa", "bbb"), ("aa", "bb"), ("aaaa", "b"))]
    accuracy, verdicts = audit(longer(), pairs)
    assert verdicts.wins == [1.0, 0.0, 0.5, 1.0] and accuracy.mean == 0.625 and accuracy.number == 4


def test_a_conversation_is_one_text() -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert plain(said) == "User: a\n\nAssistant: b\n\nUser: c"
    assert plain(said[:1]) == plain("a") == "a"


@pytest.mark.parametrize("adapter", [False, True])
def test_a_reward_model_scores_the_end_of_each_answer(tiny_model: Path, tmp_path: Path, adapter: bool) -> None:
    """Packed side by side as alone, and with the head that was saved; transformers' own forward pass would read the
    token before the end, as it takes the end for padding."""
    tokenizer, model = load_tokenizer(str(tiny_model)), load_model(str(tiny_model), num_labels=1)
    model = add_lora(model, 2, 0) if adapter else model
    head = [p for name, p in model.named_parameters() if "score" in name and p.requires_grad]
    torch.nn.init.normal_(head[0].data)
    save_model(tmp_path / "model", model, tokenizer)
    first, second = ["yes", "", "longer answer", "x"], ["no", "maybe", "short", "x"]
    judge = RewardJudge(str(tmp_path))
    torch.testing.assert_close(judge.reward.model.score.weight, head[0])
    verdicts = judge(PROMPTS, first, second)
    for i, prompt in enumerate(PROMPTS):
        rows = [encode_prompt(tokenizer, prompt) + encode_completion(tokenizer, x[i]) for x in (first, second)]
        ends = [judge.reward.model.base_model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
        a, b = (float((x @ head[0].T).detach()) for x in ends)
        assert verdicts.probabilities[i] == pytest.approx(1 / (1 + math.exp(b - a)), abs=1e-5)
        assert verdicts.wins[i] == (0.5 if i == 3 else float(a > b))
    assert verdicts.agreement is None


def test_equal_answers_have_equal_scores(tiny_model: Path, tmp_path: Path) -> None:
    """Wherever they stand among a prompt's: rounding differs by the place, and equal answers are no contrast."""
    model = load_model(str(tiny_model), num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    save_model(tmp_path / "model", model, load_tokenizer(str(tiny_model)))
    reward = RewardModel(str(tmp_path), "--reward")
    texts = ["yes", "no", "yes", "perhaps", "yes", "no", "yes", "yes"]
    a, b, *_ = found = reward(["p"] * 8 + ["q"], [*texts, "yes"])
    assert found[:8] == [{"yes": a, "no": b}.get(text, found[3]) for text in texts] and len({a, b, found[3]}) == 3
    alone = [reward([prompt], [text])[0] for prompt, text in zip(["p"] * 8 + ["q"], [*texts, "yes"], strict=True)]
    assert found == pytest.approx(alone, abs=1e-5)


def test_judges_of_the_wrong_kind_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    with pytest.raises(ValueError, match=r"--judge .*tiny: no reward model; llm:.*tiny asks"):
        RewardJudge(str(tiny_model))
    save_model(tmp_path / "one", load_model(str(tiny_model), num_labels=1), tokenizer)
    with pytest.raises(ValueError, match="a reward model; without llm: it judges"):
        LocalJudge(str(tmp_path / "one"))
    save_model(tmp_path / "three", load_model(str(tiny_model), num_labels=3), tokenizer)
    with pytest.raises(ValueError, match="its head does not give one score"):
        RewardJudge(str(tmp_path / "three"))
    (tmp_path / "steps").mkdir()
    save_model(tmp_path / "steps" / "model", load_model(str(tiny_model), num_labels=1), tokenizer)
    (tmp_path / "steps" / "config.json").write_text('{"args": {"kind": "process"}}')
    for name in ("steps", "steps/model"):
        with pytest.raises(ValueError, match="a model of steps, which gives an answer no score"):
            RewardJudge(str(tmp_path / name))
    tokenizer.chat_template = None
    save_model(tmp_path / "plain", load_model(str(tiny_model)), tokenizer)
    with pytest.raises(ValueError, match=r"--judge llm:.*: its tokenizer needs a chat template"):
        LocalJudge(str(tmp_path / "plain"))


def test_a_local_judge_reads_the_logits_of_both_letters_in_both_orders(tiny_model: Path) -> None:
    judge, tokenizer, model = LocalJudge(str(tiny_model)), load_tokenizer(str(tiny_model)), load_model(str(tiny_model))
    first, second = ["yes", "", "longer answer", "x"], ["no", "maybe", "short", "x"]
    verdicts = judge(PROMPTS, first, second)
    a, b = (tokenizer(x, add_special_tokens=False)["input_ids"][0] for x in "AB")
    for i, prompt in enumerate(PROMPTS):
        leads = []
        for x, y in ((first[i], second[i]), (second[i], first[i])):
            text = (
                "Below are a conversation and two answers that continue it. Decide which answer is better: more "
                "helpful, more correct and\nless harmful. Neither the order of the answers nor their length matters."
                f"\n\n[Conversation]\n{plain(prompt)}\n\n[Answer A]\n{x}\n\n[Answer B]\n{y}\n\n[End]\nWhich answer is "
                "better? Reply with A or B and nothing else."
            )
            tokens = encode_prompt(tokenizer, [{"role": "user", "content": text}])
            scores = model(torch.tensor([tokens])).logits[0, -1]
            leads.append((scores[a] - scores[b]).item())
        agreed = (leads[0] > 0) == (leads[1] < 0)
        assert verdicts.agreed[i] == agreed
        assert verdicts.wins[i] == (float(leads[0] > 0) if agreed else 0.5)
        wanted = (1 / (1 + math.exp(-leads[0])) + 1 / (1 + math.exp(leads[1]))) / 2
        assert verdicts.probabilities[i] == pytest.approx(wanted, abs=1e-5)


def test_texts_beyond_the_model_are_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"--judge llm:.*: 2 of 2 texts are longer than its 2048 tokens"):
        LocalJudge(str(tiny_model))(["p"], ["x" * 2000], ["y"])
    require_room(load_model(str(tiny_model)), [Tree([1] * 2000, ())], "x", 48)


def ask(endpoint: Any, **settings: Any) -> EndpointJudge:
    return EndpointJudge(Endpoint(endpoint.url, "some-model", "--judge", **({"pause": 0.01} | settings)))


def answers_of(question: str) -> tuple[str, str]:
    found = re.search(r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\n\[End\]", question, re.DOTALL)
    assert found
    return found[1], found[2]


def test_an_endpoint_is_asked_in_both_orders_and_metered(endpoint: Any) -> None:
    def answer(question: str, _: Any) -> str:
        a, b = answers_of(question)
        return "**Tie.**" if a == b else "A" if len(a) > len(b) else " b\n"

    endpoint.answer = answer
    verdicts = ask(endpoint)(PROMPTS, ["aaa", "a", "aa", "x"], ["b", "bbb", "b", "x"])
    assert verdicts.wins == [1.0, 0.0, 1.0, 0.5]
    assert verdicts.agreed == [True] * 4 and verdicts.agreement == 1.0
    assert verdicts.usage == Counter(requests=8, prompt_tokens=800, completion_tokens=16)
    request = endpoint.requests[0]
    assert request["path"] == "/v1/chat/completions" and "Authorization" not in request["headers"]
    assert request["body"]["model"] == "some-model" and request["body"]["temperature"] == 0


def test_a_judge_that_goes_by_the_place_is_found_out(endpoint: Any) -> None:
    verdicts = ask(endpoint)(PROMPTS, ["1", "2", "3", "4"], ["a", "b", "c", "d"])  # always A
    assert verdicts.wins == [0.5] * 4 and verdicts.agreement == 0.0


def test_a_tie_and_a_win_do_not_agree(endpoint: Any) -> None:
    endpoint.answer = lambda question, _: "A" if answers_of(question)[0] == "1" else "tie"
    verdicts = ask(endpoint)(["p"], ["1"], ["2"])
    assert verdicts.wins == [0.5] and verdicts.agreed == [False]


def test_failing_and_busy_servers_are_asked_again(endpoint: Any) -> None:
    failures = iter([(500, {}, b"oops"), (429, {"Retry-After": "1"}, b""), (503, {"Retry-After": "Monday"}, b"")])
    endpoint.answer = lambda *_: next(failures, "A")
    begin = time.monotonic()
    text, usage = Endpoint(endpoint.url, "m", "--judge", pause=0.01)("hi")
    assert text == "A" and usage["requests"] == 1 and len(endpoint.requests) == 4
    assert 1.0 <= time.monotonic() - begin < 3.0  # as Retry-After says


def test_the_wait_doubles(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("rl_lab.endpoint.time.sleep", waits.append)
    endpoint.answer = lambda *_: (429, {"Retry-After": "1000"}, b"") if len(endpoint.requests) == 3 else (500, {}, b"")
    with pytest.raises(ValueError, match=r"--judge m at http\S+: no reply in 5 tries; status 500"):
        Endpoint(endpoint.url, "m", "--judge")("hi")
    assert waits == [1, 2, 60, 8]


def test_servers_that_are_down_or_silent_are_given_up(endpoint: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ValueError, match=r"--judge m at http\S+/v1: no reply in 2 tries; .*refused"):
        Endpoint(down, "m", "--judge", tries=2, pause=0.01)("hi")
    endpoint.answer = lambda *_: time.sleep(0.5) or "A"  # type: ignore[func-returns-value]
    with pytest.raises(ValueError, match=r"no reply in 2 tries; .*timed out"):
        Endpoint(endpoint.url, "m", "--judge", tries=2, pause=0.01, timeout=0.1)("hi")
    with pytest.raises(ValueError, match="no reply in 2 tries"):  # and by the judge, whose other questions are dropped
        ask(endpoint, tries=2, timeout=0.1)(["p"] * 100, ["a"] * 100, ["b"] * 100)
    assert len(endpoint.requests) < 60


@pytest.mark.parametrize(
    ("answer", "wanted", "requests"),
    [
        ((404, {}, b'{"error": "no such\n\x1bmodel"}'), r'status 404: \{"error": "no such model"\}', 1),
        ((302, {"Location": "http://127.0.0.1:1/"}, b""), "status 302", 1),
        ((200, {}, b"<html>"), "its reply is no JSON; the base address often ends in /v1", 1),
        ((200, {}, b'{"choices": []}'), "its reply is no chat completion", 1),
        ((200, {}, b"[1]"), "its reply is no chat completion", 1),
        ((200, {"Content-Length": "99"}, b"cut"), "no reply in 5 tries", 5),
    ],
)
def test_what_no_second_try_would_mend_is_said_at_once(endpoint: Any, answer: Any, wanted: str, requests: int) -> None:
    endpoint.answer = lambda *_: answer
    with pytest.raises(ValueError, match=wanted):
        Endpoint(endpoint.url, "m", "--judge", pause=0.01, timeout=0.3)("hi")
    assert len(endpoint.requests) == requests


def test_a_model_that_refuses_the_options_is_asked_without(endpoint: Any) -> None:
    endpoint.answer = lambda _, request: (400, {}, b"max_tokens") if "max_tokens" in request["body"] else "A"
    client = Endpoint(endpoint.url, "m", "--judge")
    assert client("hi")[0] == client("ho")[0] == "A" and len(endpoint.requests) == 3
    endpoint.answer = lambda *_: (400, {}, b"no")
    with pytest.raises(ValueError, match="status 400: no"):
        client("hi")


def test_nonsense_is_asked_again_and_counted(endpoint: Any) -> None:
    """Of ten pairs one gets nonsense once, another one always in one order: it is a tie without agreement."""
    seen: Counter[str] = Counter()

    def answer(question: str, _: Any) -> str:
        a, _ = answers_of(question)
        seen[a] += 1
        if (a == "first0" and seen[a] == 1) or a == "first1":
            return "I think that Answer A is better."
        return "A" if a.startswith("first") else "B"

    endpoint.answer = answer
    verdicts = ask(endpoint)(["p"] * 10, [f"first{i}" for i in range(10)], ["second"] * 10)
    assert verdicts.wins == [1.0, 0.5] + [1.0] * 8
    assert verdicts.agreed == [True, None] + [True] * 8 and verdicts.agreement == 1.0
    assert verdicts.usage is not None
    assert {name: verdicts.usage[name] for name in ("requests", "nonsense", "unparsable")} == {
        "requests": 22,
        "nonsense": 3,
        "unparsable": 1,
    }
    endpoint.answer = lambda *_: "Hm."
    with pytest.raises(ValueError, match=r"8 of 8 replies were neither A, B nor tie, such as 'Hm\.'; a model that"):
        ask(endpoint)(PROMPTS, ["1"] * 4, ["2"] * 4)


def test_replies_without_usage_are_counted(endpoint: Any) -> None:
    endpoint.answer = lambda *_: (200, {}, b'{"choices": [{"message": {"content": "A"}}]}')
    assert ask(endpoint)(["p"], ["1"], ["2"]).usage == Counter(requests=2, unmetered=2)


@pytest.mark.parametrize("variable", ["RL_LAB_JUDGE_KEY", "OPENAI_API_KEY"])
def test_the_key_is_sent_and_never_told(endpoint: Any, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    monkeypatch.setenv(variable, KEY + "\n")
    judge = ask(endpoint, tries=2)
    assert KEY not in repr(judge.endpoint) and KEY not in judge.name
    endpoint.answer = lambda *_: "A"
    judge.endpoint("hi")
    assert endpoint.requests[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    for answer in (
        (401, {}, f"wrong key: Bearer {KEY}".encode()),
        (500, {}, ("x" * 350 + KEY).encode()),
        f"Your key is {KEY}",
    ):
        endpoint.answer = lambda *_, answer=answer: answer
        with pytest.raises(ValueError) as error:
            judge(["p"], ["1"], ["2"])
        assert "secret" not in str(error.value) and error.value.__cause__ is None
        assert error.value.__suppress_context__ or error.value.__context__ is None  # so no traceback has it


def test_what_no_address_or_key_can_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("http://user:p4ss@host/v1", "ftp://host", "https://", "https://host/v1?key=p4ss"):
        with pytest.raises(ValueError, match="--judge: a base address such as") as error:
            Endpoint(url, "m", "--judge")
        assert "p4ss" not in str(error.value)
    for key in ("two words", "l\u00e4cherlich"):
        monkeypatch.setenv("RL_LAB_JUDGE_KEY", key)
        with pytest.raises(ValueError, match=r"^the key in RL_LAB_JUDGE_KEY has characters that no key has$"):
            Endpoint("https://host/v1", "m", "--judge")
