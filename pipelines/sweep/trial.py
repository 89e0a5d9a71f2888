"""One trial of a sweep: its config, its run in a process of Ray Tune, and its log lines."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from pipelines.common import storage
from pipelines.sweep.config import SweepConfig
from pipelines.train.config import TrainConfig
from pipelines.train.run import run_train

logger = logging.getLogger(__name__)

DRIVER_CPUS = 1


def trial_config(
    train: TrainConfig, lr: float, threshold: float, trial: str, output: str
) -> TrainConfig:
    """Return the training config of one trial."""
    graph = replace(train.model.graph, similarity_threshold=threshold)
    return replace(
        train,
        name=trial,
        output=storage.join(output, "trials", trial),
        model=replace(train.model, graph=graph),
        optim=replace(train.optim, lr=lr),
    )


def run_trial(params: dict[str, Any], config: SweepConfig, parent_id: str | None) -> None:
    """Run one trial. Ray Tune calls this in a separate process."""
    trial = tune.get_context().get_trial_name()
    train = trial_config(
        config.train, params["lr"], params["similarity_threshold"], trial, config.output
    )
    run_train(train, parent_id=parent_id, callbacks=[TuneReportCallback()], estimate=False)


# Tune continues a sweep only with a trainable of the name that it was started with.
run_trial.__name__ = "_run_trial"


class TrialProgress(tune.Callback):
    """Logs the progress of trials on the driver."""

    def __init__(self, metric: str, total_steps: int) -> None:
        self._metric = metric
        self._total_steps = total_steps

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Log the start of a trial."""
        logger.info("%s starts: %s", trial, _describe(trial.config))

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        """Log a reported metric."""
        logger.info(
            "%s: step %s of %d, %s %.1f",
            trial,
            result.get("step"),
            self._total_steps,
            self._metric,
            result.get(self._metric, float("nan")),
        )

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Log the failure of a trial."""
        logger.error("%s failed; see %s", trial, trial.error_file)


def _describe(params: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {value:g}" for name, value in sorted(params.items()))


def trial_name(trial: Any) -> str:
    """Return a name such as `trial_00000`, which stays the same when the sweep is resumed."""
    return f"trial_{trial.trial_id.rsplit('_', 1)[-1]}"
