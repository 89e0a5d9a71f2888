"""Errors that cross processes: what really went wrong, underneath what Ray wraps around it.

Ray Data turns an error of a stage into text. A stage whose errors are meant for the user therefore
hands them on as a row (`errors_as_rows`), and the driver raises them again (`rows`).
"""

from __future__ import annotations

import errno
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec

import numpy as np
import ray.data
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RaySystemError,
    WorkerCrashedError,
)

from stgt.errors import STGTError

EXPLAINED = (STGTError, ValueError, OSError)
"""Errors whose message is meant for the user."""

LOST = (NodeDiedError, ObjectLostError, RayActorError, RaySystemError, WorkerCrashedError)
"""Errors of Ray's that speak of something the cluster lost."""

ERROR = "error"
"""Column of a pickled error that ends the run; empty bytes or null without one."""
NO_SPACE = ("database or disk is full", "No space left on device", "os error 28")
"""What sqlite, the operating system and Rust call a full disk."""

Arguments = ParamSpec("Arguments")
Block = dict[str, np.ndarray]


def errors_as_rows(stage: Callable[Arguments, Block]) -> Callable[Arguments, Block]:
    """A stage of Ray Data that gives an explained error as a row with the column `error`."""

    @functools.wraps(stage)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Block:
        try:
            return stage(*args, **kwargs)
        except EXPLAINED as error:
            return {ERROR: np.array([pack_error(error)], dtype=object)}

    return call


def pack_error(error: Exception) -> bytes:
    """An error as a value of the column `error`; Ray itself hands on only the words of an error."""
    return pickle.dumps(error)


def raise_packed(error: bytes | None) -> None:
    """Raise the error that a row holds; rows come from workers of this run, so it is trusted."""
    if error:
        raise pickle.loads(error)


def rows(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """Run contained stages and give their rows.

    Raises:
        STGTError, ValueError, OSError: what a stage handed on; the run ends with it.
    """
    for row in dataset.iter_rows():
        raise_packed(row.get(ERROR))
        yield row


def is_of_the_cluster(error: BaseException) -> bool:
    """Whether an error is about a node, a worker or an object that was lost, not about our code."""
    return any(isinstance(one, LOST) for one in _chain(error, with_handled=True))


def _chain(error: BaseException, with_handled: bool) -> Iterator[BaseException]:
    """An error and what it was made of: causes, failures of workers, what Ray wrapped.

    Args:
        error: the outermost.
        with_handled: also errors that were being handled when another one was raised.
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
    """The error with a message for the user inside what was wrapped around it, or the innermost."""
    innermost = error
    for innermost in _chain(error, with_handled=False):
        if isinstance(innermost, EXPLAINED) and getattr(innermost, "cause", None) is None:
            break
    return innermost


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, or what it was made of, says that there is no space left.

    sqlite and safetensors say so in words of their own, in errors that are no OSError.
    """
    return any(
        (isinstance(one, OSError) and one.errno == errno.ENOSPC)
        or any(words in str(one) for words in NO_SPACE)
        for one in _chain(error, with_handled=True)
    )
