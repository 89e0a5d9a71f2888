"""Marks on config fields: what a field means for resuming a run, loading weights and short help.

A mark is written in the field's annotation, as in `Annotated[int, FieldMark.OPERATIONAL]`.
A mark on a field that holds a config applies to all fields of that config.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from enum import Enum


class FieldMark(Enum):
    """What is known about a config field."""

    COMMON = "most users set it; `--help` shows it"
    OPERATIONAL = "may change when a run is resumed: results differ by rounding and dropout at most"
    VALIDATION = "part of the identity of validation, but not of what is trained"
    KEEPS_SHAPES = "does not change the shapes of weights"


def config_fields(config: type) -> Iterator[tuple[dataclasses.Field, object, frozenset[FieldMark]]]:
    """The fields of a config dataclass.

    Yields:
        Each field with its type, free of `Annotated`, and its marks.
    """
    hints = typing.get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        marks: set[FieldMark] = set()
        while typing.get_origin(hint) is typing.Annotated:
            hint, *metadata = typing.get_args(hint)
            marks |= {mark for mark in metadata if isinstance(mark, FieldMark)}
        yield field, hint, frozenset(marks)


def marked_fields(config: type, mark: FieldMark, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields of a config, and of configs within it, that carry a mark."""
    for field, hint, marks in config_fields(config):
        name = f"{prefix}{field.name}"
        if mark in marks:
            yield name
        elif dataclasses.is_dataclass(hint):
            yield from marked_fields(typing.cast("type", hint), mark, f"{name}.")


def is_below(name: str, names: frozenset[str]) -> bool:
    """Whether a dotted name is one of some names, or belongs to a config that is."""
    parts = name.split(".")
    return any(".".join(parts[:count]) in names for count in range(1, len(parts) + 1))
