"""Servers that tests start, and a Ray head to submit jobs to."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.helpers.waiting import wait_until

BIN = Path(sys.executable).parent
ATTEMPTS = 3
BUSY = "timed out during startup"
"""Ray gives its processes 30 s to start, which is too little on a very busy machine."""


def listens(server: subprocess.Popen[bytes], port: int, log: Path) -> bool:
    """Whether a server that was started answers on loopback."""
    assert server.poll() is None, log.read_text()[-2000:]
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass(frozen=True)
class Cluster:
    """Where a head listens, and the environment that holds its token."""

    address: str
    environment: dict[str, str]
    gcs_address: str = ""
    cpus: int = 4

    def submit(self, *entrypoint: str) -> tuple[int, str]:
        """`ray job submit`: exit code and log.

        Again while the cluster that was just started has no agent for jobs yet.
        """
        deadline = time.monotonic() + 60
        while True:
            done = subprocess.run(
                [str(BIN / "ray"), "job", "submit", "--address", self.address, "--", *entrypoint],
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=400,
                check=False,
            )
            log = done.stdout + done.stderr
            if "No available agent" not in log or time.monotonic() > deadline:
                return done.returncode, log
            time.sleep(2)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextlib.contextmanager
def running_head(folder: Path) -> Iterator[Cluster]:
    """A Ray head on loopback with a token of its own, in a new folder."""
    folder.mkdir(exist_ok=True)
    log, token = folder / "head.log", folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{BIN}:{os.environ['PATH']}",  # jobs that are submitted run `python`
    }
    for attempt in range(ATTEMPTS):
        # The agent too: jobs are started by it, and another Ray here may hold its usual port.
        gcs, dashboard, client, agent, grpc = free_ports(5)
        before = {process.pid for process in psutil.process_iter()}
        process = subprocess.Popen(
            [
                str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
                f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
                f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
                f"--dashboard-agent-grpc-port={grpc}", "--num-cpus=4",
                "--object-store-memory=200000000", "--disable-usage-stats",
            ],
            env=environment,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            wait_until(functools.partial(listens, process, dashboard, log), told=log.read_text)
        except AssertionError:
            _end(process, before)
            if BUSY not in log.read_text() or attempt + 1 == ATTEMPTS:
                raise
            continue
        try:
            yield Cluster(f"http://127.0.0.1:{dashboard}", environment, f"127.0.0.1:{gcs}")
        finally:
            _end(process, before)
        return


def _end(head: subprocess.Popen[bytes], before: set[int]) -> None:
    """End the head and what it started."""
    started = [
        child
        for child in psutil.process_iter()
        if child.pid not in before and _descends_from(child, head.pid)
    ]
    for child in (*started, head):
        try:
            os.kill(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it ended with its parent
    head.wait()


def _descends_from(process: psutil.Process, ancestor: int) -> bool:
    """Whether a process belongs to the session that the head's process opened, or below it."""
    try:
        return os.getsid(process.pid) == ancestor or any(
            parent.pid == ancestor for parent in process.parents()
        )
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False
