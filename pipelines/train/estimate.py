"""Estimates memory per worker, checkpoint size and training time before a run."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import ray

from pipelines.common import timeline
from pipelines.common.cluster import accelerator_types
from pipelines.common.progress import Progress, duration
from pipelines.feed.plan import TrainPlan
from pipelines.train.config import TrainConfig
from pipelines.train.peak_rates import REACHED_ON_CPU, gpu_flops
from pipelines.train.tracing import LOOK_EVERY_S, TracedStep, trace_in_child

logger = logging.getLogger(__name__)

GPU_CONTEXT_BYTES = 1_000_000_000
"""Approximate GPU memory that CUDA and its libraries use."""
MEASURED_S, MEASURED_STEPS = 5.0, 3
"""Minimum time and number of steps after which the estimate is corrected."""
JOIN_S = 20.0
"""Longest wait for the estimate to end. It ends at once, unless Ray does not answer."""
SHORT_S = 20.0
"""Time after the first step without GPUs at which memory and time are estimated. Shorter trainings
do without, since the estimate is not worth the processor time that it takes from them."""


def announce_plan(config: TrainConfig, plan: TrainPlan) -> None:
    """Log the number of steps and epochs, and how a step is divided among workers."""
    share = config.global_batch // config.num_workers
    clips = min(share, config.micro_batch or share)
    passes = "" if clips == share else f" in {-(-share // clips)} passes of {clips}"
    samples = f"{plan.num_clips:,} clips"
    if config.epoch_unit == "captions":
        samples = f"{plan.num_samples:,} captions of {samples}"
    logger.info(
        "%s: %d steps of %d clips, %s epochs of %s; %d x %d clips per step%s",
        config.name,
        config.steps,
        config.global_batch,
        f"{config.steps * config.global_batch / plan.num_samples:.1f}".removesuffix(".0"),
        samples,
        config.num_workers,
        share,
        passes,
    )


@dataclass
class Estimate:
    """The training time that was announced."""

    seconds: float | None = None
    """Estimated time of the remaining steps; None until it is known, or if it cannot be."""
    has_stepped: threading.Event = field(default_factory=threading.Event)
    """Set once the first step is done."""


class MeasuredProgress(Progress):
    """Progress of a training, which corrects the estimated time after the first steps."""

    def __init__(self, config: TrainConfig, done: int, estimate: Estimate) -> None:
        super().__init__(config.name, config.steps, "steps", done)
        self._left = config.steps - done
        self._estimate = estimate
        self._first: tuple[float, int] | None = None
        self._measured = False

    def reach(self, done: int, figures: Mapping[str, str] | None = None) -> None:
        """Set the number of finished steps."""
        super().reach(done, figures)
        self._estimate.has_stepped.set()
        now = time.monotonic()
        self._first = self._first or (now, done)
        seconds, steps = now - self._first[0], done - self._first[1]
        if self._measured or seconds < MEASURED_S or steps < MEASURED_STEPS:
            return
        self._measured = True
        before = self._estimate.seconds
        logger.info(
            "measured %.2f s per step over %d steps, so the training takes approximately %s in "
            "all, without the start%s",
            seconds / steps,
            steps,
            duration(seconds / steps * self._left),
            "" if before is None else f" (estimated before: {duration(before)})",
        )


@contextmanager
def announcing_estimate(config: TrainConfig, done: int) -> Iterator[Estimate]:
    """Estimate memory and time in the background, and log them.

    Importing and tracing the model takes seconds. With GPUs they pass while Ray starts. Without,
    the training workers need the same CPUs to start, so the estimate follows the first steps. It
    ends with the training, however far it is.

    Args:
        config: Config of the run.
        done: Number of finished steps.

    Yields:
        The estimate, which is filled in once it is known.
    """
    ended = threading.Event()
    estimate = Estimate()

    def work() -> None:
        if not config.use_gpu:
            estimate.has_stepped.wait()
            ended.wait(timeout=SHORT_S)
        if ended.is_set():
            return
        try:
            with timeline.span("estimate memory and time"):
                step = trace_in_child(config, ended)
        except OSError as error:
            if not ended.is_set():
                logger.warning("could not estimate memory and time of the run: %s", error)
            return
        while config.use_gpu and not ray.is_initialized() and not ended.wait(LOOK_EVERY_S):
            pass  # the kind of GPUs is not known before
        if step is not None and not ended.is_set():
            estimate.seconds = _announce(config, step, done)

    thread = threading.Thread(target=work, name="estimate", daemon=True)
    thread.start()
    try:
        yield estimate
    finally:
        ended.set()
        estimate.has_stepped.set()
        thread.join(timeout=JOIN_S)


def _announce(config: TrainConfig, step: TracedStep, done: int) -> float | None:
    """Log the approximate memory and time of a run; return the time in seconds, if known."""
    memory = step.total_bytes + (GPU_CONTEXT_BYTES if config.use_gpu else 0)
    logger.info(
        "%s parameters, %s of them trainable; approximately %s per %s (weights %s, optimizer %s, "
        "activations %s); checkpoints of %s",
        _short(step.parameters),
        _short(step.trained),
        _size(memory),
        "GPU" if config.use_gpu else "worker",
        _size(step.weight_bytes),
        _size(step.optimizer_bytes),
        _size(step.activation_bytes),
        _size(step.checkpoint_bytes),
    )
    rate = _operations_per_s(config, step.cpu_flops)
    if rate is None:
        logger.info("cannot estimate the training time: the peak rate of this GPU is unknown")
        return None
    step_flops = config.global_batch * step.flops_per_clip
    left = (config.steps - done) * step_flops
    logger.info(
        "%.3g TFLOP per step; the arithmetic of all steps takes approximately %s; the start, "
        "validation, checkpoints and waiting for data come on top, and the first steps give a "
        "better estimate",
        step_flops / 1e12,
        duration(left / rate),
    )
    return left / rate


def _operations_per_s(config: TrainConfig, cpu_flops: float | None) -> float | None:
    """Estimate the operations per second of all workers; None for an unknown GPU."""
    if cpu_flops is None:
        rates = (gpu_flops(name, config.precision) for name in accelerator_types())
        rate = next((rate for rate in rates if rate is not None), None)
        return None if rate is None else rate * config.num_workers
    threads = config.num_workers * config.threads_per_worker
    return cpu_flops * min(threads, os.cpu_count() or 1) * REACHED_ON_CPU


def _short(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
