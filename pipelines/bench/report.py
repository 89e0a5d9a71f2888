"""The pages of a run of benchmarks and of a comparison of two runs, each one HTML file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.bench.gates import benchmark_of
from pipelines.bench.record import RowRecord, RunRecord, is_busy
from pipelines.common.pages import render_page

PACKAGE = "pipelines.bench"
STRIP_WIDTH = 150
"""Width of the picture beside a row, in pixels."""
STRIP_SPAN = 8.0
"""A strip shows ratios from 1/8 to 8 times the gate; others are drawn at its ends."""
PLOT_WIDTH, PLOT_HEIGHT = 360, 220
MOST_TICKS = 6
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
SMALL_PREFIXES = ((1.0, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n"))
VERDICTS = {
    "met": "met",
    "missed": "missed",
    "other hardware": "not judged",
    "no gate": "no gate",
}


def page(run: RunRecord) -> str:
    """Render the page of a run."""
    rows = [_shown(row) for row in run["rows"]]
    benchmarks = [
        {
            **one,
            "duration": _duration(one["seconds"]),
            "is_busy": is_busy(one["load_at_start"], run["cores"]),
            "rows": [row for row in rows if benchmark_of(row["name"]) == one["name"]],
        }
        for one in run["measurements"]
    ]
    counts = {
        verdict: sum(row["verdict"] == verdict for row in run["rows"]) for verdict in VERDICTS
    }
    return render_page(
        PACKAGE,
        {
            "run": run,
            "benchmarks": benchmarks,
            "counts": counts,
            "verdicts": VERDICTS,
            "is_busy": is_busy(run["load_at_start"][0], run["cores"]),
            "plots": [_plot(curve) for curve in run["curves"]],
            "strip": STRIP_WIDTH,
            "span": f"{STRIP_SPAN:g}",
            "width": PLOT_WIDTH,
            "height": PLOT_HEIGHT,
        },
    )


def comparison_page(values: Mapping[str, Any]) -> str:
    """Render the page of a comparison.

    Args:
        values: `first` and `second`, records of runs; `differing`, sentences; `rows`, RowChanges.
    """
    rows = [
        {
            **row,
            "shown": [
                "-" if row[side] is None else figure(row[side], row["unit"])
                for side in ("first", "second")
            ],
            "percent": "-" if row["change"] is None else f"{100 * (row['change'] - 1):+.1f} %",
            "strips": _strips(row["first_repeats"], row["second_repeats"]),
        }
        for row in values["rows"]
    ]
    order = ("worse", "better", "unknown", "same", "only in the first", "only in the second")
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in order}
    return render_page(
        PACKAGE,
        {**values, "rows": rows, "counts": counts, "strip": STRIP_WIDTH},
        template="compare.html.j2",
    )


def figure(value: float, unit: str) -> str:
    """Return a value with its unit, in the prefix that suits it."""
    if unit == "bytes":
        return _prefixed(value, "B", PREFIXES)
    if unit == "s":
        return _prefixed(value, "s", SMALL_PREFIXES) if abs(value) < 1 else f"{value:,.4g} s"
    if unit == "ratio":
        return f"{value:.3g}"
    number = f"{value:,.0f}" if value == round(value) or abs(value) >= 1e4 else f"{value:.4g}"
    return f"{number} {unit}".strip()


def _prefixed(value: float, unit: str, prefixes: Sequence[tuple[float, str]]) -> str:
    for size, prefix in prefixes:
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _shown(row: RowRecord) -> dict[str, Any]:
    unit = row["unit"]
    return {
        **row,
        "ours_text": figure(row["ours"], unit),
        "ours_spread": _spread(row["ours_repeats"], unit),
        "baseline_text": "-" if row["baseline"] is None else figure(row["baseline"], unit),
        "baseline_spread": _spread(row["baseline_repeats"], unit),
        "is_limit": row["baseline"] is not None and not row["baseline_repeats"],
        "ratio_text": "-" if row["ratio"] is None else figure(row["ratio"], "ratio"),
        "ratio_spread": _spread(row["ratio_repeats"], "ratio"),
        "places": _places(row),
        "verdict_text": VERDICTS[row["verdict"]],
    }


def _spread(values: Sequence[float], unit: str) -> str:
    if len(values) < 2:
        return ""
    low, high = figure(min(values), unit), figure(max(values), unit)
    return (
        f"{low.partition(' ')[0]} to {high}"
        if low.split(" ")[1:] == high.split(" ")[1:]
        else (f"{low} to {high}")
    )


def _places(row: RowRecord) -> list[float]:
    """Return where the ratios of all repeats are on the strip, in pixels; better is further right.

    The gate is in the middle, and the axis is logarithmic.
    """
    limit = row["limit_ratio"]
    if not limit:
        return []
    sign = -1 if row["kind"] == "size" or row["target"].startswith("<") else 1
    places = []
    for ratio in row["ratio_repeats"] or ([] if row["ratio"] is None else [row["ratio"]]):
        position = math.log(ratio / limit, STRIP_SPAN) if ratio > 0 else -1.0
        places.append(round(STRIP_WIDTH * (0.5 + max(-1.0, min(1.0, sign * position)) / 2), 1))
    return places


def _strips(first: Sequence[float], second: Sequence[float]) -> list[dict[str, Any]]:
    """Return the values of two runs as pixels on one scale, for two strips below each other."""
    values = [*first, *second]
    middle = (min(values) + max(values)) / 2
    # Differences of less than a hundredth stay small in the picture.
    span = max(max(values) - min(values), abs(middle) / 50) or 1.0

    def place(value: float) -> float:
        return round(STRIP_WIDTH / 2 + (STRIP_WIDTH - 6) * (value - middle) / span, 1)

    return [
        {
            "ticks": [place(value) for value in side],
            "low": place(min(side)) if side else 0,
            "high": place(max(side)) if side else 0,
        }
        for side in (first, second)
    ]


def _plot(curve: Mapping[str, Any]) -> dict[str, Any]:
    """Return a curve as pixels of a plot with logarithmic axes."""
    sizes, values = curve["sizes"], curve["values"]
    shown = [(size, value) for size, value in zip(sizes, values, strict=True) if value > 0]
    x_low, x_high = _range([size for size, _ in shown])
    y_low, y_high = _range([value for _, value in shown])

    def x(size: float) -> float:
        return round(PLOT_WIDTH * math.log(size / x_low) / math.log(x_high / x_low), 1)

    def y(value: float) -> float:
        return round(PLOT_HEIGHT * (1 - math.log(value / y_low) / math.log(y_high / y_low)), 1)

    line = []
    if curve["exponent"] is not None:
        fitted = [point for point in shown if point[0] >= curve["fitted_from"]]
        middle = [
            math.exp(sum(map(math.log, part)) / len(part)) for part in zip(*fitted, strict=True)
        ]
        for size in (fitted[0][0], fitted[-1][0]):
            value = middle[1] * (size / middle[0]) ** curve["exponent"]
            line.append((x(size), y(max(y_low, min(y_high, value)))))
    return {
        **curve,
        "points": [(x(size), y(value), figure(value, curve["unit"])) for size, value in shown],
        "line": line,
        "x_ticks": [(x(size), _count(size)) for size in _x_ticks(sizes)],
        "y_ticks": [(y(value), figure(value, curve["unit"])) for value in _ticks(y_low, y_high)],
    }


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of a logarithmic axis that shows some values."""
    low, high = min(values), max(values)
    return (low / 1.15, high * 1.15) if high / low > 2 else (low / 2, high * 2)


def _x_ticks(sizes: Sequence[float]) -> list[float]:
    step = -(-len(sizes) // MOST_TICKS)
    return list(sizes)[::step]


def _ticks(low: float, high: float) -> list[float]:
    """Return round values between the ends of a logarithmic axis, at most `MOST_TICKS`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [
            factor * 10.0**power
            for power in range(first, last + 1)
            for factor in factors
            if low <= factor * 10.0**power <= high
        ]
        if len(found) <= MOST_TICKS:
            return found
    return found[:: -(-len(found) // MOST_TICKS)]


def _count(value: float) -> str:
    for size, suffix in PREFIXES[:-1]:
        if value >= size:
            return f"{value / size:g} {suffix}"
    return f"{value:g}"
