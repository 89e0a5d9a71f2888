"""A Ray head on loopback whose session lies in a folder of its own, so that it can be searched."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from ray.util import get_node_ip_address

from tests.helpers.servers import ATTEMPTS, BIN, BUSY, free_ports, listens
from tests.helpers.waiting import wait_until


@dataclass(frozen=True)
class Head:
    """Where it listens, and its session."""

    address: str
    """Address for RAY_ADDRESS."""
    folder: Path
    """Folder of its session, with its logs."""


@contextmanager
def ray_head(environment: Mapping[str, str], log: Path) -> Iterator[Head]:
    """Start a head with an environment, which its workers inherit, and end it afterwards."""
    # A short path: sockets of Ray lie below it.
    with tempfile.TemporaryDirectory(prefix="stgt-ray-", ignore_cleanup_errors=True) as folder:
        for attempt in range(ATTEMPTS):
            gcs, dashboard, client, agent, grpc = free_ports(5)
            head = subprocess.Popen(
                [
                    str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
                    f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
                    f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
                    f"--dashboard-agent-grpc-port={grpc}", "--num-cpus=4", f"--temp-dir={folder}",
                    "--object-store-memory=200000000", "--disable-usage-stats",
                ],
                env=dict(environment),
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                wait_until(functools.partial(listens, head, dashboard, log), told=log.read_text)
            except AssertionError:
                _end(head)
                if BUSY not in log.read_text() or attempt + 1 == ATTEMPTS:
                    raise
                continue
            try:
                # Ray takes the node's own address even where it is told to take that of loopback.
                yield Head(f"{get_node_ip_address()}:{gcs}", Path(folder))
            finally:
                _end(head)
            return


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
