"""Finding the processes that tests kill."""

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


def processes(name: str, of: int | None = None) -> list[psutil.Process]:
    """Processes below one (this one, when none is given) whose command line holds a name."""
    everyone = psutil.Process(of).children(recursive=True)
    return [process for process in everyone if name in _words(process)]


@contextmanager
def processes_seen(name: str) -> Iterator[set[psutil.Process]]:
    """Processes below this one whose command line holds a name, and which were not there before."""
    before, seen, over = set(processes(name)), set[psutil.Process](), threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            seen.update(set(processes(name)) - before)

    looks = threading.Thread(target=look)
    looks.start()
    try:
        yield seen
    finally:
        over.set()
        looks.join()
