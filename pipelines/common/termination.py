"""Makes SIGTERM raise SystemExit, so that a process closes what it has open before it ends.

Schedulers, `ray job stop` and `kill` send SIGTERM, which ends a process at once by default: runs in
MLflow would stay open, and temporary folders and child processes would stay behind.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_SIGTERM = 128 + signal.SIGTERM
"""Exit code after SIGTERM, as shells report it."""

_received = threading.Event()


def received() -> bool:
    """Return whether SIGTERM has raised SystemExit in this process."""
    return _received.is_set()


def _leave(number: int, frame: FrameType | None) -> None:
    _received.set()
    sys.exit(EXIT_SIGTERM)


@contextmanager
def exit_on_sigterm() -> Iterator[Callable[[], None]]:
    """Make SIGTERM raise SystemExit in the main thread while the context is open.

    Other threads than the main one cannot set handlers, and a handler that somebody else has set
    stays: in both cases, the context does nothing.

    Yields:
        A function that sets the handler again. A local Ray sets one that ends Ray's processes
        before the work could close its run, and a joined Ray one with another exit code.
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
    """Undo what work does to the handler of `exit_on_sigterm`, as the start of Ray does."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if before is _leave:
        signal.signal(signal.SIGTERM, before)
