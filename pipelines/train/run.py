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

from pipelines.common import storage, timeline, tracking
from pipelines.common.config import to_dict
from pipelines.feed.plan import TrainPlan
from pipelines.train import metrics_log, preflight, run_folder
from pipelines.train.config import TrainConfig
from stgt.errors import CheckpointError

if TYPE_CHECKING:
    from ray.train import UserCallback

logger = logging.getLogger(__name__)


class TrainSummary(TypedDict):
    """Result of `run_train`."""

    checkpoint: str
    """The last checkpoint."""
    best_checkpoint: str
    """The checkpoint with the highest validation metric; the last one without validation."""
    step: int
    metrics: dict[str, float]
    run_id: str | None
    """Id of the MLflow run; None if the server never answered."""
    seconds: float


def run_train(
    config: TrainConfig,
    parent_id: str | None = None,
    callbacks: Sequence[UserCallback] = (),
    estimate: bool = True,
    connect: Callable[[TrainConfig], None] | None = None,
) -> TrainSummary:
    """Train one stage, resume it, or return its result if it is finished.

    Args:
        config: Config of the run.
        parent_id: Parent MLflow run.
        callbacks: Ray Train callbacks, such as Tune's.
        estimate: Whether to log an estimate of memory and time during the start.
        connect: Connects to Ray. Called after all checks that do not need Ray.

    Raises:
        STGTError: Data or a checkpoint cannot be used, the loss is not finite, or the run was
            stopped on request.
        ValueError: The config does not suit the data or the cluster.
    """
    started = time.monotonic()
    with timeline.span("check data and initial weights"):
        config = preflight.with_absolute_paths(config)
        plan, digest = preflight.check_data(config)
        config = preflight.with_vocabulary(replace(config, steps=config.steps_for(plan.num_clips)))
        preflight.check_initial_weights(config)
    with storage.lock(config.output):
        run_folder.claim(config, digest)

        def prepare() -> None:
            with ThreadPoolExecutor(1) as thread:
                importing = thread.submit(_import_ray_train)
                if connect is not None:
                    connect(config)
                importing.result()

        with _estimating(config) if estimate else nullcontext():
            result = tracking.recorded_result(
                storage.join(config.output, run_folder.RESULT),
                open_run=lambda: _open_run(config, parent_id),
                prepare=prepare,
                work=lambda: _train(config, plan, parent_id, callbacks),
                record=lambda run, result: _record(config, run, result),
            )
    return TrainSummary(
        checkpoint=result["checkpoint"],
        best_checkpoint=result["best_checkpoint"],
        step=result["step"],
        metrics=result["metrics"],
        run_id=tracking.recorded_run_id(storage.join(config.output, run_folder.RUN)),
        seconds=round(time.monotonic() - started, 1),
    )


def _estimating(config: TrainConfig) -> AbstractContextManager[None]:
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


def _open_run(config: TrainConfig, parent_id: str | None) -> tracking.Run | None:
    """Open the MLflow run; log a warning and return None if the server does not answer."""
    kept = storage.join(config.output, metrics_log.FOLDER)
    return tracking.Run.open_if_reachable(
        config.tracking,
        config.name,
        storage.join(config.output, run_folder.RUN),
        to_dict(config),
        parent_id,
        meanwhile=f"training continues; its metrics are kept in {kept} and will be sent once "
        "MLflow is reachable",
    )


def _train(
    config: TrainConfig,
    plan: TrainPlan,
    parent_id: str | None,
    callbacks: Sequence[UserCallback],
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
    if done < config.steps:
        from pipelines.train.fit import fit

        fit(config, plan, parent_id, callbacks)
    rows = metrics_log.read(config.output, config.steps)
    run_folder.record_best(config)
    best = run_folder.best(config.output) if config.validates else None
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


def _record(config: TrainConfig, run: tracking.Run, result: dict[str, Any]) -> bool:
    """Send the remaining metrics and the checkpoints of a finished run, and close the run."""
    if not metrics_log.send(config.output, run, result["step"])["complete"]:
        return False
    try:
        run.log_checkpoint(config.name, result["checkpoint"], result["step"], result["metrics"])
        best = result["best"]
        if best is not None:
            name = f"{config.name}_best"
            values = {f"best/{best['metric']}": best["value"]}
            run.log_checkpoint(name, result["best_checkpoint"], best["step"], values, final=False)
        run.finish(succeeded=True)
    except tracking.UnreachableError as error:
        logger.warning("%s; run the same command again to record the checkpoint", error)
        return False
    return True
