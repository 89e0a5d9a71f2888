"""What can be known of a training before it starts: does it fit, how much memory, how long."""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

import ray
import torch

from pipelines import storage
from pipelines.progress import duration
from pipelines.train_config import TrainConfig
from stgt.config import Precision
from stgt.errors import CheckpointError

if TYPE_CHECKING:
    from stgt.footprint import Footprint

logger = logging.getLogger(__name__)

GPU_CONTEXT_BYTES = 1_000_000_000
"""What CUDA and its libraries take for themselves, about."""
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense bf16 or fp16 operations a second, by the name Ray gives an accelerator."""
FP32_SHARE = 1 / 16
REACHED_ON_GPU = 0.4
REACHED_ON_CPU = 0.3
"""Share of the arithmetic rate that a training step reaches, about."""
CPU_PROBE = 512


def check_cluster(config: TrainConfig) -> None:
    """Check that workers and data workers fit the cluster.

    Raises:
        ValueError: they do not; it says what is missing.
    """
    resources = ray.cluster_resources()
    workers = config.worlds[0]
    needed = config.num_cpus(workers)
    least = "" if workers == config.num_workers else " (the fewest allowed)"
    if resources.get("CPU", 0) < needed:
        raise ValueError(
            f"training needs {needed} CPUs ({workers} workers{least} of "
            f"{config.threads_per_worker}, {config.num_loaders} loaders, 1 for what hands out "
            f"work), the cluster has {resources.get('CPU', 0):g}; lower num_workers or num_loaders"
        )
    if config.use_gpu and resources.get("GPU", 0) < workers:
        raise ValueError(
            f"training needs {workers} GPUs{least}, the cluster has {resources.get('GPU', 0):g}; "
            "lower num_workers or leave use_gpu off"
        )


def check_space(config: TrainConfig, footprint: Footprint) -> None:
    """Check that a checkpoint can be written.

    Raises:
        CheckpointError: there is no space for it.
    """
    free = storage.free_bytes(config.output)
    needed = checkpoint_bytes(footprint)
    if free is not None and free < needed:
        raise CheckpointError(
            f"{config.output} has {free / 1e6:.0f} MB of free space, a checkpoint takes "
            f"{needed / 1e6:.0f} MB; free some or choose another --output"
        )


def checkpoint_bytes(footprint: Footprint) -> int:
    """Size of a checkpoint: trained weights and AdamW's two moments."""
    return footprint.trained * 12


def estimate(config: TrainConfig) -> Footprint:
    """What a pass of one worker takes; of the fewest workers, which hold the most clips."""
    from stgt.footprint import training_footprint  # the whole model, seconds to import

    share = config.global_batch // config.worlds[0]
    clips = max(2, min(share, config.micro_batch or share))
    return training_footprint(
        config.model, config.precision, clips, config.num_frames, config.targets
    )


def announce(config: TrainConfig, footprint: Footprint, num_clips: int, done: int) -> None:
    """Say what a run needs and how long it takes, about."""
    share = config.global_batch // config.num_workers
    clips = min(share, config.micro_batch or share)
    memory = footprint.total_bytes + (GPU_CONTEXT_BYTES if config.use_gpu else 0)
    passes = "" if clips == share else f" in {-(-share // clips)} passes of {clips}"
    logger.info(
        "%s: %d steps of %d clips, %.1f epochs of %s clips; %d x %d clips a step%s",
        config.name,
        config.steps,
        config.global_batch,
        config.steps * config.global_batch / num_clips,
        f"{num_clips:,}",
        config.num_workers,
        share,
        passes,
    )
    logger.info(
        "%s parameters, %s of them trained; about %s a %s (weights %s, optimizer %s, activations "
        "%s); checkpoints of %s",
        _short(footprint.parameters),
        _short(footprint.trained),
        _size(memory),
        "GPU" if config.use_gpu else "worker",
        _size(footprint.weight_bytes),
        _size(footprint.optimizer_bytes),
        _size(footprint.activation_bytes),
        _size(checkpoint_bytes(footprint)),
    )
    rate = _operations_per_s(config)
    if rate is None:
        logger.info("how long it takes will show: this kind of GPU is not known")
        return
    a_clip = footprint.flops / footprint.num_clips
    left = (config.steps - done) * config.global_batch * a_clip
    logger.info(
        "%.3g TFLOP a step; about %s if the data keeps up",
        config.global_batch * a_clip / 1e12,
        duration(left / rate),
    )


def _operations_per_s(config: TrainConfig) -> float | None:
    """What all workers together compute, about."""
    if config.use_gpu:
        peak = next((PEAK_FLOPS[name] for name in _accelerators() if name in PEAK_FLOPS), None)
        if peak is None:
            return None
        return peak * _share_of(config.precision) * REACHED_ON_GPU * config.num_workers
    threads = config.num_workers * config.threads_per_worker
    return _matmul_flops() * min(threads, os.cpu_count() or 1) * REACHED_ON_CPU


def _share_of(precision: Precision) -> float:
    return FP32_SHARE if precision == "fp32" else 1.0


def _accelerators() -> list[str]:
    prefix = "accelerator_type:"
    return [name.removeprefix(prefix) for name in ray.cluster_resources() if prefix in name]


def _matmul_flops() -> float:
    """Operations a second of one CPU thread of this machine, by a short trial."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        matrix = torch.rand(CPU_PROBE, CPU_PROBE)
        seconds = []
        for _ in range(8):
            started = time.perf_counter()
            torch.mm(matrix, matrix)
            seconds.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return 2 * CPU_PROBE**3 / min(seconds)


def _short(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
