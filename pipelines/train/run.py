"""Runs a training, or resumes the one in its output folder."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

from pipelines.artifacts import checkpoints
from pipelines.common import storage, timeline, tracking
from pipelines.common.config import to_dict
from pipelines.common.output_folder import RUN
from pipelines.common.recording import Recording, recorded_result
from pipelines.feed.dataset_checks import digest_of
from pipelines.feed.plan import TrainPlan
from pipelines.train import answers, metrics_log, preflight, run_folder
from pipelines.train.about import about_training
from pipelines.train.config import TrainConfig
from pipelines.train.metrics_sender import MetricsSender
from stgt.errors import CheckpointError, PausedError

if TYPE_CHECKING:
    from ray.train import UserCallback

    from pipelines.train.estimate import Estimate

logger = logging.getLogger(__name__)


class TrainSummary(TypedDict):
    """Result of `run_train`."""

    checkpoint: str
    """The last checkpoint."""
    best_checkpoint: str
    """The checkpoint with the highest validation metric; the last one without validation or with
    select_on = last."""
    step: int
    metrics: dict[str, float]
    run_id: str | None
    """Id of the MLflow run; None if MLflow could not be used yet."""
    seconds: float


def run_train(
    config: TrainConfig,
    parent_id: str | None = None,
    callbacks: Sequence[UserCallback] = (),
    estimate: bool = True,
    connect: Callable[[TrainConfig], None] | None = None,
    reserved: bool = False,
    until: int | None = None,
) -> TrainSummary:
    """Train one stage, resume it, or return its result if it is finished.

    Args:
        config: Config of the run.
        parent_id: Parent MLflow run.
        callbacks: Ray Train callbacks, such as Tune's.
        estimate: Whether to log an estimate of memory and time during the start.
        connect: Connects to Ray. Called after all checks that do not need Ray.
        reserved: Whether the placement group of this process is reserved for the workers, as in a
            trial of a sweep.
        until: Step to pause after; None trains until the last step.

    Raises:
        STGTError: Data or a checkpoint cannot be used, the loss is not finite, or the run was
            stopped on request.
        PausedError: The run reached the step to pause after.
        ValueError: The config does not suit the data or the cluster.
    """
    started = time.monotonic()
    with timeline.span("check data and initial weights"):
        config = preflight.with_architecture(preflight.with_absolute_paths(config))
        # A sweep has resolved what its recipe had earlier, and gives its trials their values.
        config = run_folder.with_earlier_rules(config, keep_recipe=not reserved)
        data = preflight.check_data(config)
        plan = data.plan
        steps = config.steps_for(plan.num_samples)
        config = answers.with_answers(preflight.with_vocabulary(replace(config, steps=steps)))
        preflight.check_initial_weights(config)
    with storage.lock(config.output):
        if run_folder.claim(config, data.digest, data.features):
            preflight.report_shared_videos(config, data)
        preflight.report_repeated_clips(config, plan)
        if config.held_out_uri is not None:
            first = data.sources[0].uri
            data.held_out.write(config.held_out_uri, digest_of(first), config.hold_out)

        def prepare() -> None:
            with ThreadPoolExecutor(1) as thread:
                importing = thread.submit(_import_ray_train)
                if connect is not None:
                    connect(config)
                importing.result()

        recording = _recording(config, parent_id, data)
        with _estimating(config) if estimate else nullcontext() as estimated:
            result = recorded_result(
                storage.join(config.output, run_folder.RESULT),
                recording=recording,
                prepare=prepare,
                work=lambda: _train(config, plan, recording, callbacks, estimated, reserved, until),
                record=lambda result: _record(config, recording, result),
            )
    return TrainSummary(
        checkpoint=result["checkpoint"],
        best_checkpoint=result["best_checkpoint"],
        step=result["step"],
        metrics=result["metrics"],
        run_id=tracking.recorded_run_id(storage.join(config.output, RUN)),
        seconds=round(time.monotonic() - started, 1),
    )


def _estimating(config: TrainConfig) -> AbstractContextManager[Estimate | None]:
    """Estimate memory and time of the steps that are left, if there are any."""
    done = run_folder.latest(config.output) or 0
    if done >= config.steps:
        return nullcontext()
    from pipelines.train.estimate import announcing_estimate

    return announcing_estimate(config, done)


def _import_ray_train() -> None:
    """Import what `_train` needs, while the main thread waits for Ray to start."""
    with timeline.span("import Ray Train"):
        importlib.import_module("pipelines.train.fit")


def _recording(
    config: TrainConfig, parent_id: str | None, data: preflight.TrainingData
) -> Recording:
    kept = storage.join(config.output, metrics_log.FOLDER)
    return Recording(
        config.tracking,
        config.name,
        storage.join(config.output, RUN),
        to_dict(config),
        parent_id,
        meanwhile=f"training continues; its metrics are kept in {kept} and will be sent once "
        "MLflow can be used",
        about=about_training(config, data),
    )


def _train(
    config: TrainConfig,
    plan: TrainPlan,
    recording: Recording,
    callbacks: Sequence[UserCallback],
    estimated: Estimate | None,
    reserved: bool,
    until: int | None,
) -> None:
    """Train the remaining steps and write the result."""
    done = run_folder.latest(config.output) or 0
    # The last run may have been killed before it recorded its best checkpoint.
    run_folder.record_best(config)
    if done > config.steps:
        raise CheckpointError(
            f"{config.output} is at step {done}, beyond the requested {config.steps} steps; "
            "request more steps or choose another --output"
        )
    target = config.steps if until is None else min(until, config.steps)
    if done < target:
        from pipelines.train.fit import fit

        fit(config, plan, recording, callbacks, estimated, target, reserved)
    if target < config.steps:
        raise PausedError(f"{config.name} pauses after step {target}")
    rows = metrics_log.read(config.output, config.steps)
    run_folder.record_best(config)
    chooses = config.validates and config.best_metric is not None
    best = run_folder.best(config.output) if chooses else None
    uri = run_folder.checkpoint_uri(config.output, config.steps)
    result: dict[str, Any] = {
        "checkpoint": uri,
        "best_checkpoint": uri
        if best is None
        else run_folder.checkpoint_uri(config.output, best["step"]),
        "best": best,
        "step": config.steps,
        "metrics": rows[-1]["metrics"] if rows else {},
        "tracked": False,
    }
    storage.write_json(storage.join(config.output, run_folder.RESULT), result)


def _record(config: TrainConfig, recording: Recording, result: dict[str, Any]) -> None:
    """Send the remaining metrics and the checkpoints of a finished run."""
    every_s = config.tracking.send_every_s
    sender = MetricsSender(config.output, recording, every_s, result["step"])
    recording.deliver(sender.send_to)

    def last(run: tracking.Run) -> None:
        uri, step = result["checkpoint"], result["step"]
        run.log_checkpoint(
            config.name,
            uri,
            step,
            result["metrics"],
            time_ms=_time_of(config, step),
            size_bytes=_weights_bytes(uri),
        )

    def best(run: tracking.Run) -> None:
        chosen = result["best"]
        uri, step = result["best_checkpoint"], chosen["step"]
        run.log_metrics({_best_name(chosen["metric"]): chosen["value"]})
        run.log_checkpoint(
            f"{config.name}_best",
            uri,
            step,
            {chosen["metric"]: chosen["value"]},
            final=False,
            time_ms=_time_of(config, step),
            size_bytes=_weights_bytes(uri),
        )

    # A part of a logged model is a file, which a server may not take.
    recording.deliver(last, "files")
    if result["best"] is not None:
        recording.deliver(best, "files")


def _best_name(metric: str) -> str:
    """Return the name under which a run's best value is listed, such as `val_best/t2v/R1`.

    MLflow's pages sort groups of metrics by name, so it follows the curves that it belongs to.
    """
    group, _, rest = metric.partition("/")
    return f"{group}_best/{rest}" if rest else f"{group}_best"


def _time_of(config: TrainConfig, step: int) -> int | None:
    """Return when the metrics of a checkpoint's step were measured, in ms, if it is known."""
    rows = metrics_log.read(config.output, step)
    return rows[-1]["time_ms"] if rows else None


def _weights_bytes(checkpoint: str) -> int | None:
    uri = storage.join(checkpoint, checkpoints.WEIGHTS)
    return storage.size_bytes(uri) if storage.exists(uri) else None
