"""JSON over HTTP to a server of one's own: bounded retries, and an error that names the way out."""

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

from ..errors import UserError

PASSING = {429, 500, 502, 503, 504}  # worth another try: overload, a server that is starting
SHOWN = 400  # characters of a server's own message


class NotThere(UserError):
    """The server has no such address (HTTP 404)."""


class HttpJson:
    """Requests to `url`. Any proxy in the environment is passed by: the server is one's own.

    tries: of each request that may be repeated. pause: seconds before the second one, doubled each time.
    timeout: seconds without an answer after which a try has failed. remedy: ends the message of a server that
    cannot be reached.
    """

    def __init__(
        self, url: str, *, remedy: str, tries: int = 5, pause: float = 1.0, timeout: float = 600.0
    ) -> None:
        self.url, self.remedy = url.rstrip("/"), remedy
        self.tries, self.pause, self.timeout = tries, pause, timeout
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str) -> Any:
        """What the server says at `path`; None for an empty answer. UserError when it cannot be had."""
        return self._ask(path, None, self.tries)

    def post(self, path: str, body: Any, *, again: bool = True) -> Any:
        """The same with a body. again: whether repeating it does no harm."""
        return self._ask(path, json.dumps(body, allow_nan=False).encode(), self.tries if again else 1)

    def _ask(self, path: str, body: bytes | None, tries: int) -> Any:
        for attempt in range(tries):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                return self._once(path, body)
            except urllib.error.HTTPError as error:
                with error:
                    said = " ".join(error.read().decode(errors="replace").split())[:SHOWN]
                failure = f"answered HTTP {error.code} ({said or error.reason})"
                if error.code == 404:
                    raise NotThere(f"{self.url}{path}: {failure}") from None
                if error.code not in PASSING:
                    raise UserError(f"{self.url}{path}: {failure}") from None
            except TimeoutError:
                failure = f"gave no answer within {self.timeout:g} s"
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                late = isinstance(reason, TimeoutError)
                failure = f"gave no answer within {self.timeout:g} s" if late else f"not reachable ({reason})"
        raise UserError(f"{self.url}{path}: {failure}, in {tries} tries; {self.remedy}")

    def _once(self, path: str, body: bytes | None) -> Any:
        request = urllib.request.Request(
            self.url + path, data=body, headers={"Content-Type": "application/json"}
        )
        with self._opener.open(request, timeout=self.timeout) as answer:
            text = answer.read()
        try:
            return json.loads(text) if text.strip() else None
        except ValueError:
            raise UserError(f"{self.url}{path}: answered no JSON ({text[:80]!r}); {self.remedy}") from None
