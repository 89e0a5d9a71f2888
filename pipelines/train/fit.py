"""Runs Ray Train: workers, their feed, progress, and what ends a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pyarrow.fs
from ray.data import ExecutionOptions
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback

from pipelines.common import storage, timeline
from pipelines.common.progress import Progress, ProgressChannel
from pipelines.common.ray_errors import EXPLAINED, root_cause
from pipelines.common.status_board import start_status_board
from pipelines.feed.plan import TrainPlan
from pipelines.train import preflight, run_folder
from pipelines.train.config import TrainConfig
from pipelines.train.elastic import EvenSharesTrainer
from pipelines.train.estimate import announce_plan, announcing_estimate
from pipelines.train.resumable_feed import ResumableFeed
from pipelines.train.stopping import EndOnExplained, NoticeSigterm, stopping_on_sigterm
from stgt.errors import StoppedError

if TYPE_CHECKING:
    from pipelines.train.job import WorkerJob

logger = logging.getLogger(__name__)


def fit(
    config: TrainConfig,
    plan: TrainPlan,
    parent_id: str | None,
    callbacks: Sequence[UserCallback],
    estimate: bool,
) -> None:
    """Train until the last step, or until the run is asked to stop.

    Args:
        config: what to train, with absolute paths and the number of steps.
        plan: the order of its clips.
        parent_id: MLflow run that this one is shown under.
        callbacks: Ray Train callbacks, such as Tune's.
        estimate: log what the run needs and how long it takes before it starts.

    Raises:
        STGTError: data, a checkpoint or a loss is not usable.
        StoppedError: the run was asked to stop; there is a checkpoint.
        ValueError: the run does not fit the cluster.
    """
    preflight.check_cluster(config)
    resumed = run_folder.latest(config.output) or 0
    if resumed:
        logger.info("%s goes on from step %d", config.name, resumed)
    announce_plan(config, plan.num_clips)
    if not config.validates:
        logger.warning(
            "nothing to validate on: the last checkpoint is the result; --val-store or --hold-out "
            "would choose the best"
        )
    if config.select_on == "test":
        logger.warning(
            "the best checkpoint is chosen on the test clips, as published: its figures there "
            "flatter it"
        )

    def work(job: WorkerJob) -> None:
        # Imported on the workers: Ray Train's controller needs no model, whose libraries take
        # seconds to load. Ray sends a local function by value, so the controller imports nothing.
        from pipelines.train.prefetch import start_prefetching

        prefetcher = start_prefetching(job)
        from pipelines.train.worker import train_worker

        train_worker(job, prefetcher)

    progress = Progress(config.name, config.steps, "steps", resumed)
    workers = config.num_workers
    board = start_status_board()
    with (
        ProgressChannel(progress) as channel,
        stopping_on_sigterm(board) as asked,
        announcing_estimate(config, resumed) if estimate else nullcontext(),
    ):
        trainer = EvenSharesTrainer(
            work,
            allowed_worker_counts=config.allowed_worker_counts,
            train_loop_config={
                "config": config,
                "parent_id": parent_id,
                "progress": channel.queue,
                "board": board,
                "timeline": timeline.is_on(),
            },
            scaling_config=ScalingConfig(
                num_workers=workers
                if config.min_workers is None
                else (config.min_workers, workers),
                use_gpu=config.use_gpu,
                resources_per_worker={
                    "CPU": config.threads_per_worker,
                    **({"GPU": 1} if config.use_gpu else {}),
                },
            ),
            run_config=RunConfig(
                name="ray_train",
                failure_config=FailureConfig(max_failures=config.max_failures),
                callbacks=[*callbacks, EndOnExplained(), NoticeSigterm()],  # type: ignore[list-item]
                **_ray_storage(config.output),
            ),
            datasets={"train": ResumableFeed(config, board)},
            dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
        )
        try:
            with timeline.span("Ray Train"):
                trainer.fit()
        except Exception as error:
            cause = root_cause(error)
            if cause is error or not isinstance(cause, EXPLAINED):
                raise
            raise cause from error
    done = run_folder.latest(config.output) or 0
    if done < config.steps:
        why = "SIGTERM" if asked.is_set() else "a request"
        raise StoppedError(
            f"{config.name} stopped at step {done} of {config.steps} by {why}, with a checkpoint; "
            "the same command goes on from there"
        )


def _ray_storage(output: str) -> dict[str, Any]:
    """Where Ray Train keeps its own state: beside the run's, in a file system that it can use."""
    if storage.is_local(output):
        return {"storage_path": output}
    # Ray would look for the endpoint and credentials in other places than the rest of the run.
    fs, path = storage.filesystem(output)
    wrapped = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    return {"storage_path": path, "storage_filesystem": wrapped}
