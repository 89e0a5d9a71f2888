"""The results of a sweep: a table, parameter importance, and an HTML page with pictures.

A *setting* is one combination of searched values; its repeats are trials that differ in the seed.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from pipelines.common import pages
from pipelines.sweep.axes import broken_lines, number_text, short_names, shortened
from pipelines.sweep.outcome import TrialOutcome
from pipelines.sweep.pictures import (
    Curves,
    learning_curves,
    metric_number,
    parallel_coordinates,
    trial_text,
)
from pipelines.sweep.ranking import (
    STATUS_ORDER,
    SettingResult,
    best_setting,
    ranked_settings,
    usable_metric,
)

TABLE_COLUMNS = 100
LONGEST_VALUES = ((16, False), (10, True))
"""Number of characters to which values of a plain-text table are shortened if it is too wide, and
whether it is made as narrow as it can be. The first that fits is used, or else the last."""
TRIAL_PREFIX = "trial_"
LEAST_COLUMN = 7
"""Number of characters to which names of columns are broken if the table is too wide."""
LEAST_TRIALS = 4
"""Least number of trials with a metric from which importance is computed."""
FEW_TRIALS = 20
"""Number of trials below which importance is rough: among five values, fANOVA found the one that
decided the metric in 4 of 10 random searches of 8 trials, in 9 of 10 of 16, and in all of 50."""
SEED = 0
MOST_ROWS = 500
"""Number of settings that the table of the page lists."""

Distributions = Mapping[str, BaseDistribution]


# The table at the end of the log


def settings_table(trials: Sequence[TrialOutcome], metric: str) -> str:
    """Return a plain-text table of settings, best first, and why trials failed below it.

    It is at most 100 columns wide unless there are too many searched values for that. Names are
    broken over several lines for it, long values shortened, and `trial_` left out.

    Args:
        trials: Trials of the sweep.
        metric: Name of the metric.
    """
    ranked = ranked_settings(trials)
    if not ranked:
        return "no trials"
    names = searched_names(trials)
    short = short_names(names)
    repeated = any(len(setting.trials) > 1 for setting in ranked)
    headings = ["rank", "trials" if repeated else "trial", *(short[name] for name in names)]
    headings += [f"{metric} mean +- std (seeds)" if repeated else metric, "status", "steps"]
    rows = [
        [
            str(rank),
            _trial_names(setting),
            *(number_text(setting.values.get(name, "")) for name in names),
            metric_text(setting),
            setting.status,
            setting.steps,
        ]
        for rank, setting in enumerate(ranked, 1)
    ]
    texts = {1, len(headings) - 2} | {
        2 + index
        for index, name in enumerate(names)
        if any(isinstance(trial.values.get(name), str) for trial in trials)
    }
    lines = _laid_out([[heading] for heading in headings], rows, texts)
    for longest, narrow in LONGEST_VALUES:
        if len(lines[0]) > TABLE_COLUMNS:
            lines = _narrowed(headings, rows, texts, longest, narrow)
    return "\n".join([*lines, *_reasons(trials)])


def _narrowed(
    headings: Sequence[str], rows: Sequence[list[str]], left: set[int], longest: int, narrow: bool
) -> list[str]:
    """Return the lines of a table whose names are broken and whose values are shortened.

    Args:
        headings: Names of the columns. The first and last columns do not contain searched values.
        rows: Cells by row.
        left: Columns that are aligned to the left.
        longest: Number of characters to which searched values are shortened.
        narrow: Whether to hyphenate names as well, and to leave out `trial_`.
    """
    searched = range(2, len(headings) - 3)
    rows = [
        [shortened(cell, longest) if i in searched else cell for i, cell in enumerate(row)]
        for row in rows
    ]
    if narrow:
        rows = [[row[0], row[1].removeprefix(TRIAL_PREFIX), *row[2:]] for row in rows]
    broken = [
        broken_lines(heading, max(LEAST_COLUMN, *(len(row[index]) for row in rows)), narrow)
        for index, heading in enumerate(headings)
    ]
    return _laid_out(broken, rows, left, gap=1 if narrow else 2)


def metric_text(setting: SettingResult) -> str:
    """Return the metric of a setting; with repeats, mean, standard deviation and their number."""
    if setting.mean is None:
        return "-"
    mean = metric_number(setting.mean)
    if len(setting.trials) == 1:
        return mean
    spread = "" if setting.deviation is None else f" +- {metric_number(setting.deviation)}"
    return f"{mean}{spread} ({len(setting.metrics)})"


def _laid_out(
    headings: Sequence[Sequence[str]], rows: Sequence[Sequence[str]], left: set[int], gap: int = 2
) -> list[str]:
    """Return the lines of a table with `gap` spaces between columns.

    Columns in `left` are aligned to the left.
    """
    height = max(map(len, headings))
    above = [
        [([""] * (height - len(heading)) + list(heading))[line] for heading in headings]
        for line in range(height)
    ]
    widths = [max(len(row[index]) for row in [*above, *rows]) for index in range(len(headings))]
    ruler = ["-" * width for width in widths]
    return [
        (" " * gap).join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [*above, ruler, *rows]
    ]


def _trial_names(setting: SettingResult) -> str:
    """Return the names of repeats; endings suffice after the first, as in `trial_00003, 00004`."""
    first, *others = (trial.name for trial in setting.trials)
    endings = [other.rpartition("_")[2] for other in others]
    numbers = [int(one) for one in [first.rpartition("_")[2], *endings] if one.isdigit()]
    ascending = [numbers[0] + place for place in range(len(setting.trials))] if numbers else []
    if len(others) > 1 and numbers == ascending:
        return f"{first} to {endings[-1]}"
    return ", ".join([first, *endings])


def _reasons(trials: Sequence[TrialOutcome]) -> list[str]:
    lines = [
        f"{trial.name} {trial.status} at step {trial.step}: {' '.join(trial.reason.split())}"
        for trial in sorted(trials, key=lambda trial: trial.name)
        if trial.status in ("diverged", "failed") and trial.reason
    ]
    return [
        part
        for line in lines
        for part in textwrap.wrap(line, TABLE_COLUMNS, subsequent_indent="  ", max_lines=3)
    ]


def searched_names(trials: Sequence[TrialOutcome]) -> list[str]:
    """Return the dotted names of all searched values, in the order in which they were given."""
    return list(dict.fromkeys(name for trial in trials for name in trial.values))


# Importance


def importance(
    trials: Sequence[TrialOutcome], distributions: Distributions, curves: Curves | None = None
) -> dict[str, float] | str:
    """Compute how much of the variation of the metric each searched value explains (fANOVA).

    A diverged trial counts with the lowest metric of all trials. If trials were stopped early,
    metrics of the last step that all trials validated are compared, because the metric grows with
    the step. Without such a step, the last metric of each trial is taken.

    Args:
        trials: Trials of the sweep, of any search.
        distributions: What was searched, by dotted name.
        curves: Steps and the metric at these steps, by the name of the trial.

    Returns:
        Shares that sum to 1, largest first; or a sentence that says why there are none.
    """
    measured = _comparable_metrics(trials, curves or {})
    lowest = min(measured.values(), default=None)
    results: list[tuple[TrialOutcome, float]] = []
    for trial in trials:
        value = lowest if trial.status == "diverged" else measured.get(trial.name)
        if value is not None and distributions.keys() <= trial.values.keys():
            results.append((trial, value))
    if len(results) < LEAST_TRIALS:
        return (
            f"Parameter importance needs at least {LEAST_TRIALS} trials with a metric, and this "
            f"sweep has {len(results)}."
        )
    seen = {name: [trial.values[name] for trial, _ in results] for name in distributions}
    varied = [name for name, values in seen.items() if len(set(map(number_text, values))) > 1]
    if not varied:
        return (
            "There is no parameter importance, because no searched value differs between the "
            "trials with a metric."
        )
    if len({value for _, value in results}) == 1:
        return (
            "There is no parameter importance, because all trials have the same metric "
            f"({metric_number(results[0][1])})."
        )
    found = _evaluated(results, {name: (distributions[name], seen[name]) for name in varied})
    shares = {**found, **dict.fromkeys(distributions.keys() - found.keys(), 0.0)}
    return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))


def _comparable_metrics(trials: Sequence[TrialOutcome], curves: Curves) -> dict[str, float]:
    """Return metrics by the name of the trial, of the same step if trials were stopped early."""
    last = {trial.name: m for trial in trials if (m := usable_metric(trial)) is not None}
    if all(trial.status == "finished" for trial in trials if trial.name in last):
        return last
    known = [
        {step: value for step, value in curves.get(name, ()) if math.isfinite(value)}
        for name in last
    ]
    shared = set.intersection(*(set(curve) for curve in known))
    if not shared:
        return last
    return {name: curve[max(shared)] for name, curve in zip(last, known, strict=True)}


def _evaluated(
    results: Sequence[tuple[TrialOutcome, float]],
    parameters: Mapping[str, tuple[BaseDistribution, list[Any]]],
) -> dict[str, float]:
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    covering = {name: _covering(*parameter) for name, parameter in parameters.items()}
    for trial, value in results:
        params = {
            name: number_text(trial.values[name])
            if isinstance(distribution, CategoricalDistribution)
            else trial.values[name]
            for name, distribution in covering.items()
        }
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=covering, value=value)
        )
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=SEED))
    return {name: float(share) for name, share in found.items()}


def _covering(distribution: BaseDistribution, values: Sequence[Any]) -> BaseDistribution:
    """Return a distribution of the same kind that contains values outside, as perturbations are."""
    if isinstance(distribution, FloatDistribution):
        low, high = min(distribution.low, *values), max(distribution.high, *values)
        return FloatDistribution(low, high, log=distribution.log)
    if isinstance(distribution, IntDistribution):
        low, high = min(distribution.low, *values), max(distribution.high, *values)
        return IntDistribution(low, high, log=distribution.log)
    assert isinstance(distribution, CategoricalDistribution)
    choices = dict.fromkeys(map(number_text, [*distribution.choices, *values]))
    return CategoricalDistribution(tuple(choices))


# The page


def render_page(
    trials: Sequence[TrialOutcome],
    distributions: Distributions,
    metric: str,
    *,
    title: str = "Sweep",
    curves: Curves | None = None,
    command: str | None = None,
) -> str:
    """Render the report page of a sweep as self-contained HTML.

    Args:
        trials: Trials of the sweep.
        distributions: What was searched, by dotted name.
        metric: Name of the metric, which is maximized.
        title: Title of the page.
        curves: Learning curves by the name of the trial: steps and the metric at these steps.
        command: Command that reproduces the best setting; None if there is no best one.
    """
    best = best_setting(trials)
    best_trial = None if best is None else best.best_trial
    picture = parallel_coordinates(trials, distributions, metric, best_trial)
    ranked = ranked_settings(trials)
    shares = importance(trials, distributions, curves)
    numbers = {trial.name: number for number, trial in enumerate(trials)}
    names = list(distributions)
    values = {
        "title": title,
        "metric": metric,
        "best": best,
        "best_trial": best_trial,
        "best_text": "" if best_trial is None else f"Best: {trial_text(best_trial, metric)}",
        "command": command,
        "counts": Counter(trial.status for trial in trials),
        "statuses": STATUS_ORDER,
        "num_trials": len(trials),
        "settings": ranked[:MOST_ROWS],
        "num_settings": len(ranked),
        "repeated": any(len(setting.trials) > 1 for setting in ranked),
        "names": names,
        "short": short_names(names),
        "numbers": {
            setting.number: " ".join(str(numbers[trial.name]) for trial in setting.trials)
            for setting in ranked
        },
        "texts": {
            setting.number: "; ".join(trial_text(trial, metric) for trial in setting.trials)
            for setting in ranked
        },
        "picture": picture,
        "chart": learning_curves(trials, curves or {}, metric, best_trial),
        "shares": shares if isinstance(shares, dict) else None,
        "few": len(trials) < FEW_TRIALS,
        "no_shares": shares if isinstance(shares, str) else None,
        "unlucky": [trial for trial in trials if trial.status in ("diverged", "failed")],
    }
    filters = {"number": number_text, "metric_text": metric_text, "figure": metric_number}
    return pages.render_page("pipelines.sweep", values, filters)
