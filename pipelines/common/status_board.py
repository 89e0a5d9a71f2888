"""A small actor on the driver's node that collects status messages and passes on stop requests.

Processes write to it without waiting and continue if it is lost.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from pipelines.common.cluster import on_driver_node

logger = logging.getLogger(__name__)

LEAST_INTERVAL_S = 0.5
ANSWER_S = 10.0


class StatusBoard:
    """Latest activity of each process and the stop request of a run.

    `start_status_board` runs it as an actor.
    """

    def __init__(self) -> None:
        self._doing: dict[str, tuple[str, float]] = {}
        self._stop: str | None = None

    def write(self, who: str, what: str) -> None:
        """Record what a process is doing from now on."""
        self._doing[who] = (what, time.monotonic())

    def read(self) -> list[str]:
        """Return what each process is doing and for how long."""
        now = time.monotonic()
        return [
            f"{who}: {what} for {now - since:.0f} s"
            for who, (what, since) in sorted(self._doing.items())
        ]

    def ask_to_stop(self, why: str) -> None:
        """Request that the run stop after its next checkpoint."""
        self._stop = why

    def asked_to_stop(self) -> str | None:
        """Return why the run was asked to stop, or None."""
        return self._stop


def start_status_board() -> ActorHandle:
    """Start a status board on the driver's node, where it survives the loss of other nodes."""
    board = ray.remote(StatusBoard).options(num_cpus=0, scheduling_strategy=on_driver_node())
    return cast("ActorHandle", board.remote())


class ActivityReporter:
    """Reports the current activity of this process to a status board at a limited rate."""

    def __init__(self, board: ActorHandle | None) -> None:
        self._board = board
        self._who = f"data worker {os.getpid()}"
        self._what = ""
        self._lock = threading.Lock()
        self._woken = threading.Event()
        if board is not None:
            threading.Thread(target=self._write, daemon=True).start()

    def __call__(self, what: str) -> None:
        """Set the current activity; cheap enough to call for every clip."""
        with self._lock:
            self._what = what
        self._woken.set()

    def _write(self) -> None:
        """Send the latest activity, at most once per interval."""
        assert self._board is not None
        while True:
            self._woken.wait()
            self._woken.clear()
            with self._lock:
                what = self._what
            try:
                self._board.write.remote(self._who, what)
            except RayError as error:
                logger.warning("this data worker can no longer report its status: %s", error)
                return
            time.sleep(LEAST_INTERVAL_S)


def read_status_board(board: ActorHandle | None) -> str:
    """Describe what the data workers are doing, for messages."""
    if board is None:
        return "data workers do not report their status"
    try:
        notes = ray.get(board.read.remote(), timeout=ANSWER_S)
    except RayError as error:
        return f"the status of the data workers is unknown: {error}"
    return "; ".join(notes) or "no data worker has started: the cluster may have no free CPU"
