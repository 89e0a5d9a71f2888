"""Carries errors across processes and finds the original error inside Ray's wrappers.

Ray Data reduces an error raised in a stage to text. A stage whose errors are meant for the user
therefore returns them as a row (`errors_as_rows`), and the driver raises them again (`rows`).
"""

from __future__ import annotations

import errno
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from stgt.errors import STGTError

if TYPE_CHECKING:
    import ray.data

# Ray is imported where it is used: an error that occurs before Ray starts needs none of it.

EXPLAINED = (STGTError, OSError)
"""Errors whose message is meant for the user. Others are bugs, or errors of libraries."""

ERROR = "error"
"""Column with a pickled error that ends the run; empty bytes or null if there is none."""
NO_SPACE = ("database or disk is full", "No space left on device", "os error 28")
"""Messages of SQLite, the operating system and Rust for a full disk."""
NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "Unable to allocate",
    "running low on memory",
    "due to memory pressure",
)
"""Messages of torch, NumPy, the operating system and Ray's memory monitor for too little memory."""

Arguments = ParamSpec("Arguments")
Block = dict[str, np.ndarray]


def errors_as_rows(stage: Callable[Arguments, Block]) -> Callable[Arguments, Block]:
    """Make a Ray Data stage return an `EXPLAINED` error as a row with the column `error`."""

    @functools.wraps(stage)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Block:
        try:
            return stage(*args, **kwargs)
        except EXPLAINED as error:
            return {ERROR: np.array([pack_error(error)], dtype=object)}

    return call


def pack_error(error: Exception) -> bytes:
    """Serialize an error for the column `error`, since Ray itself keeps only the message."""
    return pickle.dumps(error)


def raise_packed(error: bytes | None) -> None:
    """Raise the error in a row; unpickling is safe because rows come from this run's workers."""
    if error:
        raise pickle.loads(error)


def rows(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """Run a dataset whose stages use `errors_as_rows` and iterate over its rows.

    Raises:
        STGTError, OSError: A stage returned this error.
    """
    for row in dataset.iter_rows():
        raise_packed(row.get(ERROR))
        yield row


def is_of_the_cluster(error: BaseException) -> bool:
    """Return whether an error was caused by a lost node, worker or object rather than by code."""
    from ray.exceptions import (
        NodeDiedError,
        ObjectLostError,
        RayActorError,
        RaySystemError,
        WorkerCrashedError,
    )

    lost = (NodeDiedError, ObjectLostError, RayActorError, RaySystemError, WorkerCrashedError)
    return any(isinstance(one, lost) for one in _chain(error, with_handled=True))


def _chain(error: BaseException, with_handled: bool) -> Iterator[BaseException]:
    """Iterate over an error and the errors behind it: causes, worker failures, wrapped errors.

    Args:
        error: the outermost error.
        with_handled: whether to include errors that were being handled when another was raised.
    """
    seen: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop(0)
        if current is None or current in seen:
            continue
        seen.append(current)
        yield current
        pending += getattr(current, "worker_failures", {}).values()
        pending += [getattr(current, "cause", None), current.__cause__]
        pending.append(getattr(current, "controller_failure", None))
        if with_handled or type(current).__module__.startswith("ray."):
            pending.append(current.__context__)


def root_cause(error: BaseException) -> BaseException:
    """Return the first error in the chain with a message for the user, or else the innermost."""
    innermost = error
    for innermost in _chain(error, with_handled=False):
        if isinstance(innermost, EXPLAINED) and getattr(innermost, "cause", None) is None:
            break
    return innermost


def disk_is_full(error: BaseException) -> bool:
    """Return whether an error or one of its causes reports a full disk.

    SQLite and safetensors report it with their own messages, in errors that are not OSErrors.
    """
    return any(
        (isinstance(one, OSError) and one.errno == errno.ENOSPC)
        or any(words in str(one) for words in NO_SPACE)
        for one in _chain(error, with_handled=True)
    )


def out_of_memory(error: BaseException) -> str | None:
    """Return what an error or one of its causes reports about too little memory; None if nothing.

    Libraries report it in errors of many classes, and Ray in the text of a lost worker's error.
    """
    for one in _chain(error, with_handled=True):
        if isinstance(one, MemoryError) and not str(one):
            return "a process could not allocate memory"
        for line in str(one).splitlines():
            if any(words.lower() in line.lower() for words in NO_MEMORY):
                return " ".join(line.split())[:200]
        if isinstance(one, MemoryError):
            return str(one)[:200]
    return None
