"""Searches hyperparameters with Ray Tune. Each trial is a separate Ray Train run.

Trials are child runs of one MLflow run. ASHA compares them at checkpoints, by optimizer step.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypedDict

from ray import tune
from ray.tune import RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import ASHAScheduler

from pipelines.common import storage, tracking
from pipelines.common.cluster import require_resources
from pipelines.common.config import to_dict, without_credentials
from pipelines.common.output_folder import CONFIG, claim_folder, config_record, settings_of
from pipelines.common.recording import Recording
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.trial import DRIVER_CPUS, TrialProgress, run_trial, trial_name
from pipelines.train import preflight, run_folder
from pipelines.train.metrics_sender import MetricsSender
from stgt.errors import STGTError
from stgt.field_marks import FieldMark, earlier_values, marked_fields, with_earlier_values

logger = logging.getLogger(__name__)

RUN = "mlflow_run.json"
RESULT = "result.json"


class SweepSummary(TypedDict):
    """Result of `run_sweep`."""

    trials: int
    failed: int
    stopped_early: int
    best_trial: str
    best_params: dict[str, float]
    best_metric: float
    run_id: str | None
    """Id of the MLflow run; None if MLflow could not be used."""
    seconds: float


def _check_resources(config: SweepConfig) -> None:
    train, trials = config.train, config.max_concurrent_trials
    each = DRIVER_CPUS + train.num_cpus()
    made_of = (
        f"{each} per trial: 1 driver, {train.num_workers} workers, {train.num_loaders} data "
        "workers, 1 CPU for Ray Data's scheduler tasks"
    )
    require_resources(
        f"running {trials} trials at a time",
        {"CPU": (float(trials * each), made_of)},
        "lower max_concurrent_trials or train.num_workers",
    )


def run_sweep(
    config: SweepConfig, connect: Callable[[SweepConfig], None] | None = None
) -> SweepSummary:
    """Try every combination of the searched values and return the best.

    An interrupted sweep resumes in the same folder.

    Args:
        config: Config of the sweep.
        connect: Connects to Ray. Called after all checks that do not need Ray.

    Raises:
        STGTError: A trial failed, no trial reported the metric, or the folder contains a sweep
            with different settings.
        ClipStoreError: The clips do not suit the training.
        ValueError: The trials do not fit the cluster.
    """
    started = time.monotonic()
    config = replace(
        config,
        output=storage.resolve(config.output),
        train=replace(config.train, tracking=tracking.resolve(config.train.tracking)),
    )
    config = _with_earlier_rules(config)
    preflight.check_data(preflight.with_absolute_paths(config.train))
    with storage.lock(config.output):
        _claim_sweep(config)
        recording = Recording(
            config.train.tracking,
            config.name,
            storage.join(config.output, RUN),
            to_dict(config),
            meanwhile=f"the sweep continues and its results are kept in {config.output}; they will "
            "be sent once MLflow can be used",
        )

        def prepare() -> None:
            tracking.share_credentials(config.train.tracking)
            if connect is not None:
                connect(config)
            _check_resources(config)

        with recording.running(prepare):
            try:
                summary = _search(config, recording.run_id)
            finally:
                _close_trials(config, recording)
            best = {f"best/{config.metric}": summary["best_metric"]}
            recording.deliver(lambda run: run.log_metrics(best))
            summary["run_id"] = recording.run_id
            summary["seconds"] = round(time.monotonic() - started, 1)
            storage.write_json(storage.join(config.output, RESULT), summary)
            if summary["failed"]:
                raise STGTError(
                    f"{summary['failed']} of {summary['trials']} trials failed; see the log above "
                    f"and {storage.join(config.output, 'ray_tune')}; the best other trial is "
                    f"{summary['best_trial']} with {config.metric} {summary['best_metric']:.1f}; "
                    "run the same command again to retry the failed trials"
                )
        recording.finish()
    return summary


def _with_earlier_rules(config: SweepConfig) -> SweepConfig:
    """Return the config under the rules that the sweep in its output folder began with."""
    uri = storage.join(config.output, CONFIG)
    if not storage.exists(uri):
        return config
    return with_earlier_values(config, settings_of(storage.read_json(uri)))


def _claim_sweep(config: SweepConfig) -> None:
    """Write the sweep's config, or check that it is unchanged, since Tune resumes the old sweep."""
    record = config_record("sweep", config)

    def refuse(found: Mapping[str, Any], differing: list[str]) -> STGTError:
        return STGTError(
            f"{config.output} contains a sweep with different settings ({', '.join(differing)}); "
            "choose another output folder, or delete this one"
        )

    operational = {
        name for name in marked_fields(SweepConfig, FieldMark.OPERATIONAL) if "." not in name
    }
    claim_folder(
        config.output,
        CONFIG,
        record,
        refuse,
        compared=lambda one: {**earlier_values(SweepConfig), **settings_of(one)},
        ignored=lambda name: (
            name in operational or name == "train.recipe" or name.startswith("train.tracking.")
        ),
    )


