"""Runs Ray Train: starts the workers and their feed, shows progress, and handles stops."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import ray.train
from ray.data import ExecutionOptions
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback

from pipelines.artifacts.vocabulary import share_vocabulary
from pipelines.common import timeline
from pipelines.common.cluster import ray_storage
from pipelines.common.progress import ProgressChannel
from pipelines.common.ray_errors import EXPLAINED, out_of_memory, root_cause
from pipelines.common.recording import Recording
from pipelines.common.status_board import start_status_board
from pipelines.common.tracking import StepMetrics
from pipelines.common.waiting import telling_of_wait
from pipelines.feed.plan import TrainPlan
from pipelines.train import preflight, run_folder
from pipelines.train.config import TrainConfig
from pipelines.train.connections import ConnectByNodeAddress
from pipelines.train.elastic import EvenSharesTrainer
from pipelines.train.estimate import Estimate, MeasuredProgress, announce_plan
from pipelines.train.exported_metrics import ExportedMetrics
from pipelines.train.metrics_sender import MetricsSender
from pipelines.train.resumable_feed import ResumableFeed
from pipelines.train.stopping import EndOnExplained, NoticeSigterm, stopping_on_sigterm
from stgt.errors import OutOfMemoryError, StoppedError

if TYPE_CHECKING:
    from pipelines.train.job import WorkerJob

logger = logging.getLogger(__name__)


def fit(
    config: TrainConfig,
    plan: TrainPlan,
    recording: Recording,
    callbacks: Sequence[UserCallback],
    estimated: Estimate | None = None,
    until: int | None = None,
    reserved: bool = False,
) -> None:
    """Train until the last step, or until the run is asked to stop.

    Args:
        config: Config with absolute paths and the number of steps.
        plan: Order of the clips.
        recording: The MLflow run.
        callbacks: Ray Train callbacks, such as Tune's.
        estimated: The announced training time; None if none was announced.
        until: Step to stop after; None trains until the last step.
        reserved: Whether the placement group of this process is reserved for the workers.

    Raises:
        STGTError: Data or a checkpoint cannot be used, or the loss is not finite.
        StoppedError: The run was stopped on request, after writing a checkpoint.
        ValueError: The run does not fit the cluster.
    """
    if not reserved:
        preflight.check_cluster(config)
    config = replace(config, vocab=share_vocabulary(config.vocab, config.output))
    resumed = run_folder.latest(config.output) or 0
    if resumed:
        logger.info("%s resumes from step %d", config.name, resumed)
    announce_plan(config, plan)
    if not config.validates and config.select_on != "last":
        logger.warning(
            "no validation clips, so the result is the last checkpoint; set --val-store or "
            "--hold-out to choose the best checkpoint"
        )
    if config.select_on == "test":
        logger.warning(
            "the best checkpoint is chosen on the test split, so its metrics on that split are "
            "optimistic"
        )

    def work(job: WorkerJob) -> None:
        job["progress"].put_nowait({"begun": ray.train.get_context().get_world_rank()})
        # Imported only on the workers: the model's libraries take seconds to load, and Ray Train's
        # controller does not need them. Ray pickles a local function by value, so the controller
        # imports nothing.
        from pipelines.train.prefetch import start_prefetching

        prefetcher = start_prefetching(job)
        from pipelines.train.worker import train_worker

        train_worker(job, prefetcher)

    progress = MeasuredProgress(config, resumed, estimated or Estimate())
    workers = config.num_workers
    board = start_status_board()
    begun = threading.Event()
    exported = ExportedMetrics(config, progress.gauges)

    def has_begun(rank: int) -> None:
        begun.set()
        exported.begun(rank)

    def add_rows(rows: Sequence[StepMetrics]) -> None:
        sender.add(rows)
        exported.add(rows)

    with (
        MetricsSender(config.output, recording, config.tracking.send_every_s, resumed) as sender,
        ProgressChannel(
            progress,
            {
                "rows": add_rows,
                "waited_s": exported.waited,
                "checkpoint": sender.checkpoint,
                "begun": has_begun,
            },
        ) as channel,
        stopping_on_sigterm(board) as asked,
        telling_of_wait(config.name, _smallest_group(config), begun.is_set),
    ):
        trainer = EvenSharesTrainer(
            work,
            allowed_worker_counts=config.allowed_worker_counts,
            reserved=reserved,
            train_loop_config={
                "config": config,
                "progress": channel.queue,
                "board": board,
                "plan": None if config.num_loaders else plan,
                "until": config.steps if until is None else until,
                "timeline": timeline.is_on(),
            },
            scaling_config=ScalingConfig(
                num_workers=workers
                if config.min_workers is None or reserved
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
                callbacks=[  # type: ignore[list-item]
                    *callbacks,
                    EndOnExplained(),
                    NoticeSigterm(),
                    ConnectByNodeAddress(),
                ],
                **ray_storage(config.output),
            ),
            datasets={"train": ResumableFeed(config, plan, board, reserved)}
            if config.num_loaders
            else None,
            dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
        )
        try:
            with timeline.span("Ray Train"):
                trainer.fit()
        except Exception as error:
            cause = root_cause(error)
            if isinstance(cause, EXPLAINED):
                if cause is error:
                    raise
                raise cause from error
            if memory := out_of_memory(error):
                clips = min(config.micro_batch or config.global_batch, config.global_batch)
                raise OutOfMemoryError(
                    f"{config.name} ran out of memory ({memory}); lower --micro-batch (now at most "
                    f"{clips} clips per forward pass), set --model.gradient-checkpointing, or use "
                    "fewer workers per machine, and run the same command again to continue"
                ) from error
            raise
    done = run_folder.latest(config.output) or 0
    if done < (config.steps if until is None else until):
        why = "SIGTERM" if asked.is_set() else "a stop request"
        raise StoppedError(
            f"{config.name} stopped at step {done} of {config.steps} after {why}, with a "
            "checkpoint; run the same command again to resume"
        )


def _smallest_group(config: TrainConfig) -> dict[str, float]:
    """Return the resources that the smallest allowed group of workers needs."""
    workers = config.allowed_worker_counts[0]
    gpus = {"GPU": float(workers)} if config.use_gpu else {}
    return {"CPU": float(workers * config.threads_per_worker), **gpus}
