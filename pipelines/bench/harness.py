"""Measurement tools: alternating runs, medians, and peak memory in a separate process."""

from __future__ import annotations

import logging
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Work = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One row of the results table."""

    name: str
    """What was measured."""
    unit: str
    """Unit of `ours` and `baseline`."""
    ours: float
    """Our result, usually a median."""
    baseline: float
    """The baseline's result from the same run, or a fixed limit."""
    ratio: float
    """baseline / ours for times; ours / baseline for everything else."""
    target: str
    """Required range of the ratio."""
    ok: bool
    """Whether the ratio meets the target."""

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain values for JSON."""
        return {
            key: round(value, 9) if isinstance(value, float) else value
            for key, value in asdict(self).items()
        }


def faster(name: str, ours: float, baseline: float, at_least: float) -> Row:
    """Return a row for times in seconds, where smaller is better."""
    ratio = baseline / ours
    return Row(name, "s", ours, baseline, ratio, f">= {at_least:g}", ratio >= at_least)


def higher(name: str, unit: str, ours: float, baseline: float, at_least: float) -> Row:
    """Return a row for a rate, where larger is better."""
    ratio = ours / baseline
    return Row(name, unit, ours, baseline, ratio, f">= {at_least:g}", ratio >= at_least)


def smaller(name: str, unit: str, ours: float, baseline: float, at_most: float) -> Row:
    """Return a row for a quantity that must be small compared with the baseline or limit."""
    ratio = ours / baseline
    return Row(name, unit, ours, baseline, ratio, f"<= {at_most:g}", ratio <= at_most)


def synchronize(device: str) -> None:
    """Wait until the device has finished all work."""
    # Torch is imported here because decoder processes import this module and do not need torch.
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def median_seconds(
    works: dict[str, Work], device: str, repeats: int, warm: bool = False
) -> dict[str, float]:
    """Return the median wall time of each function, in seconds.

    The functions run in alternating order, so that noise of the machine affects all of them.

    Args:
        works: Functions to time.
        device: cpu or cuda.
        repeats: Number of timed runs of each.
        warm: Whether they have run before. If not, each first runs once untimed.
    """
    for work in () if warm else works.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats):
        order = list(works) if repeat % 2 == 0 else list(reversed(works))
        for name in order:
            synchronize(device)
            started = time.perf_counter()
            works[name]()
            synchronize(device)
            taken[name].append(time.perf_counter() - started)
        logger.info(
            "run %d of %d: %s",
            repeat + 1,
            repeats,
            ", ".join(f"{name} {seconds[-1]:.3f} s" for name, seconds in taken.items()),
        )
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def peak_bytes(make: Callable[..., Work], arguments: tuple[Any, ...], device: str) -> int:
    """Return the peak memory in bytes that a function adds to a process that holds its inputs.

    Args:
        make: Creates the inputs and returns the function. For cpu it is called in a new process.
        arguments: Arguments of `make`.
        device: cpu (resident memory, by the kernel's high-water mark) or cuda (by torch's
            allocator).
    """
    if device == "cuda":
        import torch

        work = make(*arguments)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return _in_child(_added_bytes, (make, arguments))


def in_child(
    work: Callable[..., Any], arguments: tuple[Any, ...], connect: Work | None = None
) -> tuple[float, float]:
    """Run a function in a new process and return its time in seconds and peak memory in bytes.

    Args:
        work: Function to run.
        arguments: Arguments of `work`.
        connect: Called before the clock starts, for example to join Ray.
    """
    return _in_child(_timed, (work, arguments, connect))


def _in_child(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, function, arguments))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        child.join()


def _send(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sender.send(function(*arguments))


def _timed(
    work: Callable[..., Any], arguments: tuple[Any, ...], connect: Work | None
) -> tuple[float, float]:
    if connect is not None:
        connect()
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started, float(status_bytes("VmHWM"))


def _added_bytes(make: Callable[..., Work], arguments: tuple[Any, ...]) -> int:
    work = make(*arguments)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark
    before = status_bytes("VmRSS")
    work()
    return status_bytes("VmHWM") - before


def status_bytes(field: str, pid: int | None = None) -> int:
    """Return a size from /proc/PID/status in bytes. Without a pid, use the current process."""
    status = Path("/proc") / ("self" if pid is None else str(pid)) / "status"
    for line in status.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{status} has no {field}: memory is measured on Linux only")
