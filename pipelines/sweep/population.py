"""Population-based training (Jaderberg et al., 2017): settings change while the members train.

All members train up to the same step. Then each of the worst quarter continues with the weights of
one of the best quarter, and with its values, each multiplied by 0.8 or 1.2. Because members wait
for each other, what happens depends on their metrics alone, not on which of them is faster.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.artifacts.checkpoints import BEST, COMPLETE
from pipelines.common import storage
from pipelines.common.tracking import is_late
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.journal import Journal, Trial
from pipelines.sweep.search import next_setting
from pipelines.sweep.space import Parameter, SpaceError, in_words
from pipelines.sweep.trial import TrialJob, forget_fault, job_of, read_fault
from pipelines.train import metrics_log, run_folder

logger = logging.getLogger(__name__)

FACTORS = (0.8, 1.2)
REPLACED = 0.25
"""Fraction of the population that is replaced in each round."""
COMPARED = "compared.json"
"""File in the sweep's folder with the steps at which members were compared."""
CHANGEABLE = ("optim.lr", "optim.weight_decay", "label_smoothing.")


def check_space(space: Mapping[str, Parameter]) -> None:
    """Check that all searched settings may change during a training.

    Raises:
        SpaceError: A setting may not.
    """
    for name in space:
        if not name.startswith(CHANGEABLE) and not name.endswith("dropout"):
            raise SpaceError(
                f"{name} cannot change during a training; with --search pbt, search optim.lr, "
                "optim.weight_decay, dropout rates or label smoothing"
            )


class Population:
    """Decides which member trains next, up to which step and with which values."""

    def __init__(
        self,
        config: SweepConfig,
        space: Mapping[str, Parameter],
        size: int,
        steps: int,
        journal: Journal,
    ) -> None:
        """Begin or continue a population.

        Args:
            config: Config of the sweep.
            space: The searched parameters.
            size: Number of members.
            steps: Number of steps of a training.
            journal: The members so far; it is continued.
        """
        self._config, self._space, self._size = config, space, size
        self._steps, self._journal = steps, journal
        self._round_steps = config.round_steps or config.train.checkpoint_every
        self._record = storage.join(config.output, COMPARED)
        self._compared: list[int] = []
        """Steps at which the members were compared."""
        if storage.exists(self._record):
            self._compared = storage.read_json(self._record)

    def next_job(self, active: Collection[str]) -> TrialJob | None:
        """Return the next part of a member's training; None if members must be waited for.

        Args:
            active: Names of the members that are being trained.
        """
        journal, seed = self._journal, self._config.train.seed
        number = len(journal.trials)
        if number < self._size:
            values = next_setting("random", self._space, number, [], seed, self._size)
            member = journal.begin(number, seed, values)
            return self._job(member, self._boundary_after(0))
        members = journal.unfinished()
        lost = [one for one in members if self._has_diverged(one.name)]
        reached = {one.name: self._reached(one.name) for one in members if one not in lost}
        if not reached:
            self._end(lost)
            return None
        step = min(reached.values())
        if step % self._round_steps == 0 and 0 < step < self._steps and step not in self._compared:
            if active:
                return None
            self._replace_worst(step)
            self._compared.append(step)
            storage.write_json(self._record, self._compared)
            return self.next_job(active)
        until = self._boundary_after(step)
        for member in members:
            behind = reached.get(member.name, until) < until or step == self._steps
            if member.name in reached and member.name not in active and behind:
                return self._job(member, until)
        return None

    def is_over(self, active: Collection[str]) -> bool:
        """Return whether all members have ended."""
        complete = len(self._journal.trials) >= self._size
        return complete and not active and not self._journal.unfinished()

    def _boundary_after(self, step: int) -> int:
        """Return the first step after `step` at which members are compared."""
        return min(self._steps, (step // self._round_steps + 1) * self._round_steps)

    def _reached(self, name: str) -> int:
        return run_folder.latest(self._journal.folder(name)) or 0

    def _has_diverged(self, name: str) -> bool:
        return read_fault(self._journal.folder(name)) is not None

    def _end(self, lost: Sequence[Trial]) -> None:
        """Record the end of members that diverged when there is none left to continue from."""
        for member in lost:
            fault = read_fault(self._journal.folder(member.name))
            assert fault is not None
            step = self._reached(member.name)
            self._journal.end(member.name, "diverged", step, None, fault["reason"])

    def _job(self, member: Trial, until: int) -> TrialJob:
        return {**job_of(member), "until": until}

    def _replace_worst(self, step: int) -> None:
        """Let the worst members continue from the best ones."""
        journal = self._journal
        lost = [one.name for one in journal.unfinished() if self._has_diverged(one.name)]
        metrics = {}
        for member in journal.unfinished():
            if member.name not in lost:
                found = dict(journal.reports(member.name, self._config.metric))
                metrics[member.name] = found.get(step, -np.inf)
        ranked = sorted(metrics, key=lambda name: (-metrics[name], name))
        count = max(1, int((len(ranked) + len(lost)) * REPLACED))
        best = ranked[:count]
        # Members that diverged are replaced first.
        worst = ranked[len(ranked) - max(0, count - len(lost)) :]
        for name in [*lost, *worst]:
            member = journal.trials[name]
            if name in best or any(change["step"] == step for change in member.rounds):
                continue
            generator = np.random.default_rng((self._config.train.seed, member.number, step))
            donor = best[int(generator.integers(len(best)))]
            values = self._perturbed(journal.trials[donor].values, generator)
            _copy_checkpoint(journal.folder(donor), journal.folder(name), step)
            _copy_metrics(journal.folder(donor), journal.folder(name), step)
            journal.change(name, {"step": step, "from": donor, "values": values})
            forget_fault(journal.folder(name))
            logger.info(
                "%s continues at step %d with the weights of %s and %s",
                name,
                step,
                donor,
                in_words(values),
            )

    def _perturbed(
        self, values: Mapping[str, Any], generator: np.random.Generator
    ) -> dict[str, Any]:
        changed: dict[str, Any] = {}
        for name, parameter in self._space.items():
            if parameter.is_list:
                changed[name] = parameter.values[int(generator.integers(len(parameter.values)))]
                continue
            low, high = parameter.values
            value = values[name] * FACTORS[int(generator.integers(len(FACTORS)))]
            value = min(max(value, low), high)
            changed[name] = round(value) if parameter.kind == "randint" else value
        return changed


def _copy_checkpoint(source: str, target: str, step: int) -> None:
    """Copy a checkpoint to another run, whose own checkpoint of that step it replaces."""
    target = run_folder.checkpoint_uri(target, step)
    storage.remove(storage.join(target, COMPLETE))
    with tempfile.TemporaryDirectory() as scratch:
        folder = storage.download_folder(
            run_folder.checkpoint_uri(source, step), Path(scratch) / "checkpoint"
        )
        for path in sorted(folder.iterdir()):
            if path.name != COMPLETE:
                storage.put_file(path, storage.join(target, path.name))
    # Last, since it marks the copy as complete.
    storage.write_bytes(storage.join(target, COMPLETE), b"")


def _copy_metrics(source: str, target: str, step: int) -> None:
    """Give a copied checkpoint its own validation metrics, and let the best be chosen anew."""
    theirs = metrics_log.read(source, step)
    ours = metrics_log.read(target, step)
    if theirs and ours:
        measured = {name: value for name, value in theirs[-1]["metrics"].items() if is_late(name)}
        ours[-1]["metrics"].update(measured)
        metrics_log.write(target, ours)
    elif theirs:
        metrics_log.write(target, [theirs[-1]])
    storage.remove(storage.join(target, BEST))
