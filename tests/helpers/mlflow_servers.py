"""Real MLflow servers for tests, and servers that answer as a broken one does."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import yaml

from tests.helpers.data import PROJECT
from tests.helpers.servers import free_ports, listens
from tests.helpers.waiting import wait_until

SERVE = """
import os, sys
folder, root, port, *address = sys.argv[1:]
os.environ["_MLFLOW_SERVER_FILE_STORE"] = f"sqlite:///{folder}/mlflow.db"
os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = root
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
from mlflow.server import app
app.run(*(address or ["127.0.0.1"]), int(port), threaded=True)
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


COMPOSE = PROJECT / "cluster" / "mlflow" / "compose.yaml"
PUBLIC_HOST = "mlflow.example.org"
"""Where members of the team open its pages. A browser of a test takes it for loopback."""
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def interpolated(text: str, values: Mapping[str, str]) -> str:
    """A value of a compose file with its variables filled in, as Docker Compose does."""

    def value(found: re.Match[str]) -> str:
        name, mark, rest = found.groups()
        if values.get(name):
            return values[name]
        assert mark == "-", f"{name} is not set: {rest}"
        return rest

    return VARIABLE.sub(value, text)


def compose_service(name: str, values: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a service of the documented server, from its variables."""
    service = yaml.safe_load(COMPOSE.read_text())["services"][name]
    environment = {
        # A variable without a value is handed on, if it is set.
        variable: values.get(variable, "") if value is None else interpolated(value, values)
        for variable, value in service["environment"].items()
    }
    command = [interpolated(word, values) for word in service.get("command", [])]
    return command, {name: value for name, value in environment.items() if value}


class TeamServer:
    """`mlflow server` with the documented command, which a test can kill and start again."""

    def __init__(
        self,
        folder: Path,
        database: Mapping[str, str],
        artifacts: str,
        storage: Mapping[str, str],
        workers: int = 1,
    ) -> None:
        """Prepare the server; nothing is started yet.

        Args:
            folder: for its log.
            database: address and credentials of PostgreSQL.
            artifacts: where it keeps the files of runs.
            storage: address and credentials of S3.
            workers: number of its processes; each takes seconds to start.
        """
        self.port = free_ports(1)[0]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.pages = f"http://{PUBLIC_HOST}:{self.port}"
        self.log = folder / "server.log"
        self._admin_password = secrets.token_hex(8)
        values = {
            **storage,
            "POSTGRES_PASSWORD": database["PGPASSWORD"],
            "MLFLOW_WORKERS": str(workers),
            "MLFLOW_ALLOWED_HOSTS": f"{PUBLIC_HOST}:*,127.0.0.1:*",
            "MLFLOW_ALLOWED_ORIGINS": self.pages,
            "MLFLOW_ARTIFACTS_DESTINATION": artifacts,
            "MLFLOW_AUTH_ADMIN_PASSWORD": self._admin_password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
        }
        command, environment = compose_service("mlflow", values)
        self._command = [str(Path(sys.executable).parent / command[0]), *command[1:]]
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MLFLOW_", "AWS_", "PG"))
        }
        here = {
            "MLFLOW_HOST": "127.0.0.1",
            "MLFLOW_PORT": str(self.port),
            "MLFLOW_AUTH_CONFIG_PATH": str(COMPOSE.with_name("basic_auth.ini")),
        }
        self._environment = {**kept, **environment, **database, **here}
        self._server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._server = subprocess.Popen(
            self._command,
            env=self._environment,
            cwd=self.log.parent,
            stdout=self.log.open("ab"),
            stderr=subprocess.STDOUT,
        )
        # A restart takes seconds, and minutes on a machine that does ten times as much.
        wait_until(self._is_healthy, 300, told=lambda: self.log.read_text()[-3000:])

    def _is_healthy(self) -> bool:
        assert self._server is not None
        assert self._server.poll() is None, self.log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        """End it and its workers at once."""
        if self._server is None:
            return
        processes = psutil.Process(self._server.pid).children(recursive=True)
        self._server.kill()
        for process in processes:
            process.kill()
        self._server.wait()
        psutil.wait_procs(processes, timeout=30)
        self._server = None

    @property
    def admin(self) -> dict[str, str]:
        """The variables with which the administrator's client is told apart."""
        return self._client_variables("admin", self._admin_password)

    def add_account(self, name: str) -> dict[str, str]:
        """Create an account as its administrator does; gives the variables for its client."""
        password = secrets.token_hex(8)
        request = urllib.request.Request(
            f"{self.uri}/api/2.0/mlflow/users/create",
            json.dumps({"username": name, "password": password}).encode(),
            {"Content-Type": "application/json", "Authorization": authorization(self.admin)},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 200
        return self._client_variables(name, password)

    def _client_variables(self, name: str, password: str) -> dict[str, str]:
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": name,
            "MLFLOW_TRACKING_PASSWORD": password,
        }


def authorization(account: Mapping[str, str]) -> str:
    """The header with which a client is told apart."""
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    pair = ":".join(account[name] for name in names)
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


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
