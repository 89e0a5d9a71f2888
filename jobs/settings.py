"""What a job's command line sets: a config dataclass, with recipes or defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SUPERSEDED = {"--steps": ("--epochs", "None"), "--val-store": ("--hold-out", "0")}
"""A setting that is given -> the setting that it replaces, and the value that switches it off."""


@dataclass(frozen=True)
class Recipe:
    """A complete, named config."""

    description: str
    config: Any


@dataclass(frozen=True)
class CommandLine:
    """What a job's command line sets."""

    config: type
    """The config dataclass."""
    description: str
    default: Any = None
    """Config that flags change; None when required settings have no default."""
    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    """Configs by name, of which the first argument picks one."""
