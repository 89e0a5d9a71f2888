"""The loop of one training worker: reads batches, and writes checkpoints and metrics.

The loop depends only on config and step. Order, augmentation, negatives and dropout are seeded by
the step and the sample, so a restart from the latest complete checkpoint repeats the same steps.
"""

from __future__ import annotations

import logging
import time
from typing import cast

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from ray.exceptions import RayError

from pipelines.common.timeline import Timeline
from pipelines.feed.loader import Batch
from pipelines.train import features, preflight, stopping, validation
from pipelines.train.config import TrainConfig
from pipelines.train.job import WorkerJob
from pipelines.train.metrics_log import MeasuredOn
from pipelines.train.prefetch import BatchPrefetcher
from pipelines.train.recorder import Recorder, Sample, gpu_figures
from pipelines.train.state import WorkerState
from pipelines.train.step import train_step
from stgt.errors import NonFiniteLossError
from stgt.question_answering.head import AnsweringModel
from stgt.question_answering.objective import AnswerObjective
from stgt.training.objective import TrainingObjective
from stgt.training.optimizer import learning_rate

logger = logging.getLogger(__name__)

MAX_OVERFLOWS = 50
"""Maximum number of consecutive fp16 overflows. More than these are not due to the loss scale."""


class LeavingError(RuntimeError):
    """A worker must leave after a checkpoint; the group then restarts without it."""


def train_worker(job: WorkerJob, feed: BatchPrefetcher) -> None:
    """Run the loop of one training worker."""
    config = job["config"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    share = config.global_batch // world
    timeline = Timeline(process=f"training worker {rank}", records=job["timeline"])
    torch.set_num_threads(config.threads_per_worker)
    device = ray.train.torch.get_device()
    with timeline.span("build the model and load weights"):
        state = WorkerState(config, device, writes_encoder=rank == 0)
        features.check_encoder(config, state.model)
    if rank == 0:
        preflight.check_space(config, state.model.count_parameters().trained)
    with timeline.span("prepare recording"):
        recorder = Recorder(job, rank, state.skipped, state.step)
    objective = build_objective(config, state)
    in_one_pass = config.micro_batch is None or config.micro_batch >= share
    parallel: torch.nn.Module = objective
    if in_one_pass:
        parallel = ray.train.torch.prepare_model(
            objective, parallel_strategy_kwargs={"broadcast_buffers": False}
        )
    parallel.train()
    overflows = 0
    measured_on: MeasuredOn | None = None
    while state.step < job["until"]:
        started = time.perf_counter()
        with timeline.span(f"wait for the clips of step {state.step + 1}"):
            batch = feed.next(state.step)
        waited = time.perf_counter() - started
        lr = learning_rate(state.step, config.steps, config.optim)
        with timeline.span(f"step {state.step + 1}"):
            values, overflow = train_step(state, parallel, batch, lr, config, rank, device)
        overflows = overflows + 1 if overflow else 0
        if overflows > MAX_OVERFLOWS:
            raise NonFiniteLossError(state.step, values, batch["clip_id"].tolist())
        state.step += 1
        values["lr"] = lr
        values["temperature"] = float(state.model.temperature.detach())
        recorder.used(_samples(state.step, batch))
        looks = state.step % config.progress_every == 0
        if looks:
            values.update(gpu_figures(device))
        recorder.step(state.step, values, waited, time.perf_counter() - started)
        stop = _stop_request(job["board"], rank, device) if looks else None
        last = state.step == job["until"]
        regular = last or state.step % config.checkpoint_every == 0
        due = regular or stop is not None
        # Skipped before a checkpoint on request, since little time may be left to write it.
        if config.validates and (last or _validation_is_due(config, state.step, regular)):
            with timeline.span("validate"):
                found = validation.validate(state.model, recorder.tokenizer, config, device)
                measured_on = measured_on or validation.measured_on(config)
                recorder.add(found, measured_on)
            parallel.train()
        if due:
            with timeline.span("write a checkpoint"):
                reported = recorder.checkpoint(state)
            # A barrier over all workers; only rank 0's metrics are read.
            ray.train.report({"step": state.step, **(reported if rank == 0 else {})})
        if timeline.records and (looks or due):
            recorder.send_progress({"spans": timeline.drain()})
        if stop == "leave" and not last:
            raise LeavingError(f"a worker must leave; wrote a checkpoint at step {state.step}")
        if stop == "stop":
            return


def build_objective(config: TrainConfig, state: WorkerState) -> TrainingObjective | AnswerObjective:
    """Return the losses that a config asks for, of the model of a worker."""
    if config.questions is not None:
        return AnswerObjective(cast("AnsweringModel", state.model))
    return TrainingObjective(
        state.model,
        config.targets,
        config.gather,
        config.negatives,
        config.label_smoothing,
        config.loss_weights,
    )


def _validation_is_due(config: TrainConfig, step: int, checkpoint_is_due: bool) -> bool:
    if config.validate_every is None:
        return checkpoint_is_due
    return step % config.validate_every == 0 or step == config.steps


def _samples(step: int, batch: Batch) -> list[Sample]:
    return [
        Sample(step=step, position=int(position), clip_id=clip_id, fault=fault)
        for position, clip_id, fault in zip(
            batch["position"], batch["clip_id"], batch["fault"], strict=True
        )
    ]


def _stop_request(board: ActorHandle, rank: int, device: torch.device) -> str | None:
    """Return `stop` if the run must stop, `leave` if a worker must leave, else None.

    All workers return the same.
    """
    asked = 0
    if rank == 0:
        try:
            asked = int(ray.get(board.asked_to_stop.remote(), timeout=5) is not None)
        except RayError as error:
            logger.warning("cannot check for a request to stop: %s", error)
    # Ray reports nodes that are being drained. This is a collective call, so all workers make it.
    draining = ray.train.get_preemption_info() is not None
    leaving = int(draining or stopping.told_to_end())
    signals = torch.tensor([asked, leaving], device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(signals)
    stop, leave = (signals > 0).tolist()
    return "stop" if stop else "leave" if leave else None
