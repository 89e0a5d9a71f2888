"""What the processes of a run tell each other beside their data: what each does, and to stop.

A small actor on the driver's node. Whoever writes on it does not wait, and goes on when it is gone.
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
    """Kept by `put_up_board` as an actor."""

    def __init__(self) -> None:
        self._doing: dict[str, tuple[str, float]] = {}
        self._stop: str | None = None

    def write(self, who: str, what: str) -> None:
        """Say what a process does from now on."""
        self._doing[who] = (what, time.monotonic())

    def read(self) -> list[str]:
        """What each process does, and for how long."""
        now = time.monotonic()
        return [
            f"{who}: {what} for {now - since:.0f} s"
            for who, (what, since) in sorted(self._doing.items())
        ]

    def ask_to_stop(self, why: str) -> None:
        """Have the run end after a checkpoint."""
        self._stop = why

    def asked_to_stop(self) -> str | None:
        """Why the run is to end, None when it is not."""
        return self._stop


def start_status_board() -> ActorHandle:
    """A board beside the driver: the loss of another node must not take it along."""
    board = ray.remote(StatusBoard).options(num_cpus=0, scheduling_strategy=on_driver_node())
    return cast("ActorHandle", board.remote())


class ActivityReporter:
    """Says on a board, now and then, what this process does."""

    def __init__(self, board: ActorHandle | None) -> None:
        self._board = board
        self._who = f"data worker {os.getpid()}"
        self._what = ""
        self._lock = threading.Lock()
        self._woken = threading.Event()
        if board is not None:
            threading.Thread(target=self._write, daemon=True).start()

    def __call__(self, what: str) -> None:
        """Note what begins now; costs nothing that a clip would feel."""
        with self._lock:
            self._what = what
        self._woken.set()

    def _write(self) -> None:
        """Writes the latest note, at most some a second."""
        assert self._board is not None
        while True:
            self._woken.wait()
            self._woken.clear()
            with self._lock:
                what = self._what
            try:
                self._board.write.remote(self._who, what)
            except RayError as error:
                logger.warning("what this data worker does is not noted any more: %s", error)
                return
            time.sleep(LEAST_INTERVAL_S)


def read_status_board(board: ActorHandle | None) -> str:
    """What data workers do, in words."""
    if board is None:
        return "data workers tell nothing"
    try:
        notes = ray.get(board.read.remote(), timeout=ANSWER_S)
    except RayError as error:
        return f"what data workers do is not known: {error}"
    return "; ".join(notes) or "no data worker has begun: the cluster may have no CPU left for one"
