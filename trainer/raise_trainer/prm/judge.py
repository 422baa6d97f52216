"""A judge of reasoning steps behind an OpenAI-compatible endpoint: asked once, its replies kept in a file."""

import base64
import hashlib
import json
import mimetypes
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raise_core.chain import Step

from ..errors import UserError
from ..rows import LABELS, Row

LONGEST_REPLY = 1 << 20  # bytes
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between two tries; doubled each time
AGAIN = {408, 409, 425, 429}  # and whatever is 500 or more

INSTRUCTION = """\
You judge the steps of a solution to a question. For each step decide:
"good": it is correct and brings the solution forward;
"neutral": it is not wrong, but does not help;
"bad": it holds a mistake, contradicts the picture or an earlier step, or leads away from the answer.
{answer_rule}Reply with one JSON object and nothing else: {{"labels": [{count} labels, in order]}}."""
ANSWER_RULE = (
    'The last thing to judge is the answer itself: "good" if it agrees with the reference, else "bad".\n'
)
_OBJECT = re.compile(r"\{[^{}]*\}")


class Unreadable(Exception):
    """A reply that holds no labels, or not as many as there are steps."""


def messages_for(row: Row) -> list[dict[str, Any]]:
    """The chat that asks for labels of a row's steps, and of its answer if it has one.

    An image goes along; the frames of a video do not, so that its judge has the reference answer alone.
    """
    count = len(row.steps) + bool(row.answer)
    steps = [f"Step {i}: {_said(step)}" for i, step in enumerate(row.steps, 1)]
    if row.answer:
        steps.append(f"Answer: {row.answer}")
    parts = [f"Question: {row.question}", f"Reference answer: {row.solution}", *steps]
    text: Any = "\n\n".join(parts)
    if row.data_type == "image" and row.path is not None:
        text = [
            {"type": "image_url", "image_url": {"url": _data_url(row.path)}},
            {"type": "text", "text": text},
        ]
    rule = ANSWER_RULE if row.answer else ""
    system = INSTRUCTION.format(answer_rule=rule, count=count)
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def _said(step: Step) -> str:
    parts = [f"{step.name}." if step.name else "", step.thought, step.reflection]
    return " ".join(part for part in parts if part)


def _data_url(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def read_labels(reply: str, count: int) -> list[str]:
    """The labels of a reply, `count` of good, neutral and bad. Raises Unreadable; nothing is guessed."""
    for found in reversed(_OBJECT.findall(reply)):
        try:
            labels = json.loads(found).get("labels")
        except ValueError:
            continue
        if isinstance(labels, list):
            words = [word.strip().lower() if isinstance(word, str) else "" for word in labels]
            if len(words) == count and all(word in LABELS for word in words):
                return words
            raise Unreadable(f"labels {str(labels)[:80]} for {count} things to judge")
    raise Unreadable(f"no labels in {reply[:80]!r}")


class Judge:
    """An endpoint with a cache.

    url: up to `/v1`, say; `/chat/completions` is added. key: sent as a bearer token, not kept anywhere.
    cache: JSON-lines file, a reply for each question that was ever asked of this model; a line that a killed
    run left half written is cut off. sleep: for tests.
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
        self.url, self.model, self.cache, self.timeout, self.retries = url, model, cache, timeout, retries
        self._key, self._sleep = key, sleep
        self._known = _read_cache(cache)
        self.asked = 0

    @classmethod
    def key_of(cls, variable: str) -> str | None:
        """The key in an environment variable, None where it is not set."""
        return os.environ.get(variable) or None

    def reply(self, messages: list[dict[str, Any]]) -> str:
        """What the judge says: from the cache, or asked. UserError when it cannot be had."""
        body = {"model": self.model, "messages": messages, "temperature": 0}
        text = json.dumps(body, sort_keys=True)
        name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        if name not in self._known:
            self._known[name] = self._ask(text.encode())
            self.asked += 1
            with self.cache.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"question": name, "reply": self._known[name]}) + "\n")
        return self._known[name]

    def _ask(self, body: bytes) -> str:
        wait = FIRST_WAIT
        for left in range(self.retries, -1, -1):
            try:
                return self._once(body)
            except urllib.error.HTTPError as error:
                said = error.read(300).decode("utf-8", "replace")
                why = f"status {error.code}: {' '.join(said.split())}"
                if error.code not in AGAIN and error.code < 500:
                    raise UserError(f"judge {self.url}: {why}") from None
                asked = error.headers.get("Retry-After", "")
                wait = max(wait, float(asked)) if asked.isdigit() else wait
            except (OSError, ValueError) as error:  # no connection, a time-out, or no JSON of the right form
                why = str(error) or type(error).__name__
            if left:
                self._sleep(min(wait, LONGEST_WAIT))
                wait *= 2
        raise UserError(f"judge {self.url}: {why}, after {self.retries + 1} tries; run again to go on")

    def _once(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            read = answer.read(LONGEST_REPLY + 1)
        if len(read) > LONGEST_REPLY:
            raise ValueError(f"a reply of more than {LONGEST_REPLY} bytes")
        try:
            content = json.loads(read)["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"a reply without choices: {read[:80]!r}") from None
        return content if isinstance(content, str) else ""


def _read_cache(file: Path) -> dict[str, str]:
    """Replies by question; a last line without its end is cut off."""
    if not file.exists():
        return {}
    lines = file.read_bytes().split(b"\n")
    if lines[-1]:
        file.write_bytes(b"".join(line + b"\n" for line in lines[:-1]))
    found = dict[str, str]()
    for number, line in enumerate(lines[:-1], 1):
        try:
            record = json.loads(line)
            found[record["question"]] = record["reply"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file}: line {number} is no reply of a judge; name another cache") from None
    return found
