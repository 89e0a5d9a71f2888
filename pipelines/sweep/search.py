"""Chooses the setting of a sweep's next trial.

A choice depends on the seed, the number of the setting and the trials before it alone, so a sweep
that was interrupted goes on with the choices of an undisturbed one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.sweep.config import Search
from pipelines.sweep.outcome import TrialOutcome
from pipelines.sweep.space import Parameter, SpaceError

if TYPE_CHECKING:
    import optuna

DEFAULT_SETTINGS = 10
RANDOM_FIRST = 10
"""Settings that TPE draws at random first, unless the sweep has fewer than three times as many."""


@dataclass(frozen=True)
class Judged:
    """A setting that was tried, or is being tried."""

    values: Mapping[str, Any]
    metric: float | None = None
    """Mean over the repeats that were measured."""
    is_over: bool = False
    """Whether all repeats have ended. One that is over without a metric is the worst."""
    failed: bool = False
    """Whether a repeat failed, which says nothing about the setting."""


def check_search(search: Search, space: Mapping[str, Parameter], settings: int | None) -> int:
    """Return the number of settings to try.

    Args:
        search: Kind of the search.
        space: The searched parameters.
        settings: The number asked for; None takes the whole grid, or ten settings.

    Raises:
        SpaceError: The space does not suit the search.
    """
    ranges = [one.name for one in space.values() if not one.is_list]
    grids = [one.name for one in space.values() if one.kind == "grid"]
    if search == "grid":
        if ranges:
            raise SpaceError(
                f"a grid search needs lists of values, but {', '.join(ranges)} has a range; write "
                "grid(VALUES), or use --search random"
            )
        every = math.prod(len(one.values) for one in space.values())
        if settings is not None and settings > every:
            raise SpaceError(
                f"the grid has {every} settings, fewer than --trials {settings}; lower --trials or "
                "add values"
            )
        return every if settings is None else settings
    if search != "random" and grids:
        raise SpaceError(
            f"--search {search} draws values, but {', '.join(grids)} is a grid; write "
            "choice(VALUES), or use --search grid or random"
        )
    return DEFAULT_SETTINGS if settings is None else settings


def next_setting(
    search: Search,
    space: Mapping[str, Parameter],
    number: int,
    before: Sequence[Judged],
    seed: int,
    settings: int,
    attempt: int = 0,
) -> dict[str, Any]:
    """Choose a setting.

    Args:
        search: `grid`, `random`, or `optuna` for Optuna's tree-structured Parzen estimator
            (Bergstra et al., 2011).
        space: The searched parameters.
        number: Number of the setting, from 0.
        before: The settings with smaller numbers, in their order.
        seed: Seed of the search.
        settings: Number of settings of the sweep.
        attempt: Number of choices for the same setting that the config refused.
    """
    if search == "grid":
        return _untried(space, [one.values for one in before])
    generator = np.random.default_rng((seed, number, *([attempt] if attempt else [])))
    if search == "optuna":
        drawn = _with_tpe(space, before, int(generator.integers(2**31)), settings)
    else:
        drawn = _at_random(space, int(generator.integers(2**31)))
    # The combinations of grids take turns, so that each of them occurs equally often.
    grids = {name: one.values for name, one in space.items() if one.kind == "grid"}
    combination = list(itertools.product(*grids.values()))[
        number % math.prod(len(values) for values in grids.values())
    ]
    return {**drawn, **dict(zip(grids, combination, strict=True))} if grids else drawn


def _untried(space: Mapping[str, Parameter], tried: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the first combination of the grid that was not tried."""
    for values in itertools.product(*(one.values for one in space.values())):
        setting = dict(zip(space, values, strict=True))
        if setting not in [dict(one) for one in tried]:
            return setting
    raise ValueError("every combination of the grid was tried")


def _study(sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize", sampler=sampler)


def _asked(study: optuna.Study, space: Mapping[str, Parameter]) -> dict[str, Any]:
    drawn = [one for one in space.values() if one.kind != "grid"]
    return dict(study.ask({one.name: one.distribution() for one in drawn}).params)


def _at_random(space: Mapping[str, Parameter], seed: int) -> dict[str, Any]:
    import optuna

    return _asked(_study(optuna.samplers.RandomSampler(seed)), space)


def _with_tpe(
    space: Mapping[str, Parameter], before: Sequence[Judged], seed: int, settings: int
) -> dict[str, Any]:
    import optuna
    from optuna.trial import TrialState, create_trial

    first = max(2, min(RANDOM_FIRST, settings // 3))
    # With constant_liar, settings that are being tried count as bad, so that others are chosen.
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=first, constant_liar=True)
    study = _study(sampler)
    distributions = {one.name: one.distribution() for one in space.values()}
    for one in before:
        if one.failed:
            continue
        state = TrialState.RUNNING
        if one.is_over:
            # A trial pruned without a value ranks behind all others, as one that diverged must.
            state = TrialState.PRUNED if one.metric is None else TrialState.COMPLETE
        study.add_trial(
            create_trial(
                state=state,
                value=one.metric if state is TrialState.COMPLETE else None,
                params=dict(one.values),
                distributions=distributions,
            )
        )
    return _asked(study, space)


def judged(outcomes: Sequence[TrialOutcome], repeats: int) -> list[Judged]:
    """Return the settings that were tried, in the order of their numbers.

    Args:
        outcomes: Trials of the sweep.
        repeats: Number of trials of each setting.
    """
    by_setting: dict[int, list[TrialOutcome]] = {}
    for one in outcomes:
        by_setting.setdefault(one.setting, []).append(one)
    found = []
    for _, trials in sorted(by_setting.items()):
        over = len(trials) == repeats and all(one.status != "unfinished" for one in trials)
        diverged = any(one.status == "diverged" for one in trials)
        failed = any(one.status == "failed" for one in trials)
        measured = [one.metric for one in trials if one.metric is not None]
        mean = float(np.mean(measured)) if measured and not diverged else None
        found.append(Judged(trials[0].values, mean, over, failed))
    return found
