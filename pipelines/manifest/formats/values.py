"""Converts single values of annotations: ids, times, and values that stand for nothing."""

from __future__ import annotations

import datetime
import decimal
import math
import re
from typing import Any

TIME_FORMS = "seconds (12.5), M:SS, H:MM:SS or H:MM:SS.mmm, with a point or a comma"
NO_VALUES = frozenset(["", "nan", "nat"])
EPOCHS = (datetime.date(1970, 1, 1), datetime.date(1900, 1, 1))
"""Dates of a time of day that a library stores as a date with a time."""
SECONDS_PER_MINUTE, SECONDS_PER_HOUR, HOURS_PER_DAY = 60, 3600, 24

_NUMBER = re.compile(r"\+?(?:\d+[.,]?\d*|[.,]\d+)(?:[eE][+-]?\d+)?")
_CLOCK = re.compile(
    r"(?:(?P<days>\d+) days?,? )?(?:(?P<hours>\d+):(?=\d\d:))?(?P<minutes>\d+)"
    r":(?P<seconds>[0-5]\d(?:[.,]\d+)?)"
)


def is_null(value: Any) -> bool:
    """Return whether a value stands for nothing: None, NaN, NaT or an empty text."""
    if value is None:
        return True
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, str):
        return not value
    return _is_missing_time(value)


def _is_no_text(value: Any) -> bool:
    """Return whether a text stands for nothing, as libraries write missing values to tables."""
    return isinstance(value, str) and value.strip().lower() in NO_VALUES


def _is_missing_time(value: Any) -> bool:
    """Return whether a value is pandas' NaT, which is a date that is not equal to itself."""
    return isinstance(value, datetime.date | datetime.timedelta) and value != value  # noqa: PLR0124


def identifier(value: Any, name: str) -> str | None:
    """Convert an id or the name of a video to text; a missing value is None, and 0 is an id.

    Args:
        value: The value.
        name: Name of the field, for the error.

    Raises:
        ValueError: The value is a list, an object, binary data or a truth value.
    """
    if is_null(value) or _is_no_text(value):
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | decimal.Decimal):
        raise ValueError(  # noqa: TRY004
            f"{name} must be a text or a number, but is {_kind(value)}"
        )
    return str(value)


def required_id(value: Any, name: str) -> str:
    """Convert an id or the name of a video to text.

    Raises:
        ValueError: The value is missing, a list, an object, binary data or a truth value.
    """
    found = identifier(value, name)
    if found is None:
        raise ValueError(f"{name} is missing or empty")
    return found


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bytes):
        return "binary data"
    return f"of the type {type(value).__name__}"


def seconds(value: Any, name: str) -> float | None:
    """Convert a time to seconds; a missing value is None.

    Args:
        value: A number of seconds, a text in one of `TIME_FORMS`, a duration, or a time of day.
        name: Name of the field, for the error.

    Raises:
        ValueError: The value is not a time, or it is negative or infinite.
    """
    if is_null(value) or _is_no_text(value):
        return None
    try:
        found = _seconds(value)
    except OverflowError:  # a number of hundreds of digits
        found = None
    if found is None or not 0 <= found < math.inf:
        raise ValueError(f"{name} = {value!r} is not a valid time; give {TIME_FORMS}")
    return found


def _seconds(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float | decimal.Decimal):
        return float(value)
    if isinstance(value, str):
        return _seconds_of_text(value.strip())
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, datetime.datetime):
        return _seconds_of_clock(value.time()) if value.date() in EPOCHS else None
    if isinstance(value, datetime.time):
        return _seconds_of_clock(value)
    return None


def _seconds_of_text(text: str) -> float | None:
    if _NUMBER.fullmatch(text):
        return float(text.replace(",", "."))
    for epoch in EPOCHS:
        text = text.removeprefix(epoch.isoformat()).lstrip(" T")
    match = _CLOCK.fullmatch(text)
    if match is None:
        return None
    days, hours, minutes = (int(match[name] or 0) for name in ("days", "hours", "minutes"))
    if match["hours"] is not None and minutes >= SECONDS_PER_MINUTE:
        return None
    whole = (days * HOURS_PER_DAY + hours) * SECONDS_PER_HOUR + minutes * SECONDS_PER_MINUTE
    return whole + float(match["seconds"].replace(",", "."))


def _seconds_of_clock(value: datetime.time) -> float:
    whole = value.hour * SECONDS_PER_HOUR + value.minute * SECONDS_PER_MINUTE + value.second
    return whole + value.microsecond / 1e6


def span(value: Any, name: str) -> tuple[float, float]:
    """Convert a pair of times to the start and the end in seconds.

    Raises:
        ValueError: The value is not a pair of times, or the end is not after the start.
    """
    if not isinstance(value, list | tuple) or len(value) != 2:  # noqa: PLR2004
        raise ValueError(f"{name} = {value!r} is not a pair of times; give [start, end]")
    start, end = (seconds(one, name) for one in value)
    if start is None or end is None:
        raise ValueError(f"{name} = {value!r} lacks a time; give [start, end]")
    if end <= start:
        raise ValueError(f"the end ({end} s) is not after the start ({start} s)")
    return start, end
