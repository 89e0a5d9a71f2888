"""Pictures of a sweep as positions for SVG: parallel coordinates, and learning curves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from optuna.distributions import BaseDistribution

from pipelines.sweep.axes import (
    Axis,
    axis_of,
    color_of,
    linear_axis,
    mixed,
    number_text,
    round_values,
    short_names,
)
from pipelines.sweep.outcome import TrialOutcome
from pipelines.sweep.ranking import usable_metric

AXIS_HEIGHT = 300
DIVERGED_BELOW = 34
"""Distance of the mark of diverged trials from the lowest metric."""
AXIS_SPACING = 150
LEAST_WIDTH = 720
CURVES_WIDTH, CURVES_HEIGHT = 880, 260
SCALE_COLORS = 9

Curves = Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class Line:
    """The line of one trial."""

    number: int
    """Position of the trial in the sweep."""
    points: str
    """Points of an SVG polyline."""
    end: tuple[float, float]
    """The last point."""
    color: str
    """Color of the metric; empty for a diverged trial, which has none."""
    status: str
    is_best: bool
    text: str
    """The trial in words."""


@dataclass(frozen=True)
class ParallelCoordinates:
    """One vertical axis for each searched value and for the metric, and a line for each trial."""

    width: float
    height: float
    axes: list[tuple[float, Axis]]
    """Horizontal position and axis; the last one is that of the metric."""
    diverged_y: float | None
    """Where lines of diverged trials end; None if no trial diverged."""
    lines: list[Line]
    scale: list[tuple[float, str]]
    """Colors of the metric axis from the top, with their positions from 0 to 1."""
    left_out: Counter[str]
    """Number of trials without a metric, by status."""


@dataclass(frozen=True)
class LearningCurves:
    """The metric by step, with a line for each trial."""

    width: float
    height: float
    steps: list[tuple[float, str]]
    """Position and label of ticks of the horizontal axis."""
    axis: Axis
    lines: list[Line]


def metric_number(value: float) -> str:
    """Return a metric as text: with two decimals, or four significant digits if it is below 1."""
    return f"{value:.2f}" if 1 <= abs(value) < 1e6 or value == 0 else number_text(value)


def trial_text(trial: TrialOutcome, metric: str) -> str:
    """Return a trial in words: its name, values, metric and status."""
    values = ", ".join(f"{name} = {number_text(value)}" for name, value in trial.values.items())
    found = usable_metric(trial)
    measured = "" if found is None else f", {metric} = {metric_number(found)}"
    return f"{trial.name}: {values}{measured} ({trial.status}, step {trial.step})"


def parallel_coordinates(
    trials: Sequence[TrialOutcome],
    distributions: Mapping[str, BaseDistribution],
    metric: str,
    best: TrialOutcome | None,
) -> ParallelCoordinates | None:
    """Draw the searched values and the metric of all trials that diverged or have a metric.

    Args:
        trials: Trials of the sweep.
        distributions: What was searched, by dotted name.
        metric: Name of the metric.
        best: The trial to emphasize.

    Returns:
        The picture; None if no trial has a metric.
    """
    drawn = [
        (number, trial)
        for number, trial in enumerate(trials)
        if (trial.status == "diverged" or usable_metric(trial) is not None)
        and distributions.keys() <= trial.values.keys()
    ]
    metrics = [found for _, trial in drawn if (found := usable_metric(trial)) is not None]
    if not metrics:
        return None
    diverged = len(metrics) < len(drawn)
    spacing = max(AXIS_SPACING, LEAST_WIDTH / len(distributions))
    short = short_names(list(distributions))
    axes = [
        (
            index * spacing,
            axis_of(
                name,
                short[name],
                distribution,
                [trial.values[name] for _, trial in drawn],
                AXIS_HEIGHT,
            ),
        )
        for index, (name, distribution) in enumerate(distributions.items())
    ]
    result = linear_axis(metric, metrics, AXIS_HEIGHT - (DIVERGED_BELOW if diverged else 0))
    width = len(distributions) * spacing

    def line(number: int, trial: TrialOutcome) -> Line:
        found = usable_metric(trial)
        end = (width, AXIS_HEIGHT if found is None else result.y(found))
        points = [*((x, axis.y(trial.values[axis.name])) for x, axis in axes), end]
        return _line(number, trial, points, metric, (min(metrics), max(metrics)), best)

    scale = [place / (SCALE_COLORS - 1) for place in range(SCALE_COLORS)]
    return ParallelCoordinates(
        width=width,
        height=AXIS_HEIGHT,
        axes=[*axes, (width, result)],
        diverged_y=AXIS_HEIGHT if diverged else None,
        lines=[line(number, trial) for number, trial in sorted(drawn, key=_drawing_order(best))],
        scale=[(place, mixed(1 - place)) for place in scale],
        left_out=Counter(trial.status for trial in trials)
        - Counter(trial.status for _, trial in drawn),
    )


def learning_curves(
    trials: Sequence[TrialOutcome], curves: Curves, metric: str, best: TrialOutcome | None
) -> LearningCurves | None:
    """Draw the metric of trials by step.

    Args:
        trials: Trials of the sweep.
        curves: Steps and the metric at these steps, by the name of the trial. Values that are not
            finite are left out.
        metric: Name of the metric.
        best: The trial to emphasize.

    Returns:
        The picture; None if there is no value.
    """
    known = {
        name: [(step, value) for step, value in curve if math.isfinite(value)]
        for name, curve in curves.items()
    }
    drawn = [
        (number, trial)
        for number, trial in enumerate(trials)
        if known.get(trial.name) and trial.status != "failed"
    ]
    if not drawn:
        return None
    values = [value for _, trial in drawn for _, value in known[trial.name]]
    last = max(step for _, trial in drawn for step, _ in known[trial.name])
    axis = linear_axis(metric, values, CURVES_HEIGHT)
    metrics = [found for _, trial in drawn if (found := usable_metric(trial)) is not None]
    span = (min(metrics), max(metrics)) if metrics else (0.0, 0.0)

    def x(step: float) -> float:
        return round(CURVES_WIDTH * step / max(last, 1), 2)

    return LearningCurves(
        width=CURVES_WIDTH,
        height=CURVES_HEIGHT,
        steps=[(x(step), f"{step:,}") for step in round_values(0, max(last, 1), whole=True)],
        axis=axis,
        lines=[
            _line(
                number,
                trial,
                [(x(step), axis.y(value)) for step, value in known[trial.name]],
                metric,
                span,
                best,
            )
            for number, trial in sorted(drawn, key=_drawing_order(best))
        ],
    )


def _drawing_order(
    best: TrialOutcome | None,
) -> Callable[[tuple[int, TrialOutcome]], tuple[bool, float]]:
    """Return a sort key by which better trials are drawn over worse ones, and the best last."""

    def key(numbered: tuple[int, TrialOutcome]) -> tuple[bool, float]:
        found = usable_metric(numbered[1])
        return numbered[1] == best, -math.inf if found is None else found

    return key


def _line(
    number: int,
    trial: TrialOutcome,
    points: Sequence[tuple[float, float]],
    metric: str,
    span: tuple[float, float],
    best: TrialOutcome | None,
) -> Line:
    found = usable_metric(trial)
    return Line(
        number=number,
        points=" ".join(f"{x:g},{y:g}" for x, y in points),
        end=points[-1],
        color="" if found is None else color_of(found, *span),
        status=trial.status,
        is_best=trial == best,
        text=trial_text(trial, metric),
    )
