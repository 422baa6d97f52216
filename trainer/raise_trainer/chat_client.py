"""A model behind an OpenAI-compatible endpoint, asked for chat completions; its replies kept in a file."""

import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import UserError
from .json_lines import append_json_lines, drop_torn_line, read_json_lines

LONGEST_REPLY = 1 << 20  # bytes
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between two tries; doubled each time
AGAIN = {408, 409, 425, 429}  # and whatever is 500 or more
REFUSED = {400, 413, 422}  # this request, and perhaps no other one
SHOWN = 300  # characters of a server's own message


class PromptRefused(UserError):
    """A server will not take this request, say because it is too long: status 400, 413 or 422."""


def question_hash(question: Any) -> str:
    """Name of a question (any JSON value) in a `ReplyCache`: 32 hexadecimal digits."""
    text = json.dumps(question, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class ReplyCache:
    """Replies by the hash of their question, in a JSON-lines file: `{"question": hash, "reply": text}`.

    A line that a killed process left half written is cut off. Threads may share one. UserError for a file
    that holds something else.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._lock = file, threading.Lock()
        self._known: dict[str, str] = {}
        drop_torn_line(file)
        for number, line in read_json_lines(file) if file.exists() else ():
            name, reply = line.get("question"), line.get("reply")
            if not isinstance(name, str) or not isinstance(reply, str):
                raise UserError(f"{file}: line {number} is no reply of a judge; name another cache")
            self._known[name] = reply

    def __len__(self) -> int:
        return len(self._known)

    def get(self, name: str) -> str | None:
        """The reply to a question, None when it has none yet."""
        return self._known.get(name)

    def add(self, name: str, reply: str) -> None:
        """Keep a reply; it is in the file when this returns."""
        with self._lock:
            self._known[name] = reply
            try:
                append_json_lines(self.file, [{"question": name, "reply": reply}])
            except OSError as error:
                raise UserError(f"{self.file}: cannot be written ({error.strerror})") from None


class ChatClient:
    """An endpoint with a cache. Threads may share one.

    url: up to `/v1`, say; `/chat/completions` is added. model: its name there, by which alone the cache
    knows it. key: sent as a bearer token to that address alone (no redirect is followed), never kept or
    shown. timeout: seconds that one try may take. retries: further tries after a time-out, a refused
    connection, a reply of another form, status 429 or 5xx; a server's Retry-After is waited for, up to a
    minute. sleep: for tests.
    """

    def __init__(
        self,
        url: str,
        model: str,
        cache: Path,
        *,
        key: str | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise UserError(f"url {url!r}: expected http://… or https://…")
        self.url, self.model, self.timeout, self.retries = url, model, timeout, retries
        self.cache = ReplyCache(cache)
        self._key, self._sleep = key, sleep
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirect)
        self.asked = 0

    @classmethod
    def key_of(cls, variable: str) -> str | None:
        """The key in an environment variable, None where it is not set."""
        return os.environ.get(variable) or None

    def name(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """Name of a question in the cache: a hash of model, messages and options."""
        return question_hash(self._body(messages, options))

    def reply(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """What the model says at temperature 0: from the cache, or asked. UserError when it cannot be had;
        PromptRefused when that is for this request.

        options: further fields of the request, such as max_tokens.
        """
        name = self.name(messages, **options)
        known = self.cache.get(name)
        if known is None:
            known = self._ask(json.dumps(self._body(messages, options), sort_keys=True).encode())
            with self._lock:
                self.asked += 1
            self.cache.add(name, known)
        return known

    def _body(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
        return {"model": self.model, "messages": messages, "temperature": 0, **options}

    def _ask(self, body: bytes) -> str:
        wait = FIRST_WAIT
        for left in range(self.retries, -1, -1):
            try:
                return self._once(body)
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read(SHOWN).decode("utf-8", "replace")
                why = self._hidden(f"status {error.code}: {' '.join(said.split())}")
                if error.code not in AGAIN and error.code < 500:
                    kind = PromptRefused if error.code in REFUSED else UserError
                    raise kind(f"judge {self.url}: {why}") from None
                asked = error.headers.get("Retry-After", "")
                wait = max(wait, float(asked)) if asked.isdecimal() else wait
            # no connection, a time-out, an answer cut off, or no JSON of the right form
            except (OSError, http.client.HTTPException, ValueError) as error:
                why = self._hidden(str(error) or type(error).__name__)
            if left:
                self._sleep(min(wait, LONGEST_WAIT))
                wait *= 2
        raise UserError(f"judge {self.url}: {why}, after {self.retries + 1} tries; run again to go on")

    def _hidden(self, text: str) -> str:
        """Without the key: a server may quote it in what it says."""
        return text.replace(self._key, "…") if self._key else text

    def _once(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        with self._opener.open(request, timeout=self.timeout) as answer:
            read = answer.read(LONGEST_REPLY + 1)
        if len(read) > LONGEST_REPLY:
            raise ValueError(f"a reply of more than {LONGEST_REPLY} bytes")
        try:
            content = json.loads(read)["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"a reply without choices: {read[:80]!r}") from None
        # half of a character's two escapes is no text that a file can hold
        return content.encode("utf-8", "replace").decode() if isinstance(content, str) else ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would take the key to another address."""

    def redirect_request(self, *_: Any) -> None:
        return None
