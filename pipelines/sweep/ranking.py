"""Ranks the settings of a sweep by the metrics of their trials.

A *setting* is one combination of searched values; its repeats are trials that differ in the seed.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.sweep.outcome import TrialOutcome

STATUS_ORDER = ("finished", "stopped", "diverged", "failed", "unfinished")


@dataclass(frozen=True)
class SettingResult:
    """A setting and what became of its repeats."""

    number: int
    """Number of the setting."""
    trials: tuple[TrialOutcome, ...]
    """Its repeats, sorted by name."""

    @property
    def values(self) -> dict[str, Any]:
        """The searched values by dotted name."""
        return self.trials[0].values

    @property
    def metrics(self) -> list[float]:
        """Metrics of the repeats that can be used."""
        return [metric for trial in self.trials if (metric := usable_metric(trial)) is not None]

    @property
    def mean(self) -> float | None:
        """Mean metric over the repeats that can be used; None if there is none."""
        return statistics.fmean(self.metrics) if self.metrics else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of the metric over repeats; None for fewer than two."""
        return statistics.stdev(self.metrics) if len(self.metrics) >= 2 else None

    @property
    def is_complete(self) -> bool:
        """Whether all repeats finished with a metric."""
        return all(trial.status == "finished" for trial in self.trials) and (
            len(self.metrics) == len(self.trials)
        )

    @property
    def best_trial(self) -> TrialOutcome | None:
        """The repeat with the highest metric; of equal ones, the first."""
        usable = [trial for trial in self.trials if usable_metric(trial) is not None]
        return max(usable, key=lambda trial: usable_metric(trial) or 0.0) if usable else None

    def count(self, status: str) -> int:
        """Return the number of repeats with a status."""
        return sum(trial.status == status for trial in self.trials)

    @property
    def status(self) -> str:
        """The status of the repeats, such as `finished` or `2 finished, 1 diverged`."""
        counts = Counter(trial.status for trial in self.trials)
        if len(counts) == 1:
            return self.trials[0].status
        return ", ".join(f"{counts[one]} {one}" for one in STATUS_ORDER if counts[one])

    @property
    def steps(self) -> str:
        """The number of steps of the repeats, such as `12` or `4 to 12`."""
        steps = [trial.step for trial in self.trials]
        least, most = min(steps), max(steps)
        return str(most) if least == most else f"{least} to {most}"


def usable_metric(trial: TrialOutcome) -> float | None:
    """Return the metric of a trial that did not diverge or fail; None if there is none."""
    if trial.status in ("diverged", "failed") or trial.metric is None:
        return None
    return trial.metric if math.isfinite(trial.metric) else None


def ranked_settings(trials: Sequence[TrialOutcome]) -> list[SettingResult]:
    """Group trials by setting, best setting first.

    Settings are ordered by the mean metric of their repeats. Those whose repeats did not all finish
    come after all others. A repeat that diverged counts as the worst result, so among them, those
    with fewer diverged repeats come first. Of equal ones, the one with the lower number does.
    """
    groups: dict[int, list[TrialOutcome]] = {}
    for trial in trials:
        groups.setdefault(trial.setting, []).append(trial)
    settings = [
        SettingResult(number, tuple(sorted(group, key=lambda trial: trial.name)))
        for number, group in groups.items()
    ]
    return sorted(settings, key=_rank)


def _rank(setting: SettingResult) -> tuple[Any, ...]:
    mean, diverged = setting.mean, setting.count("diverged")
    if mean is None:  # diverged, which is a result, before those without any
        return (2, -diverged, 0.0, setting.number)
    return (0 if setting.is_complete else 1, diverged, -mean, setting.number)


def best_setting(trials: Sequence[TrialOutcome]) -> SettingResult | None:
    """Return the setting with the highest mean metric; None if no trial can be used.

    `ranked_settings` tells how settings are compared.
    """
    ranked = ranked_settings(trials)
    return ranked[0] if ranked and ranked[0].mean is not None else None
