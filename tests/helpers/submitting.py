"""Submissions with `python -m jobs.submit`, from a folder outside of the project."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.data import PROJECT
from tests.helpers.heads import Cluster
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
    at_terminal: bool = False
    """Whether a person sits at a terminal, who can be asked."""

    def __post_init__(self) -> None:
        self.terminal = None
        theirs: int | None = None
        if self.at_terminal:
            self.terminal, theirs = pty.openpty()
            threading.Thread(target=self._write_log, args=(self.terminal,), daemon=True).start()
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "jobs.submit", "--address", self.head.address,
                *([] if "--working-dir" in self.settings else ["--working-dir", str(PROJECT)]),
                *self.settings, *self.arguments,
            ],
            cwd=self.log.parent,
            env={**environment_of(self.head), **self.environment},
            stdin=subprocess.DEVNULL if theirs is None else theirs,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w") if theirs is None else theirs,
            text=True,
        )  # fmt: skip
        if theirs is not None:
            os.close(theirs)

    def _write_log(self, terminal: int) -> None:
        with self.log.open("w") as log:
            while True:
                try:
                    said = os.read(terminal, 4096)
                except OSError:  # the process has ended
                    return
                log.write(said.decode(errors="replace").replace("\r\n", "\n"))
                log.flush()

    def answer(self, text: str) -> None:
        assert self.terminal is not None
        os.write(self.terminal, f"{text}\n".encode())

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

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
