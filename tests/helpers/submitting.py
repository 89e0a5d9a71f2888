"""Submissions with `python -m jobs.submit`, from a folder outside of the project."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.data import PROJECT
from tests.helpers.servers import BIN, Cluster
from tests.helpers.waiting import wait_until


def environment_of(head: Cluster) -> dict[str, str]:
    """The environment of a person who submits to a head."""
    return {**head.environment, "PYTHONPATH": str(PROJECT)}


@dataclass
class Submission:
    """One `python -m jobs.submit`, whose standard error goes to a file."""

    head: Cluster
    log: Path
    arguments: tuple[str, ...]
    settings: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "jobs.submit", "--address", self.head.address,
                "--working-dir", str(PROJECT), *self.settings, *self.arguments,
            ],
            cwd=self.log.parent,
            env={**environment_of(self.head), **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )  # fmt: skip

    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str) -> None:
        def has_said() -> bool:
            assert self.process.poll() is None, self.said()[-3000:]
            return text in self.said()

        wait_until(has_said, told=self.said)

    def ended(self, timeout_s: float = 240) -> tuple[int, str]:
        """The exit code, and what stood on standard output."""
        out, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out

    def result(self) -> dict:
        """The one line on standard output of a job that succeeded."""
        code, out = self.ended()
        assert code == 0, self.said()[-3000:]
        (line,) = out.splitlines()
        return json.loads(line)


def ray_job(head: Cluster, *arguments: str) -> str:
    """The output of a command of `ray job`."""
    command, *rest = arguments
    done = subprocess.run(
        [str(BIN / "ray"), "job", command, "--address", head.address, *rest],
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr
