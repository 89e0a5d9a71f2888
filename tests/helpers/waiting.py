"""Waiting for what other processes do, with a limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil


def wait_until(
    condition: Callable[[], Any],
    limit_s: float = 300,
    *,
    every_s: float = 0.05,
    told: Callable[[], str] = lambda: "it did not come to that",
) -> None:
    """Ask again and again, until the condition holds.

    Args:
        condition: what is asked; it may raise to end the waiting.
        limit_s: longest time to wait.
        every_s: time between two questions.
        told: what to say when the time is over.

    Raises:
        AssertionError: it did not hold in time.
    """
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(every_s)


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has ended; it may stay a zombie until its parent asks for its exit code."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def has_open(process: psutil.Process, path: str | Path) -> bool:
    """Whether a process is at work on a file."""
    return str(Path(path).resolve()) in {file.path for file in process.open_files()}
