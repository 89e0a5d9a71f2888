"""Describes a job's command line: a config dataclass with recipes or defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SUPERSEDED = {
    f"--{prefix}{name}": (f"--{prefix}{other}", off)
    for prefix in ("", "train.")
    for name, other, off in (("steps", "epochs", "None"), ("val-store", "hold-out", "0"))
}
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
    """Configs by name; the first argument selects one."""
