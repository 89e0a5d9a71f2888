"""Marks on config fields, which help, resuming, loading of weights and submission use.

A mark is part of the field's annotation, as in `Annotated[int, FieldMark.OPERATIONAL]`. A mark on a
field that holds a config applies to all fields of that config.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from enum import Enum


@dataclasses.dataclass(frozen=True)
class Common:
    """Mark of a commonly set field, which `--help` shows."""

    group: str
    """Heading in `--help` under which the field is listed."""
    only: tuple[str, ...] = ()
    """For a field that holds a config, the names of the fields to show. Empty shows all of them."""
    if_set: bool = False
    """Whether to show the field only where the default is not None, as in recipes that need it."""


@dataclasses.dataclass(frozen=True)
class Earlier:
    """Mark of a field that earlier versions did not have.

    What they recorded continues under the rules it began with, so a record without the field has
    this value. It replaces today's default only: a value that was asked for is a change of settings
    like any other.
    """

    value: typing.Any


class FieldMark(Enum):
    """A property of a config field."""

    OPERATIONAL = "may change on resume; results then differ at most by rounding and dropout"
    VALIDATION = "affects how validation is computed, but not the trained model"
    KEEPS_SHAPES = "does not change the shapes of weights"
    LOCATION = "a path or URI"
    LOCATION_OR_NAME = (
        "a path, a URI, or a name, such as that of a model on a hub or of an MLflow run"
    )


Mark: typing.TypeAlias = FieldMark | Common | Earlier


def config_fields(config: type) -> Iterator[tuple[dataclasses.Field, object, frozenset[Mark]]]:
    """Iterate over the fields of a config dataclass.

    Yields:
        Each field with its type, without `Annotated`, and its marks.
    """
    hints = typing.get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        marks: set[Mark] = set()
        while typing.get_origin(hint) is typing.Annotated:
            hint, *metadata = typing.get_args(hint)
            marks |= {mark for mark in metadata if isinstance(mark, Mark)}
        yield field, hint, frozenset(marks)


def configs_of(hint: object) -> tuple[type, ...]:
    """Return the config dataclasses that a field of a type may hold; empty for other types."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hints = typing.get_args(hint)
    else:
        hints = (hint,)
    return tuple(one for one in hints if isinstance(one, type) and dataclasses.is_dataclass(one))


def marked_fields(config: type, mark: FieldMark, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all fields with a mark in a config and the configs nested in it."""
    for field, hint, marks in config_fields(config):
        name = f"{prefix}{field.name}"
        if mark in marks:
            yield name
            continue
        for nested in configs_of(hint):
            yield from marked_fields(nested, mark, f"{name}.")


def earlier_values(config: type, prefix: str = "") -> dict[str, typing.Any]:
    """Return what a record without a field means, by dotted name, for all fields marked `Earlier`.

    Fields of nested configs are included.
    """
    found: dict[str, typing.Any] = {}
    for field, hint, marks in config_fields(config):
        name = f"{prefix}{field.name}"
        for mark in marks:
            if isinstance(mark, Earlier):
                found[name] = mark.value
        for nested in configs_of(hint):
            found.update(earlier_values(nested, f"{name}."))
    return found


ConfigType = typing.TypeVar("ConfigType")


def with_earlier_values(
    config: ConfigType, recorded: Collection[str] | Mapping[str, typing.Any], prefix: str = ""
) -> ConfigType:
    """Return a config in which fields that an earlier version did not record have its values.

    A record that was continued once contains these values, and continues with them again.

    Args:
        config: A config dataclass.
        recorded: Dotted names of the settings in the record, or the settings themselves.
        prefix: Dotted name of the config within the record, with a dot at the end.
    """
    changes: dict[str, typing.Any] = {}
    for field, _, marks in config_fields(type(config)):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        earlier = [mark.value for mark in marks if isinstance(mark, Earlier)]
        continued = isinstance(recorded, Mapping) and recorded.get(name) in earlier
        if earlier and value == field.default and (continued or name not in recorded):
            changes[field.name] = earlier[0]
        elif dataclasses.is_dataclass(value):
            changes[field.name] = with_earlier_values(value, recorded, f"{name}.")
    return dataclasses.replace(typing.cast("typing.Any", config), **changes)


def is_below(name: str, names: frozenset[str]) -> bool:
    """Return whether a dotted name is in `names` or lies within a nested config that is."""
    parts = name.split(".")
    return any(".".join(parts[:count]) in names for count in range(1, len(parts) + 1))
