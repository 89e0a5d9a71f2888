"""Ray heads on loopback that tests start, each with a session folder of its own."""

from __future__ import annotations

import functools
import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from ray.util import get_node_ip_address

from jobs import entry
from tests.helpers.servers import BIN, free_ports, listens
from tests.helpers.waiting import wait_until

ATTEMPTS = 3
BUSY = entry.LATE_START
"""Said by Ray when its processes need longer than it waits, on a very busy machine."""
STARTED = "Ray runtime started."
NICENESS = "RAY_worker_niceness"
SETTINGS = {
    entry.RAY_START_WAIT: "120",
    # Ray gives its workers a niceness of 15, so that two busy loops leave each some 3 % of a core.
    # An actor that imports torch then starts in three minutes, and tests reach their time limits.
    NICENESS: "0",
}
"""Settings for any Ray of the tests, which may run on a machine that does other things as well."""
CPUS = 4


@dataclass(frozen=True)
class Cluster:
    """Where a head listens, and the environment that holds its token."""

    address: str
    environment: dict[str, str]
    gcs_address: str = ""
    cpus: int = CPUS
    pid: int | None = None
    """The process that started all others of the cluster."""

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
                timeout=900,
                check=False,
            )
            log = done.stdout + done.stderr
            if "No available agent" not in log or time.monotonic() > deadline:
                return done.returncode, log
            time.sleep(2)


@dataclass(frozen=True)
class Head:
    """Where it listens, and its session."""

    address: str
    """Address for RAY_ADDRESS."""
    dashboard: str
    """Address for submissions."""
    folder: Path
    """Folder of its session, with its logs."""
    pid: int
    """The process that started all others of the cluster."""


@contextmanager
def ray_head(environment: Mapping[str, str], log: Path) -> Iterator[Head]:
    """Start a head with an environment, which its workers inherit, and end it afterwards."""
    # Ray tells a submitted job the address that `ray_current_cluster` in this folder holds: in a
    # shared folder that would be the cluster which another test started last. The path is short,
    # because sockets of Ray lie below it.
    with tempfile.TemporaryDirectory(prefix="stgt-ray-", ignore_cleanup_errors=True) as folder:
        for attempt in range(ATTEMPTS):
            gcs, dashboard, client, agent, grpc = free_ports(5)
            head = subprocess.Popen(
                [
                    str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
                    f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
                    f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
                    f"--dashboard-agent-grpc-port={grpc}", f"--num-cpus={CPUS}",
                    f"--temp-dir={folder}", "--object-store-memory=200000000",
                    "--disable-usage-stats",
                ],
                env={**SETTINGS, **environment},
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                wait_until(functools.partial(_started, head, dashboard, log), told=log.read_text)
            except AssertionError:
                _end(head)
                if BUSY not in log.read_text() or attempt + 1 == ATTEMPTS:
                    raise
                continue
            try:
                # Ray takes the node's own address even where it is told to take that of loopback.
                yield Head(
                    f"{get_node_ip_address()}:{gcs}",
                    f"http://127.0.0.1:{dashboard}",
                    Path(folder),
                    head.pid,
                )
            finally:
                _end(head)
            return


@contextmanager
def running_head(folder: Path) -> Iterator[Cluster]:
    """A Ray head with a token of its own, whose files lie in a new folder."""
    folder.mkdir(exist_ok=True)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{BIN}:{os.environ['PATH']}",  # jobs that are submitted run `python`
    }
    with ray_head(environment, folder / "head.log") as head:
        yield Cluster(head.dashboard, environment, head.address, pid=head.pid)


def _started(head: subprocess.Popen[bytes], dashboard: int, log: Path) -> bool:
    """Whether a head has started; its dashboard answers before Ray knows whether it has."""
    return listens(head, dashboard, log) and STARTED in log.read_text()


def _end(head: subprocess.Popen[bytes]) -> None:
    """End the head and every process of its session."""
    started = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == head.pid or process.ppid() == head.pid:
                started.append(process)
                started += process.children(recursive=True)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue  # it has ended
    for process in started:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue  # it ended with its parent
    head.wait()
    psutil.wait_procs(started, timeout=30)
