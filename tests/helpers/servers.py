"""Servers that tests start, and a Ray head to submit jobs to."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent


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
