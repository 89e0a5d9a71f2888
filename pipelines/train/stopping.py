"""Ends a training early: on errors that a restart cannot fix, and on SIGTERM.

Spot instances, schedulers and `ray job stop` send SIGTERM. A driver that receives it asks its
workers, through the status board, to stop after a checkpoint. If a training worker receives it, all
workers write a checkpoint, and the group restarts without that worker. A second SIGTERM ends a
process at once.
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

from pipelines.common import storage
from pipelines.common.ray_errors import (
    disk_is_full,
    is_of_the_cluster,
    out_of_memory,
    root_cause,
)
from pipelines.common.termination import EXIT_SIGTERM
from stgt.errors import STGTError

logger = logging.getLogger(__name__)

WORKER_GRACE_S = 90.0
"""Seconds after SIGTERM at which a training worker exits, with or without a checkpoint."""

LASTING = (STGTError, ValueError, storage.UnreachableError, PermissionError)
"""Errors that would occur again after a restart. Storage counts as unreachable only after many
attempts."""

_told_to_end = threading.Event()


def told_to_end() -> bool:
    """Return whether this training worker has received SIGTERM."""
    return _told_to_end.is_set()


class EndOnExplained(UserCallback):
    """Ends a run on errors that would occur again after a restart, such as a NaN loss.

    By default Ray Train restarts the worker group after any error.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise such an error in Ray Train's controller, which ends the run."""
        for error in worker_exceptions.values():
            cause = root_cause(error)
            # A process that the system killed for its memory may have more after a restart.
            own_memory = None if is_of_the_cluster(error) else out_of_memory(error)
            if disk_is_full(error) or own_memory or isinstance(cause, LASTING):
                raise cause


class NoticeSigterm(WorkerCallback):
    """Lets training workers record SIGTERM instead of exiting at once.

    Ray calls this in a worker's main thread, the only thread that may set signal handlers. The
    training loop runs in another thread.
    """

    def after_init_train_context(self) -> None:
        """Replace Ray's signal handler."""
        _told_to_end.clear()
        previous = signal.getsignal(signal.SIGTERM)

        def notice(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGTERM, previous)
            _told_to_end.set()
            timer = threading.Timer(WORKER_GRACE_S, os._exit, [EXIT_SIGTERM])
            timer.daemon = True
            timer.start()

        signal.signal(signal.SIGTERM, notice)

    def before_worker_shutdown(self) -> None:
        """Restore the default signal handler after the training loop."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def stopping_on_sigterm(board: ActorHandle) -> Iterator[threading.Event]:
    """Make SIGTERM on the driver ask the workers to stop after a checkpoint.

    Yields:
        An event that is set once SIGTERM has been received.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # a trial of a sweep, which Ray Tune stops
        return
    done = threading.Event()

    def pass_on() -> None:
        # Not in the handler, which may interrupt Ray in the middle of a call in the main thread.
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
