"""Questions to a language model behind an OpenAI-compatible endpoint, POST URL/chat/completions."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

KEYS = ("RL_LAB_JUDGE_KEY", "OPENAI_API_KEY")  # environment variables; the first that is set counts
LONGEST_WAIT = 60.0  # seconds between two tries, whatever Retry-After says
OPTIONS = {"temperature": 0, "max_tokens": 16}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint:
    """Asks for one short reply; may be called from several threads.

    Busy (429), failing (5xx) and silent servers are asked again after 1, 2, 4, ... seconds, or later if they say so.
    The key comes from the environment, is sent to this address only, and is taken out of what comes back.

    Args:
        url: base address, such as https://host/v1.
        model: name, as the endpoint knows it.
        flag: named in errors.
        timeout: seconds that a server may be silent.
        tries: of each question.
        pause: seconds before the second try.
    Raises:
        ValueError: if the address or the key cannot be one; when called, if there is no reply.
    """

    def __init__(
        self, url: str, model: str, flag: str, timeout: float = 120.0, tries: int = 5, pause: float = 1.0
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or "@" in parts.netloc:
            raise ValueError(f"{flag}: a base address such as https://host/v1 works, without user, password or query")
        self.name, self.url, self.model, self.flag = f"{model} at {url}", url.rstrip("/"), model, flag
        self.timeout, self.tries, self.pause = timeout, tries, pause
        variable = next((name for name in KEYS if os.environ.get(name, "").strip()), "")
        self._key = os.environ.get(variable, "").strip()
        if not self._key.isascii() or any(not x.isprintable() or x.isspace() for x in self._key):
            raise ValueError(f"the key in {variable} has characters that no key has")
        self._options: dict[str, Any] = OPTIONS
        self._open = urllib.request.build_opener(_NoRedirect).open

    def __call__(self, question: str) -> tuple[str, Counter[str]]:
        """The reply, and what it took: requests 1, prompt_tokens, completion_tokens; or unmetered 1, if unsaid."""
        reply = self._post(question)
        try:
            text = reply["choices"][0]["message"]["content"] or ""
            spent = reply.get("usage") or {}
            usage = Counter({name: int(spent.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")})
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            raise self.error("its reply is no chat completion; the base address often ends in /v1") from None
        usage.update(requests=1, unmetered=int(not usage["prompt_tokens"]))
        return self._without_key(str(text)), usage

    def _post(self, question: str) -> Any:
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        for attempt in range(self.tries):
            options, wait = self._options, self.pause * 2**attempt
            body = {"model": self.model, "messages": [{"role": "user", "content": question}], **options}
            request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
            try:
                with self._open(request, timeout=self.timeout) as response:
                    content = response.read()
                break
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}"
                with contextlib.suppress(OSError, http.client.HTTPException):
                    reason += f": {error.read(10_000).decode(errors='replace')}"
                if error.code == 400 and options:
                    self._options, wait = {}, 0.0  # models that reason refuse them; from now on without
                elif error.code != 429 and error.code < 500:
                    raise self.error(reason) from None
                after = error.headers.get("Retry-After") or ""
                wait = min(max(wait, float(after)), LONGEST_WAIT) if after.isdecimal() else wait
            except (OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
            if attempt + 1 == self.tries:
                raise self.error(f"no reply in {self.tries} tries; {reason}") from None
            time.sleep(wait)
        try:
            return json.loads(content)
        except ValueError:
            raise self.error("its reply is no JSON; the base address often ends in /v1") from None

    def error(self, reason: str) -> ValueError:
        """In one line that a terminal can show, without the key."""
        shown = "".join(x if x.isprintable() else " " for x in self._without_key(reason))
        return ValueError(f"{self.flag} {self.name}: {' '.join(shown.split()):.400}")

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text
