"""Estimates memory per worker, checkpoint size and training time before a run."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipelines.common import timeline
from pipelines.common.cluster import accelerator_types
from pipelines.common.progress import Progress, duration
from pipelines.feed.plan import TrainPlan
from pipelines.train.config import TrainConfig
from pipelines.train.peak_rates import REACHED_ON_CPU, gpu_flops, measure_cpu_flops

if TYPE_CHECKING:
    from stgt.training.footprint import Footprint

logger = logging.getLogger(__name__)

GPU_CONTEXT_BYTES = 1_000_000_000
"""Approximate GPU memory that CUDA and its libraries use."""
MEASURED_S, MEASURED_STEPS = 5.0, 3
"""Minimum time and number of steps after which the estimate is corrected."""
LOOK_EVERY_S = 0.2
"""Time between looks at whether the training has ended while its step is traced."""
SHORT_S = 20.0
"""Time after the first step without GPUs at which memory and time are estimated. Shorter trainings
do without, since tracing a step would take CPUs from them for too little."""


def estimate_footprint(config: TrainConfig) -> Footprint:
    """Estimate what one forward and backward pass of a worker needs.

    The estimate is for the smallest allowed number of workers, where each holds the most clips.
    """
    from stgt.training.footprint import training_footprint

    share = config.global_batch // config.allowed_worker_counts[0]
    clips = max(2, min(share, config.micro_batch or share))
    return training_footprint(
        config.model,
        config.precision,
        clips,
        config.num_frames,
        config.targets,
        from_tokens=bool(config.features.store),
        optimizer=config.optim.optimizer,
    )


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
    the training workers need the same CPUs to start, so the estimate follows the first steps. A
    child process does it, which is ended with the training: a thread could not be stopped, and a
    process that exits while a thread imports or traces with torch logs errors or crashes.

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
                traced = _in_child(config, ended)
            if traced is not None:
                estimate.seconds = _announce(config, traced, done)
        except Exception as error:
            logger.warning("could not estimate memory and time of the run: %s", error)

    thread = threading.Thread(target=work, name="estimate", daemon=True)
    thread.start()
    try:
        yield estimate
    finally:
        ended.set()
        estimate.has_stepped.set()
        thread.join()


@dataclass(frozen=True)
class _Traced:
    """What a child process found out about a training step."""

    footprint: Footprint
    cpu_flops: float | None
    """Operations per second of one CPU thread; None if the training uses GPUs."""


def trace_for_parent() -> None:
    """Trace a step of the config on standard input, and write the result to standard output.

    Both are pickled. This is what the child process runs.
    """
    output, sys.stdout = sys.stdout.buffer, sys.stderr  # a library may print
    config: TrainConfig = pickle.load(sys.stdin.buffer)
    cpu_flops = None if config.use_gpu else measure_cpu_flops()
    pickle.dump(_Traced(estimate_footprint(config), cpu_flops), output)


def _in_child(config: TrainConfig, ended: threading.Event) -> _Traced | None:
    """Trace a step in a child process; None if the training ends meanwhile.

    Raises:
        ChildProcessError: The child process failed; its standard error is that of this process.
    """
    child = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import trace_for_parent; trace_for_parent()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        # Ctrl-C and `ray job stop` send signals to all processes of a session's group.
        start_new_session=True,
    )
    given: bytes | None = pickle.dumps(config)
    with child:
        while not ended.is_set():
            try:
                written, _ = child.communicate(given, timeout=LOOK_EVERY_S)
            except subprocess.TimeoutExpired:
                given = None  # `communicate` has it already
                continue
            if child.returncode != 0:
                raise ChildProcessError(f"its process ended with exit code {child.returncode}")
            return pickle.loads(written)
        child.kill()
    return None


def _announce(config: TrainConfig, traced: _Traced, done: int) -> float | None:
    """Log the approximate memory and time of a run; return the time in seconds, if known."""
    footprint = traced.footprint
    memory = footprint.total_bytes + (GPU_CONTEXT_BYTES if config.use_gpu else 0)
    logger.info(
        "%s parameters, %s of them trainable; approximately %s per %s (weights %s, optimizer %s, "
        "activations %s); checkpoints of %s",
        _short(footprint.parameters),
        _short(footprint.trained),
        _size(memory),
        "GPU" if config.use_gpu else "worker",
        _size(footprint.weight_bytes),
        _size(footprint.optimizer_bytes),
        _size(footprint.activation_bytes),
        _size(footprint.checkpoint_bytes),
    )
    rate = _operations_per_s(config, traced.cpu_flops)
    if rate is None:
        logger.info("cannot estimate the training time: the peak rate of this GPU is unknown")
        return None
    a_clip = footprint.flops / footprint.num_clips
    left = (config.steps - done) * config.global_batch * a_clip
    logger.info(
        "%.3g TFLOP per step; the arithmetic of all steps takes approximately %s; the start, "
        "validation, checkpoints and waiting for data come on top, and the first steps give a "
        "better estimate",
        config.global_batch * a_clip / 1e12,
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
