"""Describes a job's command line: a config dataclass with recipes or defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SUPERSEDED = {"--steps": ("--epochs", "None"), "--val-store": ("--hold-out", "0")}
"""Maps a setting to the setting that it replaces and the value that turns that one off."""


@dataclass(frozen=True)
class Recipe:
    """A complete, named config."""

    description: str
    config: Any


@dataclass(frozen=True)
class CommandLine:
    """A job's command line."""

    config: type
    """Config dataclass."""
    description: str
    default: Any = None
    """Config with the defaults; None if some settings are required."""
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    """Configs by name; the first argument selects one. Without it, `default` is used, if any."""
    default_description: str = ""
    """What the job does without a recipe."""
    translate: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: values
    """Returns the settings of a file, nested, under today's names."""
    renamed: Callable[[str], str | None] = lambda flag: None
    """Returns what a flag of earlier versions is called today; None for any other flag."""
    usage: str = ""
    """What follows the job's name on a command line, for help; empty derives it."""
