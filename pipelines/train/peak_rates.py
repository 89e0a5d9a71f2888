"""Arithmetic rates that estimates assume: peak rates of GPUs, and the share that a step reaches.

Importing this module loads neither ray nor torch.
"""

from __future__ import annotations

import time
from typing import Literal

from stgt.config import Precision

GpuType = Literal["H200", "H100", "A100", "L40S", "L4", "A10G", "V100", "T4"]
"""Accelerators whose peak rate is known, by Ray's name."""
PEAK_FLOPS: dict[str, float] = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense bf16 or fp16 operations per second, by Ray's name of the accelerator."""
FP32_SHARE = 1 / 16
REACHED_ON_GPU = 0.4
REACHED_ON_CPU = 0.3
"""Approximate share of the peak arithmetic rate that a training step reaches."""
CPU_PROBE = 512
"""Edge length of the matrices that measure a CPU."""
PROBES = 8


def gpu_flops(gpu_type: str, precision: Precision) -> float | None:
    """Return the operations per second that a step reaches on a GPU; None for an unknown one."""
    peak = PEAK_FLOPS.get(gpu_type)
    return None if peak is None else peak * precision_share(precision) * REACHED_ON_GPU


def precision_share(precision: Precision) -> float:
    """Return the share of the peak rate that a precision has."""
    return FP32_SHARE if precision == "fp32" else 1.0


def measure_cpu_flops() -> float:
    """Measure the matrix operations per second of one CPU thread on this machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        matrix = torch.rand(CPU_PROBE, CPU_PROBE)
        seconds = []
        for _ in range(PROBES):
            started = time.perf_counter()
            torch.mm(matrix, matrix)
            seconds.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return 2 * CPU_PROBE**3 / min(seconds)
