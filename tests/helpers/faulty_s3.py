"""An S3 server (moto) that fails on request: `python -m tests.helpers.faulty_s3 PORT [ADDRESS]`.

What fails does so as S3 fails: 503 SlowDown, 500 InternalError, or a body that ends in the middle.
Keys below forbidden/ are always 403, and those below silent/ are not answered for half a minute.
"""

from __future__ import annotations

import collections
import itertools
import random
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

CONTROL = "/__share__/"
SILENT_S = 30
ERROR = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'


@dataclass(frozen=True)
class FaultyS3:
    """The server, for a test."""

    endpoint: str

    def fail(self, share: float) -> None:
        """Have a share of the requests fail from now on."""
        with urllib.request.urlopen(f"{self.endpoint}{CONTROL}{share}") as answer:
            assert answer.read() == b"ok"

    def bytes_read(self, key_part: str) -> int:
        """Bytes of objects, those with a part in their key, that were sent so far."""
        with urllib.request.urlopen(f"{self.endpoint}{CONTROL}bytes{key_part}") as answer:
            return int(answer.read())

    def failed(self) -> int:
        """How many requests have failed since the share was set."""
        with urllib.request.urlopen(f"{self.endpoint}{CONTROL}") as answer:
            return int(answer.read())


class Faults:
    """WSGI middleware that fails requests at random."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app = app
        self._share = 0.0
        self._failed = 0
        self._sent: collections.Counter[str] = collections.Counter()
        self._random = random.Random(0)
        self._kinds = itertools.cycle(["SlowDown", "InternalError", "cut"])
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path.startswith(CONTROL):
            return self._control(path.removeprefix(CONTROL), start)
        if "/forbidden/" in path:
            body = _error(start, "403 Forbidden", "AccessDenied")
            # The body of an answer to HEAD would be taken for the next answer.
            return [] if environ["REQUEST_METHOD"] == "HEAD" else body
        if "/silent/" in path:
            time.sleep(SILENT_S)
        kind = self._fault()
        if kind == "SlowDown":
            return _error(start, "503 Slow Down", kind)
        if kind == "InternalError":
            return _error(start, "500 Internal Server Error", kind)
        body = self._app(environ, start)
        whole = b"".join(body)
        if environ["REQUEST_METHOD"] == "GET":
            with self._lock:
                self._sent[path] += len(whole)
        if kind is None:
            return [whole]
        return [whole[: len(whole) // 2]]  # its Content-Length promises more

    def _fault(self) -> str | None:
        with self._lock:
            if self._random.random() >= self._share:
                return None
            self._failed += 1
            return next(self._kinds)

    def _control(self, share: str, start: Callable[..., Any]) -> Iterable[bytes]:
        start("200 OK", [("Content-Type", "text/plain")])
        with self._lock:
            if share.startswith("bytes"):
                part = share.removeprefix("bytes")
                return [str(sum(n for key, n in self._sent.items() if part in key)).encode()]
            if not share:
                return [str(self._failed).encode()]
            self._share, self._failed = float(share), 0
        return [b"ok"]


def _error(start: Callable[..., Any], status: str, code: str) -> list[bytes]:
    body = ERROR.format(code=code).encode()
    start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


def main() -> None:
    """Serve until killed, on loopback unless an address is given."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    app = Faults(DomainDispatcherApplication(create_backend_app))
    address = sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1"
    run_simple(address, int(sys.argv[1]), app, threaded=True)


if __name__ == "__main__":
    main()
