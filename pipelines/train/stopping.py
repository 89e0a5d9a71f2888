"""How a training ends before its end: errors that no other attempt mends, and SIGTERM.

SIGTERM, as spot instances, schedulers and `ray job stop` send it: a checkpoint, then the end.

A driver that gets it asks its workers, over the board, to stop after a checkpoint. A training
worker that gets it has all workers take a checkpoint, and the group begins again without it. A
second SIGTERM ends a process at once.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ray.actor import ActorHandle
from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import WorkerCallback

from pipelines.common.ray_errors import disk_is_full, root_cause
from stgt.errors import STGTError

logger = logging.getLogger(__name__)

EXIT_TERMINATED = 128 + signal.SIGTERM
WORKER_GRACE_S = 90.0
"""After which a training worker that was told to end does so, checkpoint or not."""

_told_to_end = threading.Event()


def told_to_end() -> bool:
    """Whether this training worker has got SIGTERM."""
    return _told_to_end.is_set()


class EndOnExplained(UserCallback):
    """Ends a run on errors that another attempt would meet again, such as a loss that is NaN.

    Ray Train otherwise begins the worker group again whatever went wrong.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise, in Ray Train's controller, which then gives up."""
        for error in worker_exceptions.values():
            cause = root_cause(error)
            if disk_is_full(error) or isinstance(cause, (STGTError, ValueError)):
                raise cause


class NoticeSigterm(WorkerCallback):
    """Has training workers notice SIGTERM, which would end them at once.

    Ray calls it in a worker's main thread, the only one that may handle signals; the training loop
    runs in another.
    """

    def after_init_train_context(self) -> None:
        """Take over from Ray's handler."""
        _told_to_end.clear()
        previous = signal.getsignal(signal.SIGTERM)

        def notice(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGTERM, previous)
            _told_to_end.set()
            timer = threading.Timer(WORKER_GRACE_S, os._exit, [EXIT_TERMINATED])
            timer.daemon = True
            timer.start()

        signal.signal(signal.SIGTERM, notice)

    def before_worker_shutdown(self) -> None:
        """The loop has ended: SIGTERM ends the process again."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def stopping_on_sigterm(board: ActorHandle) -> Iterator[threading.Event]:
    """While training runs on a driver: SIGTERM asks the workers to stop after a checkpoint.

    Yields:
        An event that is set when that has happened.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # a trial of a sweep: its driver is told otherwise
        return
    done = threading.Event()

    def pass_on() -> None:
        # Not in the handler: that interrupts whatever Ray is doing in the main thread.
        while not done.is_set():
            if asked.wait(timeout=0.5):
                logger.warning("SIGTERM: stopping after a checkpoint")
                board.ask_to_stop.remote("SIGTERM")
                return

    def notice(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, previous)
        asked.set()

    previous = signal.signal(signal.SIGTERM, notice)
    messenger = threading.Thread(target=pass_on, daemon=True)
    messenger.start()
    try:
        yield asked
    finally:
        done.set()
        messenger.join()
        signal.signal(signal.SIGTERM, previous)
