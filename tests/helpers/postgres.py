"""A PostgreSQL server of the tests' own, run by an unprivileged user."""

from __future__ import annotations

import functools
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg2
import pytest

from tests.helpers.servers import free_ports
from tests.helpers.waiting import wait_until

UNPRIVILEGED = "nobody"
"""PostgreSQL refuses to run as root."""
DEBIAN = Path("/usr/lib/postgresql")


@dataclass(frozen=True)
class Postgres:
    """A running server."""

    process: subprocess.Popen[bytes]
    environment: dict[str, str]
    """Address and credentials, as every client of PostgreSQL reads them."""

    def query(self, sql: str) -> list[tuple]:
        """Ask the database directly."""
        names = {
            "host": "PGHOST",
            "port": "PGPORT",
            "user": "PGUSER",
            "password": "PGPASSWORD",
            "dbname": "PGDATABASE",
        }
        values = {name: self.environment[variable] for name, variable in names.items()}
        with closing(psycopg2.connect(**values)) as connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall()


def program(name: str) -> str:
    """A program of the server, which Debian does not put on the path."""
    found = [str(path) for path in sorted(DEBIAN.glob(f"*/bin/{name}"))]
    path = found[-1] if found else shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not here; install the Debian package postgresql to run this test")
    return path


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A server on a free port of loopback with one user and an empty database."""
    initdb, server = program("initdb"), program("postgres")
    is_root = os.geteuid() == 0
    user = pwd.getpwnam(UNPRIVILEGED) if is_root else pwd.getpwuid(os.geteuid())
    run_as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if is_root else {}
    # Not below pytest's folders, which other users cannot enter.
    folder = Path(tempfile.mkdtemp(prefix="stgt-postgres-"))
    try:
        password = folder / "password"
        password.write_text(secrets.token_hex(16))
        for path in (folder, password):
            os.chown(path, user.pw_uid, user.pw_gid)
            path.chmod(0o700)
        port = free_ports(1)[0]
        subprocess.run(
            [
                initdb, f"--pgdata={folder}/data", "--username=mlflow", f"--pwfile={password}",
                "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync",
            ],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
            **run_as,
        )  # fmt: skip
        log = folder / "server.log"
        process = subprocess.Popen(
            [
                server, "-D", f"{folder}/data", "-p", str(port), "-c", "listen_addresses=127.0.0.1",
                "-c", "unix_socket_directories=", "-c", "fsync=off",
            ],
            cwd=folder,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            **run_as,
        )  # fmt: skip
        try:
            wait_until(functools.partial(_is_ready, process, port, log), told=log.read_text)
            yield Postgres(
                process,
                {
                    "PGHOST": "127.0.0.1",
                    "PGPORT": str(port),
                    "PGUSER": "mlflow",
                    "PGPASSWORD": password.read_text(),
                    "PGDATABASE": "postgres",
                },
            )
        finally:
            process.send_signal(signal.SIGINT)  # disconnects its clients
            process.wait(30)
    finally:
        shutil.rmtree(folder)


def _is_ready(server: subprocess.Popen[bytes], port: int, log: Path) -> bool:
    assert server.poll() is None, log.read_text()[-2000:]
    asking = [program("pg_isready"), "--host=127.0.0.1", f"--port={port}", "--quiet"]
    return subprocess.run(asking, check=False).returncode == 0
