"""A cluster to submit jobs to: a Ray head of its own, beside whatever Ray the tests use."""

from __future__ import annotations

import functools
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers.servers import Cluster, free_ports, listens
from tests.helpers.waiting import wait_until

BIN = Path(sys.executable).parent
ATTEMPTS = 3
BUSY = "timed out during startup"
"""Ray gives its processes 30 s to start, which is too little on a very busy machine."""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Ray head on loopback with a token of its own."""
    folder = tmp_path_factory.mktemp("head")
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
