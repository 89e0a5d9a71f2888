"""A search over hyper-parameters on Ray Tune: each trial is a Ray Train run of its own.

Trials are child runs of one MLflow run. ASHA compares them at checkpoints, by steps of ours.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from typing import Any, TypedDict

import ray
from ray import tune
from ray.tune import RunConfig, TuneConfig, Tuner
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from pipelines import checkpoints, storage, tracking
from pipelines.config import flatten, to_dict
from pipelines.train import check_inputs, run_train
from pipelines.train_config import SweepConfig, TrainConfig
from stgt.errors import STGTError

logger = logging.getLogger(__name__)

RUN = "mlflow_run.json"
RESULT = "result.json"
CONFIG = "config.json"
NOT_IDENTITY = ("max_concurrent_trials",)
"""Fields that a resumed sweep may change."""
TRIAL_DRIVER_CPUS = 1


class SweepSummary(TypedDict):
    """What `run_sweep` found."""

    trials: int
    failed: int
    stopped_early: int
    best_trial: str
    best_params: dict[str, float]
    best_metric: float
    run_id: str
    seconds: float


def trial_config(
    train: TrainConfig, lr: float, threshold: float, trial: str, output: str
) -> TrainConfig:
    """The training of one trial."""
    graph = replace(train.model.graph, similarity_threshold=threshold)
    return replace(
        train,
        name=trial,
        output=storage.join(output, "trials", trial),
        model=replace(train.model, graph=graph),
        optim=replace(train.optim, lr=lr),
    )


def _run_trial(params: dict[str, Any], config: SweepConfig, parent_id: str) -> None:
    """One trial (runs in a process of Tune's)."""
    trial = tune.get_context().get_trial_name()
    train = trial_config(
        config.train, params["lr"], params["similarity_threshold"], trial, config.output
    )
    run_train(train, parent_id=parent_id, callbacks=[TuneReportCallback()], estimate=False)


class _TrialProgress(tune.Callback):
    """Says on the driver how trials come along."""

    def __init__(self, metric: str, total_steps: int) -> None:
        self._metric = metric
        self._total_steps = total_steps

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """A trial begins."""
        logger.info("%s starts: %s", trial, _describe(trial.config))

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        """A trial reports."""
        logger.info(
            "%s: step %s of %d, %s %.1f",
            trial,
            result.get("step"),
            self._total_steps,
            self._metric,
            result.get(self._metric, float("nan")),
        )

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """A trial fails."""
        logger.error("%s failed; see %s", trial, trial.error_file)


def _describe(params: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {value:g}" for name, value in sorted(params.items()))


def _check_resources(config: SweepConfig) -> None:
    train = config.train
    each = TRIAL_DRIVER_CPUS + train.num_cpus()
    needed = config.max_concurrent_trials * each
    available = ray.cluster_resources().get("CPU", 0)
    if available < needed:
        raise ValueError(
            f"{config.max_concurrent_trials} trials at a time need {needed} CPUs ({each} each: a "
            f"driver, {train.num_workers} workers, {train.num_loaders} loaders, 1 for what hands "
            f"out work), the cluster has {available:g}; lower max_concurrent_trials or "
            "train.num_workers"
        )


def run_sweep(config: SweepConfig) -> SweepSummary:
    """Try every combination of the searched values, and name the best.

    A sweep that was interrupted goes on in the same folder.

    Raises:
        STGTError: a trial failed, or none reported the metric; or the folder holds another sweep.
        ClipStoreError: the clips do not suit the training.
        ValueError: the trials do not fit the cluster.
    """
    started = time.monotonic()
    config = replace(
        config,
        output=storage.resolve(config.output),
        train=replace(config.train, tracking=tracking.resolve(config.train.tracking)),
    )
    check_inputs(config.train)
    _check_resources(config)
    with storage.lock(config.output):
        _claim_sweep(config)
        run = tracking.Run.open(
            config.train.tracking, config.name, storage.join(config.output, RUN)
        )
        succeeded = False
        try:
            run.log_config(to_dict(config))
            summary = _search(config, run)
            run.log_metrics({f"best/{config.metric}": summary["best_metric"]})
            succeeded = True
        finally:
            _close_trials(config)
            run.finish(succeeded)
    summary["seconds"] = round(time.monotonic() - started, 1)
    storage.write_json(storage.join(config.output, RESULT), summary)
    if summary["failed"]:
        raise STGTError(
            f"{summary['failed']} of {summary['trials']} trials failed, see above and "
            f"{storage.join(config.output, 'ray_tune')}; best of the others: "
            f"{summary['best_trial']} with {config.metric} {summary['best_metric']:.1f}; "
            "the same command tries them again"
        )
    return summary


def _claim_sweep(config: SweepConfig) -> None:
    """Write what is searched, or check that it is the same: Tune goes on with what it began."""
    uri = storage.join(config.output, CONFIG)
    values = flatten(json.loads(json.dumps(to_dict(config))))
    if not storage.exists(uri):
        storage.write_json(uri, values)
        return
    found = storage.read_json(uri)
    differing = sorted(
        name
        for name in found.keys() | values.keys()
        if found.get(name) != values.get(name) and name not in NOT_IDENTITY
    )
    if differing:
        raise STGTError(
            f"{config.output} holds a sweep with other settings ({', '.join(differing)}); "
            "choose another output folder, or delete this one"
        )


def _search(config: SweepConfig, run: tracking.Run) -> SweepSummary:
    trainable = tune.with_resources(
        tune.with_parameters(_run_trial, config=config, parent_id=run.run_id),
        {"cpu": TRIAL_DRIVER_CPUS},
    )
    folder = storage.join(config.output, "ray_tune")
    if Tuner.can_restore(folder):
        tuner = Tuner.restore(folder, trainable, resume_unfinished=True, restart_errored=True)
    else:
        tuner = Tuner(
            trainable,
            param_space={
                "lr": tune.grid_search(list(config.lr)),
                "similarity_threshold": tune.grid_search(list(config.similarity_threshold)),
            },
            tune_config=TuneConfig(
                metric=config.metric,
                mode="max",
                max_concurrent_trials=config.max_concurrent_trials,
                scheduler=ASHAScheduler(
                    time_attr="step",
                    # One more than there are: ASHA kills a trial that reaches max_t, and a
                    # finished trial has its checkpoint to enter.
                    max_t=config.train.steps + 1,
                    grace_period=config.grace_steps,
                    reduction_factor=config.reduction_factor,
                ),
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=RunConfig(
                name="ray_tune",
                storage_path=config.output,
                verbose=0,
                callbacks=[_TrialProgress(config.metric, config.train.steps)],
            ),
        )
    results = tuner.fit()
    reported = [
        (result, result.metrics)
        for result in results
        if result.metrics is not None and config.metric in result.metrics
    ]
    if not reported:
        first = next((str(error) for error in results.errors), "no error was recorded")
        raise STGTError(f"no trial reported {config.metric}; the first error: {first[-500:]}")
    best, metrics = max(reported, key=lambda pair: pair[1][config.metric])
    return SweepSummary(
        trials=len(results),
        failed=len(results.errors),
        stopped_early=sum(last["step"] < config.train.steps for _, last in reported),
        best_trial=storage.name_of(best.path),
        best_params={name: float(value) for name, value in (best.config or {}).items()},
        best_metric=metrics[config.metric],
        run_id=run.run_id,
        seconds=0.0,
    )


def _trial_name(trial: Any) -> str:
    """`trial_00000`: found again after a restart of the sweep."""
    return f"trial_{trial.trial_id.rsplit('_', 1)[-1]}"


def _close_trials(config: SweepConfig) -> None:
    """End the MLflow runs of trials that ASHA stopped: their processes had no time to."""
    trials = storage.join(config.output, "trials")
    for name in storage.list_names(trials):
        record = storage.join(trials, name, checkpoints.RUN)
        if storage.exists(record):
            found = storage.read_json(record)
            tracking.Run(found["tracking_uri"], found["run_id"]).close_if_running()
