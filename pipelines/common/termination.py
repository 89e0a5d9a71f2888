"""Makes SIGTERM raise SystemExit, so that a process closes what it has open before it ends.

Schedulers, `ray job stop` and `kill` send SIGTERM, which ends a process at once by default: runs in
MLflow would stay open, and temporary folders and child processes would stay behind.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

EXIT_SIGTERM = 128 + signal.SIGTERM
"""Exit code after SIGTERM, as shells report it."""
GRACE_S = 90
"""Seconds after SIGTERM at which a process ends, whatever it waits for."""

RAYS_CODES = (signal.SIGTERM, 1)
"""Exit codes of Ray's handlers: that of Python, and that inside calls of its native code."""

_received: list[int] = []
"""Signals that have raised SystemExit. Not an event, whose lock a second signal might need while
the handler of the first one holds it."""


def received() -> bool:
    """Return whether SIGTERM has raised SystemExit in this process."""
    return bool(_received)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    if not _received:
        # Threads that wait for unreachable storage would keep the process for minutes.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(EXIT_SIGTERM))
        signal.alarm(GRACE_S)
    _received.append(number)
    sys.exit(EXIT_SIGTERM)


@contextmanager
def exit_on_sigterm() -> Iterator[Callable[[], None]]:
    """Make SIGTERM raise SystemExit in the main thread while the context is open.

    Other threads than the main one cannot set handlers, and a handler that somebody else has set
    stays: in both cases, the context does nothing.

    Yields:
        A function that sets the handler again, after something else has set its own.
    """
    before = signal.getsignal(signal.SIGTERM)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or before not in (signal.SIG_DFL, _leave):
        yield lambda: None
        return

    def take_over() -> None:
        signal.signal(signal.SIGTERM, _leave)

    take_over()
    try:
        yield take_over
    finally:
        if signal.getsignal(signal.SIGTERM) is _leave:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def keeping_sigterm_handler() -> Iterator[None]:
    """Keep the handler of `exit_on_sigterm` in spite of the start of Ray, which sets its own.

    Ray's handler exits with another code, and prints where native code was. SIGTERM during the
    start counts as received by this module's handler.
    """
    before = signal.getsignal(signal.SIGTERM)
    if before is not _leave:
        yield
        return
    try:
        yield
    except SystemExit as error:
        if error.code in RAYS_CODES:
            _leave(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
