"""Stops trials that are behind others, with Ray Tune's ASHA (Li et al., 2020).

Trials are compared at the same number of optimizer steps. What earlier starts of a sweep measured
is read from the trials' folders, so a sweep that goes on compares with it as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
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
        steps_of: Callable[[Mapping[str, Any]], int],
        ended: Mapping[str, Reports],
        unfinished: Mapping[str, Reports],
    ) -> None:
        """Compare trials.

        Args:
            metric: Metric to maximize.
            grace_steps: Minimum number of steps before a trial may be stopped.
            reduction_factor: Of the trials that reach a rung, one in this many continues.
            steps_of: Returns the number of steps of a trial, from its job.
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
            # A report counts at one rung: without this, later ones are compared at rungs that lie
            # between two validations, with other trials at other steps.
            stop_last_trials=False,
        )
        self._steps_of = steps_of
        self._measured = metric
        self._unfinished = unfinished
        self.stopped: dict[str, str] = {}
        """Why trials were stopped, by name."""
        for name, reports in ended.items():
            self._replay(_EarlierTrial(name), reports)

    def _replay(self, trial: Any, reports: Reports) -> str:
        """Compare a trial's earlier reports; return the decision at the last one."""
        super().on_trial_add(None, trial)  # type: ignore[arg-type]
        decision = TrialScheduler.CONTINUE
        for step, value in reports:
            result = {STEP: step, self._measured: value}
            decision = super().on_trial_result(None, trial, result)  # type: ignore[arg-type]
        return decision

    def missed_stop(self, name: str) -> str | None:
        """Return why an unfinished trial is to be stopped by its last report, if it is.

        The process that was to do so may have been killed before it recorded the end.
        """
        reports = self._unfinished.get(name, [])
        if not reports or copy.deepcopy(self)._replay(_EarlierTrial(name), reports) != (
            TrialScheduler.STOP
        ):
            return None
        self._replay(_EarlierTrial(name), reports)
        return self._reason(*reports[-1])

    def _reason(self, step: int, value: float) -> str:
        return f"behind other trials at step {step} ({self._measured} {value:.1f})"

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add a trial with its reports of earlier starts.

        A trial that went on after a report goes on now, whatever was measured since.
        """
        self._replay(trial, self._unfinished.get(trial.config["trial"], []))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        """Decide whether a trial continues."""
        decision = super().on_trial_result(tune_controller, trial, result)
        if result[STEP] >= self._steps_of(trial.config):
            return TrialScheduler.CONTINUE  # it has nothing left to do but to record its result
        if decision == TrialScheduler.STOP:
            reason = self._reason(result[STEP], result[self._measured])
            self.stopped[trial.config["trial"]] = reason
        return decision
