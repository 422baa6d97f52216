"""A local OpenAI-compatible server that answers, or fails, as it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | bytes | tuple[int, dict[str, str], bytes] | Callable[[Any], Any] | threading.Event


class FakeChat(ThreadingHTTPServer):
    """Gives its `answers` one after another, the last for ever; runs inside `with`.

    An answer: a model's text; the bytes of a reply; (status, headers, bytes); a function of the request's
    body to one of these; or an event to wait for, without an answer. seen: headers and body of the requests.
    """

    daemon_threads = True

    def __init__(self, *answers: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[Answer] = list(answers)
        self.seen: list[tuple[dict[str, str], Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> FakeChat:
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeChat

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((dict(self.headers), body))
        assert self.path == "/v1/chat/completions"
        answers = self.server.answers
        answer: Any = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, threading.Event):
            answer.wait(5)
            return
        if callable(answer):
            answer = answer(body)
        status, headers, content = 200, {}, b""
        if isinstance(answer, str):
            content = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
        elif isinstance(answer, bytes):
            content = answer
        else:
            status, headers, content = answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass
