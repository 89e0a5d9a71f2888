"""Traces a training step in a child process, to learn its memory and arithmetic.

Importing and tracing a model with torch takes seconds and cannot be interrupted in a thread. A
process that exits meanwhile logs errors of torch or crashes, so a child process does it, which can
be ended at any time. Neither this module nor the parent imports torch.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.train.config import TrainConfig
from pipelines.train.peak_rates import measure_cpu_flops

if TYPE_CHECKING:
    from stgt.training.footprint import Footprint

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.2
"""Time between looks at whether the training has ended meanwhile."""


@dataclass(frozen=True)
class TracedStep:
    """What one worker needs for a step; see `stgt.training.footprint.Footprint`."""

    parameters: int
    trained: int
    total_bytes: int
    weight_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    checkpoint_bytes: int
    flops_per_clip: float
    """Floating-point operations of the forward and backward pass for one clip."""
    cpu_flops: float | None
    """Operations per second of one CPU thread; None if the training uses GPUs."""


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


def trace_in_child(config: TrainConfig, ended: threading.Event) -> TracedStep | None:
    """Trace a step in a child process; return None if the training ends meanwhile.

    Args:
        config: Config of the training.
        ended: Set by another thread when the training ends, which ends the child process.

    Raises:
        OSError: The child process could not be started, or failed.
    """
    with tempfile.TemporaryFile() as given:
        pickle.dump(config, given)
        given.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import trace_for_parent; trace_for_parent()"],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C reaches all processes of the terminal's group
        )
    with child:
        while not ended.is_set():
            try:
                written, said = child.communicate(timeout=LOOK_EVERY_S)
            except subprocess.TimeoutExpired:
                continue
            # `ray job stop` sends SIGTERM to all processes below the job's, and not only to that.
            if child.returncode == -signal.SIGTERM:
                return None
            if child.returncode != 0:
                lines = said.decode(errors="replace").strip()
                logger.debug("the process that traces a step wrote:\n%s", lines)
                last = lines.rpartition("\n")[2]
                raise ChildProcessError(
                    f"its process ended with exit code {child.returncode}"
                    f"{f' ({last})' if last else ''}"
                )
            return pickle.loads(written)
        child.kill()
    return None


def trace_for_parent() -> None:
    """Trace a step of the config on standard input, and write the result to standard output.

    Both are pickled. This is what the child process runs.
    """
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a library may print
    config: TrainConfig = pickle.load(sys.stdin.buffer)
    footprint = estimate_footprint(config)
    traced = TracedStep(
        parameters=footprint.parameters,
        trained=footprint.trained,
        total_bytes=footprint.total_bytes,
        weight_bytes=footprint.weight_bytes,
        optimizer_bytes=footprint.optimizer_bytes,
        activation_bytes=footprint.activation_bytes,
        checkpoint_bytes=footprint.checkpoint_bytes,
        flops_per_clip=footprint.flops / footprint.num_clips,
        cpu_flops=None if config.use_gpu else measure_cpu_flops(),
    )
    with output:
        pickle.dump(traced, output)
