"""How a measurement is taken: alternating runs, medians, peak memory in a process of its own."""

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
    """One line of the table."""

    name: str
    """What was measured."""
    unit: str
    """Unit of ours and the baseline."""
    ours: float
    """Our figure, a median."""
    baseline: float
    """The baseline's figure from the same run, a median; of a difference, what is allowed."""
    ratio: float
    """How many times better ours is, or for memory and differences: ours / baseline."""
    target: str
    """What the ratio has to be."""
    ok: bool
    """Whether it is."""

    def to_dict(self) -> dict[str, Any]:
        """The row for JSON."""
        return {
            key: round(value, 9) if isinstance(value, float) else value
            for key, value in asdict(self).items()
        }


def faster(name: str, ours: float, baseline: float, at_least: float) -> Row:
    """A row of seconds."""
    ratio = baseline / ours
    return Row(name, "s", ours, baseline, ratio, f">= {at_least:g}", ratio >= at_least)


def higher(name: str, unit: str, ours: float, baseline: float, at_least: float) -> Row:
    """A row of a rate."""
    ratio = ours / baseline
    return Row(name, unit, ours, baseline, ratio, f">= {at_least:g}", ratio >= at_least)


def smaller(name: str, unit: str, ours: float, baseline: float, at_most: float) -> Row:
    """A row of something that has to be small beside the baseline."""
    ratio = ours / baseline
    return Row(name, unit, ours, baseline, ratio, f"<= {at_most:g}", ratio <= at_most)


def synchronize(device: str) -> None:
    """Wait for the device."""
    # Not above: decoding children load the job's module again, and need no torch.
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def median_seconds(
    works: dict[str, Work], device: str, repeats: int, warm: bool = False
) -> dict[str, float]:
    """Median wall time of each, run in turns: noise of the machine hits both.

    Args:
        works: what to time.
        device: cpu or cuda.
        repeats: runs of each that count.
        warm: they have run before; otherwise each runs once without counting.
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
    """Memory that a piece of work adds, at its peak, to a process that holds its inputs.

    Args:
        make: builds the inputs and gives the work; called in a new process for the CPU.
        arguments: its arguments.
        device: cpu (resident set, by the kernel's high-water mark) or cuda (the allocator's).
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
    """Seconds that some work takes in a process of its own, and that process's bytes at the most.

    Args:
        work: what to do.
        arguments: its arguments.
        connect: what to do before the clock starts, such as joining Ray.
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
    Path("/proc/self/clear_refs").write_text(
        "5", encoding="ascii"
    )  # the high-water mark begins here
    before = status_bytes("VmRSS")
    work()
    return status_bytes("VmHWM") - before


def status_bytes(field: str, pid: int | None = None) -> int:
    """A size that the kernel tells of a process; of this one without a pid."""
    status = Path("/proc") / ("self" if pid is None else str(pid)) / "status"
    for line in status.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{status} has no {field}: memory is measured on Linux only")
