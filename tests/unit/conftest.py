"""Data sets small enough to learn from within a test, and a chat endpoint without a model."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import gymnasium as gym
import pytest
import torch

from rl_lab.endpoint import KEYS
from rl_lab.offline import Dataset


@pytest.fixture
def lucky(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Dataset]:
    """Makes a data set of so many episodes, which is then what every training command loads.

    Pendulum's spaces; episodes of one step with actions uniform in [-2, 2] and reward -(action - 1)^2: the data's mean
    action is 0, the best one 1.
    """

    def make(num_episodes: int = 2000) -> Dataset:
        random = torch.Generator().manual_seed(0)
        obs, actions = torch.randn(num_episodes, 3, generator=random), torch.rand(num_episodes, 1, generator=random)
        columns = {"obs": obs, "actions": 4 * actions - 2, "next_obs": obs}
        columns["rewards"] = -(columns["actions"].squeeze(1) - 1).square()
        columns["terminated"] = torch.ones(num_episodes, dtype=torch.bool)
        columns["truncated"] = ~columns["terminated"]
        spaces = (peer := gym.make("Pendulum-v1")).observation_space, peer.action_space
        data = Dataset("lucky", "Pendulum-v1", columns, *spaces, (-10.0, 0.0), "none")
        monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: data)
        return data

    return make


class FakeEndpoint:
    """A chat endpoint on this machine. `answer(question, request)` gives a reply's text, or (status, headers, body).

    Attributes:
        url: base address.
        requests: what came in, each with its headers; a later one has a larger index.
    """

    def __init__(self, url: str) -> None:
        self.url, self.requests = url, list[dict[str, Any]]()
        self.answer: Callable[[str, dict[str, Any]], Any] = lambda question, request: "A"

    def reply(self, request: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        self.requests.append(request)
        answer = self.answer(request["body"]["messages"][0]["content"], request)
        if isinstance(answer, tuple):
            return answer
        message = {"role": "assistant", "content": answer}
        usage = {"prompt_tokens": 100, "completion_tokens": 2}
        return 200, {}, json.dumps({"choices": [{"message": message}], "usage": usage}).encode()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    """Answers A to everything, until told otherwise; no key is in the environment."""
    monkeypatch.setenv("no_proxy", "*")
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, headers, content = fake.reply({"path": self.path, "headers": dict(self.headers), "body": body})
            with contextlib.suppress(OSError):  # whoever asked may be gone
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        fake = FakeEndpoint(f"http://127.0.0.1:{server.server_port}/v1")
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield fake
        server.shutdown()
