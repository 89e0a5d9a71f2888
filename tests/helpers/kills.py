"""Finding the processes that tests kill, and pausing them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None


def processes(name: str, of: int | None = None) -> list[psutil.Process]:
    """Processes below one (this one, when none is given) whose command line holds a name."""
    everyone = psutil.Process(of).children(recursive=True)
    return [process for process in everyone if name in _words(process)]


@contextmanager
def paused(name: str, of: int | None = None) -> Iterator[None]:
    """Pause the processes below one whose command line holds a name (SIGSTOP, then SIGCONT).

    What a test does meanwhile happens during their work, however slow the machine is.
    """
    found = processes(name, of)
    assert found, f"no process {name} is there to pause"
    for process in found:
        process.suspend()
    try:
        yield
    finally:
        for process in found:
            process.resume()


@contextmanager
def processes_seen(name: str) -> Iterator[set[psutil.Process]]:
    """Processes below this one whose command line holds a name, and which were not there before.

    A child that one of them forks has its name until it runs its own program, and is left out.
    """
    before, seen, over = set(processes(name)), set[psutil.Process](), threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            found = set(processes(name)) - before
            names = {process.pid for process in found}
            seen.update(process for process in found if _parent(process) not in names)

    looks = threading.Thread(target=look)
    looks.start()
    try:
        yield seen
    finally:
        over.set()
        looks.join()
