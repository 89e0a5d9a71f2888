"""Real MLflow servers for tests, and servers that answer as a broken one does."""

from __future__ import annotations

import functools
import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.data import PROJECT
from tests.helpers.servers import free_ports, listens
from tests.helpers.waiting import wait_until

SERVE = """
import os, sys
folder, root, port = sys.argv[1:]
os.environ["_MLFLOW_SERVER_FILE_STORE"] = f"sqlite:///{folder}/mlflow.db"
os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = root
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
from mlflow.server import app
app.run("127.0.0.1", int(port), threaded=True)
"""
"""MLflow's own application, in one process: `mlflow server` starts several and takes longer."""


@contextmanager
def mlflow_server(folder: Path, artifact_root: str) -> Iterator[str]:
    """An MLflow server whose clients write artifacts themselves; gives its URI.

    Args:
        folder: where its database is.
        artifact_root: where clients are told to write.
    """
    port = free_ports(1)[0]
    log = folder / "server.log"
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(folder), artifact_root, str(port)],
        cwd=PROJECT,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        wait_until(functools.partial(listens, server, port, log), told=log.read_text)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


class BrokenServer:
    """Answers every request alike, maybe late, and keeps the headers of the last one."""

    def __init__(self) -> None:
        self.status, self.body = 200, b""
        self.headers: dict[str, str] = {}
        self.delay_s = 0.0
        self.requests = self.most_at_once = self._at_once = 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.headers = dict(self.headers)
                outer.requests += 1
                outer._at_once += 1
                outer.most_at_once = max(outer.most_at_once, outer._at_once)
                time.sleep(outer.delay_s)
                outer._at_once -= 1
                self.send_response(outer.status)
                self.send_header("Content-Length", str(len(outer.body)))
                self.end_headers()
                self.wfile.write(outer.body)

            def do_POST(self) -> None:
                self.do_GET()

            def log_message(self, *args: object) -> None:
                """Nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
