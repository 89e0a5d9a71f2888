"""Checks the paths in a job's config before it is submitted.

A job on a cluster runs in another folder, and often on another host, than the command that submits
it. A path that is relative, or below the home folder, means something else there.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stgt.errors import SettingError
from stgt.field_marks import FieldMark, marked_fields

TRACKING = ("tracking.uri", "tracking.artifact_uri")
"""Locations in the settings of MLflow tracking, which every job with a run has."""
_SQLITE = re.compile(r"(sqlite(?:\+\w+)?:///)(?!/)(.+)")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class PathError(SettingError):
    """A path of a job means something else on the cluster."""


def locations(config: Any) -> Iterator[tuple[str, str]]:
    """Yield the dotted name of each setting that holds a path or URI, with its value.

    A setting that is a tuple is yielded once for each of its items.
    """
    for name in _names(config):
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, str) and one:
                yield name, one


def tracking_configs(config: Any) -> Iterator[Any]:
    """Yield the settings of MLflow tracking in a config and those nested in it."""
    for prefix in _tracked(config):
        value = config
        for part in f"{prefix}tracking".split("."):
            value = getattr(value, part)
        yield value


def _names(config: Any) -> list[str]:
    names = [
        name
        for mark in (FieldMark.LOCATION, FieldMark.LOCATION_OR_NAME)
        for name in marked_fields(type(config), mark)
    ]
    return names + [f"{prefix}{name}" for prefix in _tracked(config) for name in TRACKING]


def _tracked(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield where a config and those nested in it have settings of MLflow tracking."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "tracking":
            yield prefix
        elif dataclasses.is_dataclass(value):
            yield from _tracked(value, f"{prefix}{field.name}.")


def refuse_relative(config: Any) -> None:
    """Refuse paths that depend on the folder or the user that a job runs as.

    Args:
        config: The job's config.

    Raises:
        PathError: There are such paths; the message has all of them with their absolute form.
    """
    may_be_names = set(marked_fields(type(config), FieldMark.LOCATION_OR_NAME))
    found = []
    for name, value in locations(config):
        absolute = absolute_form(value)
        if absolute is None or (name in may_be_names and not os.path.exists(absolute)):
            continue
        found.append(f"--{name.replace('_', '-')} {absolute} instead of {value}")
    if found:
        raise PathError(
            "the job runs in another folder on the cluster, where relative paths mean something "
            f"else; give {'; '.join(found)}, or a location that all nodes can reach, such as s3://"
        )


def absolute_form(value: str) -> str | None:
    """Return the absolute form of a relative path or sqlite URI; None if it is not relative.

    Raises:
        PathError: The path begins with the home folder of an unknown user.
    """
    if match := _SQLITE.match(value):
        path, mark, query = match.group(2).partition("?")
        return f"{match.group(1)}{Path(path).absolute()}{mark}{query}"
    if _SCHEME.match(value) or value.startswith("/"):
        return None
    try:
        return os.path.normpath(Path(value).expanduser().absolute())
    except RuntimeError as error:
        raise PathError(f"{value} is the home folder of a user who does not exist here") from error


def local_paths(config: Any) -> list[tuple[str, str]]:
    """Return the settings whose value is a path or a file of a node, with these values."""
    return [
        (name, value)
        for name, value in locations(config)
        if value.startswith(("/", "file:", "sqlite:"))
    ]
