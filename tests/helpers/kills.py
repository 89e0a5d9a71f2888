"""Finding the processes that tests kill."""

from __future__ import annotations

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
