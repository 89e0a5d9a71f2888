"""One trial of a sweep: its config, and its run in a process of Ray Tune."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypedDict

from ray import tune
from ray.train import UserCallback

from pipelines.common import storage
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.journal import TRIALS, Trial
from pipelines.sweep.space import with_values
from pipelines.train.config import TrainConfig
from pipelines.train.reserved import bundles
from pipelines.train.run import run_train
from pipelines.train.stopping import LASTING
from stgt.errors import NonFiniteLossError, PausedError

logger = logging.getLogger(__name__)

FAULT = "fault.json"
ENDING_S = 60
"""Longest time for the training of a stopped trial to end, before its process gets another one."""


class Fault(TypedDict):
    """Why a training ended without a result, as its process recorded it."""

    diverged: bool
    reason: str


class TrialJob(TypedDict):
    """What Ray Tune hands to the process of a trial."""

    trial: str
    seed: int
    values: dict[str, Any]
    until: int | None
    """Step to pause after; None trains until the last step."""


def job_of(trial: Trial) -> TrialJob:
    """Return what the process of a trial needs to know."""
    return TrialJob(trial=trial.name, seed=trial.seed, values=dict(trial.values), until=None)


def trial_config(
    config: SweepConfig, name: str, seed: int, values: Mapping[str, Any]
) -> TrainConfig:
    """Return the training config of one trial.

    Raises:
        SettingError: The config refuses the values.
    """
    train = replace(
        config.train,
        name=name,
        seed=seed,
        output=storage.join(config.output, TRIALS, name),
        min_workers=None,  # a trial has the resources that were reserved for it
        allow_changes=config.search == "pbt",  # the values of a member change on purpose
    )
    return with_values(train, values)


def resources(config: SweepConfig, job: Mapping[str, Any]) -> tune.PlacementGroupFactory:
    """Return the resources that Tune reserves before it starts a trial.

    The process of the trial itself waits for its workers, so it takes no CPU.
    """
    train = trial_config(config, job["trial"], job["seed"], job["values"])
    return tune.PlacementGroupFactory([{}, *bundles(train)])


class ReportToTune(UserCallback):
    """Hands the metrics of a report to Tune, and ends the training if Tune stops the trial.

    Ray's own callback reports from another process, where Tune's answer cannot reach it. The
    process of a stopped trial would then have to be killed, and could not run another trial.
    """

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Report the metrics of the first worker.

        Raises:
            SystemExit: Tune stopped the trial.
        """
        tune.report(metrics[0])


def run_trial(job: dict[str, Any], config: SweepConfig, parent_id: str | None) -> None:
    """Run one trial. Ray Tune calls this in a separate process, which runs several in turn.

    An error that another attempt would meet again is recorded in the trial's folder. After any
    other, Tune runs the trial again from its last checkpoint.
    """
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(ENDING_S)
    folder = storage.join(config.output, TRIALS, job["trial"])
    try:
        train = trial_config(config, job["trial"], job["seed"], job["values"])
        run_train(
            train,
            parent_id=parent_id,
            callbacks=[ReportToTune()],
            estimate=False,
            reserved=True,
            until=job["until"],
        )
    except PausedError:
        logger.info("%s waits for the others at step %s", job["trial"], job["until"])
    except LASTING as error:
        diverged = isinstance(error, NonFiniteLossError)
        fault = Fault(diverged=diverged, reason=str(error))
        storage.write_json(storage.join(folder, FAULT), fault)
        logger.warning("%s: %s", job["trial"], error)


def read_fault(folder: str) -> Fault | None:
    """Return why the training in a folder ended without a result; None if it did not."""
    uri = storage.join(folder, FAULT)
    return storage.read_json(uri) if storage.exists(uri) else None


def forget_fault(folder: str) -> None:
    """Forget why a training ended, before another attempt."""
    storage.remove(storage.join(folder, FAULT))
