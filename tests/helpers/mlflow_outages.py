"""MLflow servers that go away: a proxy whose answers fail, and a server that is killed."""

from __future__ import annotations

import functools
import http.client
import http.server
import subprocess
import sys
import threading
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from tests.helpers.data import PROJECT
from tests.helpers.mlflow_servers import SERVE
from tests.helpers.servers import free_ports, listens
from tests.helpers.waiting import wait_until

Mode = Literal["up", "gone", "failing", "answers lost"]
"""`gone` closes connections; `failing` answers 503; `answers lost` lets requests pass, but no
answers."""


class Proxy:
    """Stands before a server, and passes requests on as long as its mode is `up`."""

    def __init__(self, uri: str) -> None:
        self.mode: Mode = "up"
        self.requests: dict[Mode, int] = {"up": 0, "gone": 0, "failing": 0, "answers lost": 0}
        """Number of requests in each mode."""
        outer, place = self, urlsplit(uri).netloc

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                mode = outer.mode
                outer.requests[mode] += 1
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.close_connection = mode != "up"
                if mode == "gone":
                    return
                if mode == "failing":
                    self._answer(503, b"the server is starting")
                    return
                connection = http.client.HTTPConnection(place, timeout=60)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                said = answer.read()
                if mode == "up":
                    self._answer(answer.status, said, answer.getheader("Content-Type"))
                connection.close()

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815

            def _answer(self, status: int, body: bytes, kind: str | None = None) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind or "text/plain")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                """Nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class KillableServer:
    """A real MLflow server that can be killed and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_ports(1)[0]
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        log = self._folder / "server.log"
        words = [str(self._folder), str(self._folder / "artifacts"), str(self._port)]
        with log.open("a") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVE, *words],
                cwd=PROJECT,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        wait_until(functools.partial(listens, self._process, self._port, log), told=log.read_text)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