def _search(config: SweepConfig, parent_id: str | None) -> SweepSummary:
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, config=config, parent_id=parent_id),
        {"cpu": DRIVER_CPUS},
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
                    # One more than the last step: ASHA kills a trial that reaches max_t, but a
                    # finished trial must still record its checkpoint.
                    max_t=config.train.steps + 1,
                    grace_period=config.grace_steps,
                    reduction_factor=config.reduction_factor,
                ),
                trial_name_creator=trial_name,
                trial_dirname_creator=trial_name,
            ),
            run_config=RunConfig(
                name="ray_tune",
                storage_path=config.output,
                verbose=0,
                callbacks=[TrialProgress(config.metric, config.train.steps)],
            ),
        )
    with _interruptible():
        results = tuner.fit()
    reported = [
        (result, result.metrics)
        for result in results
        if result.metrics is not None and config.metric in result.metrics
    ]
    if not reported:
        first = next((str(error) for error in results.errors), "no error was recorded")
        raise STGTError(f"no trial reported {config.metric}; the first error was: {first[-500:]}")
    best, metrics = max(reported, key=lambda pair: pair[1][config.metric])
    return SweepSummary(
        trials=len(results),
        failed=len(results.errors),
        stopped_early=sum(last["step"] < config.train.steps for _, last in reported),
        best_trial=storage.name_of(best.path),
        best_params={name: float(value) for name, value in (best.config or {}).items()},
        best_metric=metrics[config.metric],
        run_id=parent_id,
        seconds=0.0,
    )


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt if Tune was interrupted; Tune itself returns as if it had finished.

    Tune sets a handler of SIGINT, which saves the state of the sweep and restores the handler that
    was set before. Without an interrupt, Tune leaves its own handler.
    """
    before = signal.getsignal(signal.SIGINT)
    yield
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or int(os.environ.get("TUNE_DISABLE_SIGINT_HANDLER", "0")):
        return
    if signal.getsignal(signal.SIGINT) is before:
        raise KeyboardInterrupt
    signal.signal(signal.SIGINT, before)


def _close_trials(config: SweepConfig, recording: Recording) -> None:
    """Complete and close the MLflow runs of trials that ASHA killed before they could do so.

    Steps up to the last checkpoint of a killed trial are sent, if the trial had no time to send
    them. Runs of trials that began before the parent run could be opened get their parent here.
    """

    def close(parent: tracking.Run) -> None:
        trials = storage.join(config.output, "trials")
        for name in storage.list_names(trials):
            record = storage.join(trials, name, run_folder.RUN)
            if storage.exists(record):
                found = storage.read_json(record)
                if without_credentials(found["tracking_uri"]) != parent.tracking_uri:
                    continue
                run = tracking.Run(parent.tracking_uri, found["run_id"])
                trial = storage.join(trials, name)
                every_s = config.train.tracking.send_every_s
                sender = MetricsSender(trial, recording, every_s, run_folder.latest(trial) or 0)
                sender.send_to(run)
                run.close_if_running("the sweep stopped this trial")
                run.set_parent(parent.run_id)

    recording.attempt(close)
