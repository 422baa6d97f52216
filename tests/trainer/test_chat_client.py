"""The chat client against a local server that fails in every way it can, and the file of its replies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raise_trainer.chat_client import ChatClient, ReplyCache, question_hash
from raise_trainer.errors import UserError
from tests.trainer.fake_chat import FakeChat

ASK = [{"role": "user", "content": "?"}]


@pytest.fixture
def server() -> Iterator[FakeChat]:
    with FakeChat("yes") as fake:
        yield fake


def client(server: FakeChat, folder: Path, waits: list[float] | None = None, **options: Any) -> ChatClient:
    sleep: Callable[[float], None] = ([] if waits is None else waits).append
    return ChatClient(server.url, "j", folder / "replies.jsonl", sleep=sleep, **options)


def test_a_reply_is_asked_for_once_and_kept(server: FakeChat, tmp_path: Path) -> None:
    one = client(server, tmp_path, key="secret")
    assert one.reply(ASK) == one.reply(ASK) == "yes" and len(server.seen) == one.asked == 1
    headers, body = server.seen[0]
    assert headers["Authorization"] == "Bearer secret"
    assert body == {"model": "j", "messages": ASK, "temperature": 0}
    with (tmp_path / "replies.jsonl").open("a") as file:
        file.write('{"question": "cut o')
    again = client(server, tmp_path)
    assert again.reply(ASK) == "yes" and again.asked == 0
    assert "secret" not in (tmp_path / "replies.jsonl").read_text()
    again.reply([{"role": "user", "content": "other"}])
    assert again.asked == 1 and "Authorization" not in server.seen[1][0]
    again.reply(ASK, max_tokens=7)  # another question
    assert server.seen[2][1]["max_tokens"] == 7 and len(ReplyCache(tmp_path / "replies.jsonl")) == 3


@pytest.mark.parametrize("line", ["{}", '{"question": "a", "reply": 1}'])
def test_a_file_of_other_things_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "replies.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="line 1 is no reply"):
        ReplyCache(tmp_path / "replies.jsonl")
    with pytest.raises(UserError, match="cannot be written"):
        ReplyCache(tmp_path / "gone" / "replies.jsonl").add("a", "b")


def test_names_of_questions() -> None:
    assert question_hash({"a": 1, "b": 2}) == question_hash({"b": 2, "a": 1}) != question_hash({"a": 1})


def test_it_is_asked_again_where_that_may_help(server: FakeChat, tmp_path: Path) -> None:
    waits: list[float] = []
    cut = (200, {"Content-Length": "9"}, b"{}")  # the connection ends before the answer does
    server.answers = [
        (503, {}, b"busy"),
        (429, {"Retry-After": "7"}, b""),
        b"no json",
        b"{}",
        b"[]",
        cut,
        "ok",
    ]
    assert client(server, tmp_path, waits, retries=6).reply(ASK) == "ok"
    assert waits == [1.0, 7.0, 14.0, 28.0, 56.0, 60.0]
    server.answers = [(429, {"Retry-After": "3600"}, b""), "ok"]
    waits.clear()
    client(server, tmp_path, waits).reply([])
    assert waits == [60.0]
    server.answers = [(500, {}, b"  broken\n down ")]
    with pytest.raises(UserError, match="status 500: broken down, after 3 tries; run again"):
        client(server, tmp_path, retries=2).reply([{}])


def test_what_no_further_try_can_mend(server: FakeChat, tmp_path: Path) -> None:
    server.answers = [(401, {}, b"bad key: secret")]
    with pytest.raises(UserError, match=r"status 401: bad key: …$"):
        client(server, tmp_path, key="secret").reply(ASK)
    server.answers = [(302, {"Location": "http://127.0.0.1:9/"}, b"")]
    with pytest.raises(UserError, match="status 302"):
        client(server, tmp_path, key="secret").reply(ASK)
    assert len(server.seen) == 2
    server.answers = [b'{"choices": [{"message": {"content": null}}]}']
    assert client(server, tmp_path).reply(ASK) == ""
    with pytest.raises(UserError, match="expected http"):
        ChatClient("file:///etc/passwd", "j", tmp_path / "x")


def test_time_outs_and_refused_connections(tmp_path: Path, server: FakeChat) -> None:
    gone = ChatClient("http://127.0.0.1:9/v1", "j", tmp_path / "a", retries=1, sleep=lambda _: None)
    with pytest.raises(UserError, match="after 2 tries"):
        gone.reply(ASK)
    held = threading.Event()
    server.answers = [held]
    with pytest.raises(UserError, match="timed out"):
        client(server, tmp_path, retries=0, timeout=0.1).reply(ASK)
    held.set()


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "k")
    assert ChatClient.key_of("SOME_KEY") == "k"
    monkeypatch.setenv("SOME_KEY", "")
    assert ChatClient.key_of("SOME_KEY") is None
