"""Axes of the pictures of a sweep: where values lie, their tick labels, and their colors.

Positions are in the units of an SVG view box, with y = 0 at the top.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

LABEL_CHARACTERS = 18
LABEL_LINES = 3
TICK_CHARACTERS = 14
MOST_CATEGORY_TICKS = 16
ROUND_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
COLORS = (
    (0xC9, 0xD2, 0x3A),
    (0x5E, 0xC9, 0x62),
    (0x21, 0x91, 0x8C),
    (0x3B, 0x52, 0x8B),
    (0x44, 1, 0x54),
)
"""Colors from the lowest to the highest metric: viridis reversed, which suits color-blind readers
and prints in order of darkness. Its brightest yellow is left out, since it is faint on white."""


def number_text(value: Any) -> str:
    """Return a value of a setting as short text: four significant digits, 1e-5 and not 1e-05."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, float):
        return re.sub(r"e([+-])0+", r"e\1", f"{value:.4g}").replace("e+", "e")
    if isinstance(value, (list, tuple)):
        return " ".join(map(number_text, value))
    return str(value)


def shortened(text: str, most: int) -> str:
    """Return the text, or a part of it and two dots if it has more than `most` characters.

    The end of a path tells more than its beginning.
    """
    if len(text) <= most:
        return text
    return f"..{text[2 - most :]}" if "/" in text else f"{text[: most - 2]}.."


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return the shortest endings of dotted names that tell them apart, such as lr for optim.lr."""
    found = {}
    for name in names:
        parts = name.split(".")
        endings = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        found[name] = next(
            ending
            for ending in endings
            if ending == name
            or not any(
                other.endswith(f".{ending}") or other == ending for other in names if other != name
            )
        )
    return found


def broken_lines(text: str, width: int, hyphenated: bool = False) -> list[str]:
    """Break a name after spaces, dots, slashes and underscores, into lines of at most `width`.

    A part that is longer than `width` has a line of its own, or is broken with a hyphen if
    `hyphenated`.
    """
    lines = [""]
    parts = re.findall(r"[^ ./_]*[ ./_]?", text)
    if hyphenated:
        parts = [
            piece
            for part in parts
            for piece in (
                [part]
                if len(part.rstrip()) <= width
                else [f"{part[: width - 1]}-", *broken_lines(part[width - 1 :], width, True)]
            )
        ]
    for part in parts:
        if lines[-1] and len((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return [line.rstrip() for line in lines if line.strip()]


@dataclass(frozen=True)
class Axis:
    """A vertical axis, from `bottom` up to 0."""

    name: str
    kind: Literal["linear", "log", "category"]
    bottom: float
    low: float = 0.0
    high: float = 1.0
    choices: tuple[str, ...] = ()
    """Labels of the values of a categorical axis, from the bottom up."""
    whole: bool = False
    """Whether only whole numbers lie on the axis."""
    label: list[str] = field(default_factory=list)
    """Lines of the axis's label."""

    def y(self, value: Any) -> float:
        """Return the position of a value."""
        if self.kind == "category":
            place = (self.choices.index(number_text(value)) + 0.5) / len(self.choices)
        else:
            low, high, value = (self._scaled(one) for one in (self.low, self.high, value))
            place = 0.5 if high == low else (value - low) / (high - low)
        return round(self.bottom * (1 - place), 2)

    @property
    def ticks(self) -> list[tuple[float, str, str]]:
        """Position, short label and full label of each tick."""
        if self.kind == "category":
            every = -(-len(self.choices) // MOST_CATEGORY_TICKS)
            return [
                (
                    round(self.bottom * (1 - (index + 0.5) / len(self.choices)), 2),
                    shortened(choice, TICK_CHARACTERS),
                    choice,
                )
                for index, choice in enumerate(self.choices)
                if index % every == 0
            ]
        marks = round_values(self.low, self.high, self.whole)
        if self.kind == "log":
            marks = log_values(self.low, self.high) or marks
        return [(self.y(mark), number_text(mark), number_text(mark)) for mark in marks]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.kind == "log" else float(value)


def round_values(low: float, high: float, whole: bool = False, about: int = 5) -> list[float]:
    """Return about `about` evenly spaced round numbers from low to high."""
    if low == high:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min(ROUND_STEPS, key=lambda factor: abs(math.log(factor * power / rough)))
    if whole:
        step = max(1.0, round(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [round(index * step, 12) for index in range(first, last + 1)]
    return [int(value) for value in values] if whole else values


def log_values(low: float, high: float) -> list[float]:
    """Return powers of ten from low to high, with 2 and 5 times them if there are few.

    Empty if fewer than two of these numbers lie between low and high.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = 1 + (last - first) // 8
    for factors in ((1,), (1, 3), (1, 2, 5)):
        values = [
            float(f"{factor}e{power}")
            for power in range(first, last + 1, every)
            for factor in factors
        ]
        values = [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(values) >= 3:
            return values
    return values if len(values) >= 2 else []


def axis_of(
    name: str, label: str, distribution: BaseDistribution, seen: Iterable[Any], bottom: float
) -> Axis:
    """Return the axis of a searched value: the whole range that was searched, and what was used.

    Args:
        name: Dotted name of the config field.
        label: Name to show.
        distribution: What was searched.
        seen: Values of the trials. They may lie outside, since some searches perturb values.
        bottom: Length of the axis.
    """
    lines = broken_lines(label, LABEL_CHARACTERS)
    if len(lines) > LABEL_LINES:
        lines = [
            *lines[: LABEL_LINES - 1],
            shortened("".join(lines[LABEL_LINES - 1 :]), LABEL_CHARACTERS),
        ]
    lines = [shortened(line, LABEL_CHARACTERS + 4) for line in lines]
    if isinstance(distribution, (FloatDistribution, IntDistribution)):
        values = [value for value in seen if value is not None]
        low, high = min([distribution.low, *values]), max([distribution.high, *values])
        return Axis(
            name,
            "log" if distribution.log and low > 0 else "linear",
            bottom,
            low,
            high,
            whole=isinstance(distribution, IntDistribution),
            label=lines,
        )
    choices: list[Any] = [*seen]
    if isinstance(distribution, CategoricalDistribution):
        choices = [*distribution.choices, *choices]
    if all(isinstance(choice, (int, float)) and not isinstance(choice, bool) for choice in choices):
        choices = sorted(choices)
    return Axis(
        name,
        "category",
        bottom,
        choices=tuple(dict.fromkeys(map(number_text, choices))),
        label=lines,
    )


def linear_axis(name: str, values: Sequence[float], bottom: float) -> Axis:
    """Return a linear axis from the least to the greatest value, or around the only one."""
    low, high = min(values), max(values)
    margin = 0.0 if high > low else max(abs(high), 1.0) * 0.05
    return Axis(
        name,
        "linear",
        bottom,
        low - margin,
        high + margin,
        label=broken_lines(name, LABEL_CHARACTERS),
    )


def color_of(value: float, low: float, high: float) -> str:
    """Return the color of a metric between the lowest and the highest, as #rrggbb."""
    place = 1.0 if high == low else (value - low) / (high - low)
    return mixed(min(max(place, 0.0), 1.0))


def mixed(place: float) -> str:
    """Return the color at a place from 0 (lowest) to 1 (highest) of the scale."""
    scaled = place * (len(COLORS) - 1)
    index = min(int(scaled), len(COLORS) - 2)
    rest = scaled - index
    channels = (
        round(one + (other - one) * rest)
        for one, other in zip(COLORS[index], COLORS[index + 1], strict=True)
    )
    return "#" + "".join(f"{channel:02x}" for channel in channels)
