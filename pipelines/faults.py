"""What really went wrong, underneath what Ray wraps around an error of a worker."""

from __future__ import annotations

from stgt.errors import STGTError

EXPLAINED = (STGTError, ValueError, OSError)
"""Errors whose message is meant for the user."""


def root_cause(error: BaseException) -> BaseException:
    """The error with a message for the user inside what was wrapped around it, or the innermost."""
    seen: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop(0)
        if current is None or current in seen:
            continue
        seen.append(current)
        if isinstance(current, EXPLAINED) and getattr(current, "cause", None) is None:
            return current
        pending += getattr(current, "worker_failures", {}).values()
        pending += [getattr(current, "cause", None), current.__cause__, current.__context__]
    return seen[-1]
