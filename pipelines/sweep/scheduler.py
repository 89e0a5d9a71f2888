"""Stops trials that are behind others, with Ray Tune's ASHA (Li et al., 2020).

Trials are compared at the same number of optimizer steps. What earlier starts of a sweep measured
is read from the trials' folders, so a sweep that goes on compares with it as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

STEP = "step"
NO_LIMIT = 2**31
"""More steps than any trial has. ASHA ends a trial that reaches its limit, but a finished trial
must still record its result."""

Reports = list[tuple[int, float]]


@dataclass(frozen=True)
class _EarlierTrial:
    """A trial that ended in an earlier start, as far as ASHA reads it."""

    trial_id: str


class RememberingASHA(ASHAScheduler):
    """ASHA that begins with the reports of earlier starts."""

    def __init__(
        self,
        metric: str,
        grace_steps: int,
        reduction_factor: int,
        ended: Mapping[str, Reports],
        unfinished: Mapping[str, Reports],
    ) -> None:
        """Compare trials.

        Args:
            metric: Metric to maximize.
            grace_steps: Minimum number of steps before a trial may be stopped.
            reduction_factor: Of the trials that reach a rung, one in this many continues.
            ended: Reports of trials that ended in earlier starts, by the name of the trial.
            unfinished: Reports of trials that go on.
        """
        super().__init__(
            time_attr=STEP,
            metric=metric,
            mode="max",
            max_t=NO_LIMIT,
            grace_period=grace_steps,
            reduction_factor=reduction_factor,
        )
        self._measured = metric
        self._unfinished = unfinished
        self.stopped: dict[str, str] = {}
        """Why trials were stopped, by name."""
        for name, reports in ended.items():
            self._replay(_EarlierTrial(name), reports)

    def _replay(self, trial: Any, reports: Reports) -> None:
        super().on_trial_add(None, trial)  # type: ignore[arg-type]
        for step, value in reports:
            super().on_trial_result(None, trial, {STEP: step, self._measured: value})  # type: ignore[arg-type]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add a trial with its reports of earlier starts.

        A trial that went on after a report goes on now, whatever was measured since.
        """
        self._replay(trial, self._unfinished.get(trial.config["trial"], []))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        """Decide whether a trial continues."""
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            self.stopped[trial.config["trial"]] = (
                f"behind other trials at step {result[STEP]} "
                f"({self._measured} {result[self._measured]:.1f})"
            )
        return decision
