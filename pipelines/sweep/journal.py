"""Keeps what a sweep decided in its folder; everything else about a sweep follows from it.

Layout below the sweep's folder:
    trials/NAME/trial.json   the setting and the seed of a trial, written before it starts
    trials/NAME/ended.json   how the trial ended, written once

The rest of `trials/NAME` is the run folder of the training. Ray Tune's own state, in `ray_tune`
while trials run, is not read: a sweep that goes on tells Tune again what these files say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.common import storage
from pipelines.sweep.outcome import Status, TrialOutcome
from pipelines.train import metrics_log, run_folder

TRIALS = "trials"
TRIAL, ENDED = "trial.json", "ended.json"
PREFIX = "trial_"
TUNE_STATE = "ray_tune"
"""Folder of Ray Tune's own state. Earlier versions read it to continue a sweep."""
EARLIER = "order"
"""Field that earlier versions wrote into both files. No decision depended on it."""


@dataclass(frozen=True)
class Trial:
    """A trial that was decided on: a training with a setting and a seed."""

    number: int
    setting: int
    """Number of the setting; the repeats of a setting share it."""
    seed: int
    values: Mapping[str, Any]
    """Searched values by dotted name; in a population, the latest."""
    rounds: tuple[Mapping[str, Any], ...] = field(default=())
    """Changes of the values during the training; only in a population. Each has the step and the
    new values."""

    @property
    def name(self) -> str:
        """Name of the trial, its folder and its run."""
        return f"{PREFIX}{self.number:05d}"


@dataclass(frozen=True)
class End:
    """How a trial ended."""

    status: Status
    step: int
    metric: float | None
    reason: str


class Journal:
    """The trials of a sweep. One process at a time writes to it."""

    def __init__(self, output: str) -> None:
        """Read the trials of a sweep's folder."""
        self._folder = storage.join(output, TRIALS)
        self.trials: dict[str, Trial] = {}
        self.ends: dict[str, End] = {}
        for name in storage.list_names(self._folder):
            found = self._read(name, TRIAL)
            if found is None:
                continue
            found.pop(EARLIER, None)
            rounds = tuple(found.pop("rounds", ()))
            values = dict(found.pop("values"))
            self.trials[name] = Trial(**found, values=values, rounds=rounds)
            ended = self._read(name, ENDED)
            if ended is not None:
                ended.pop(EARLIER, None)
                self.ends[name] = End(**ended)

    def _read(self, name: str, file: str) -> dict[str, Any] | None:
        uri = storage.join(self._folder, name, file)
        return storage.read_json(uri) if storage.exists(uri) else None

    def folder(self, name: str) -> str:
        """Return the run folder of a trial."""
        return storage.join(self._folder, name)

    def begin(self, setting: int, seed: int, values: Mapping[str, Any]) -> Trial:
        """Record a new trial."""
        numbers = [one.number for one in self.trials.values()]
        return self.adopt(1 + max(numbers, default=-1), setting, seed, values)

    def adopt(self, number: int, setting: int, seed: int, values: Mapping[str, Any]) -> Trial:
        """Record a trial with a known number."""
        trial = Trial(number, setting, seed, dict(values))
        self._write(trial)
        return trial

    def change(self, name: str, change: Mapping[str, Any]) -> Trial:
        """Record a change of a trial's values during its training.

        Args:
            name: Name of the trial.
            change: `step` of the change, the new `values`, and what else explains it.
        """
        trial = self.trials[name]
        values = change["values"]
        trial = replace(trial, values=values, rounds=(*trial.rounds, dict(change)))
        self._write(trial)
        return trial

    def _write(self, trial: Trial) -> None:
        # As pairs, since JSON objects are written in alphabetical order.
        record: dict[str, Any] = {**vars(trial), "values": list(trial.values.items())}
        record["rounds"] = [dict(one) for one in trial.rounds]
        storage.write_json(storage.join(self._folder, trial.name, TRIAL), record)
        self.trials[trial.name] = trial

    def end(
        self, name: str, status: Status, step: int, metric: float | None, reason: str = ""
    ) -> End:
        """Record how a trial ended."""
        end = End(status, step, metric, reason)
        storage.write_json(storage.join(self._folder, name, ENDED), vars(end))
        self.ends[name] = end
        return end

    def retry(self, name: str) -> None:
        """Forget the end of a trial, which then continues from its last checkpoint."""
        storage.remove(storage.join(self._folder, name, ENDED))
        del self.ends[name]

    def unfinished(self) -> list[Trial]:
        """Return the trials that have not ended, in the order of their numbers."""
        waiting = [one for name, one in self.trials.items() if name not in self.ends]
        return sorted(waiting, key=lambda one: one.number)

    def outcomes(self) -> list[TrialOutcome]:
        """Return what became of all trials, in the order of their numbers."""
        found = []
        for trial in sorted(self.trials.values(), key=lambda one: one.number):
            end = self.ends.get(trial.name)
            known = {} if end is None else vars(end)
            found.append(
                TrialOutcome(trial.name, trial.setting, trial.seed, dict(trial.values), **known)
            )
        return found

    def reports(self, name: str, metric: str) -> list[tuple[int, float]]:
        """Return the steps of a trial at which the metric was measured, and its values."""
        folder = self.folder(name)
        return [
            (row["step"], row["metrics"][metric])
            for step in metrics_log.steps(folder)
            for row in metrics_log.read(folder, step)
            if metric in row["metrics"]
        ]

    def result(self, name: str) -> dict[str, Any] | None:
        """Return the result of a finished training; None before its end."""
        return self._read(name, run_folder.RESULT)
