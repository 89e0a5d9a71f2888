"""Measurement tools: alternating runs, medians, and peak memory in a separate process."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pipelines.common.termination import EXIT_SIGTERM, exit_on_sigterm
from stgt.errors import STGTError, StoppedError

logger = logging.getLogger(__name__)

Work = Callable[[], Any]
LONG_S = 10.0
"""A run of at least this many seconds is timed once, without another one to warm up."""


class Measured(float):
    """The median of repeated measurements of one quantity, which keeps the single values."""

    values: tuple[float, ...]
    """The value of each repeat, in the order in which they ran."""

    def __new__(cls, values: Sequence[float] | float) -> Measured:
        """Summarize the values of all repeats, or a quantity that was measured once."""
        kept = tuple(map(float, values)) if isinstance(values, Sequence) else (float(values),)
        made = super().__new__(cls, statistics.median(kept))
        made.values = getattr(values, "values", kept)
        return made

    def __getnewargs__(self) -> tuple[tuple[float, ...]]:
        """Return what recreates this in another process."""
        return (self.values,)

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        return min(self.values), max(self.values)

    def per(self, count: float) -> Measured:
        """Return the quantity for one of `count` items, such as seconds per clip."""
        return Measured([value / count for value in self.values])

    def rate(self, count: float) -> Measured:
        """Return `count` items per unit of the quantity, such as clips per second."""
        return Measured([count / value for value in self.values])


Kind = Literal["time", "rate", "size"]
"""How a row is compared with its baseline: a time by baseline / ours, a rate or a size by ours /
baseline. A rate is better if it is higher; times and sizes are better if they are smaller."""


@dataclass(frozen=True)
class Row:
    """One measured quantity beside its baseline, before anybody asks whether that is enough."""

    name: str
    """What was measured. The part before the first slash is the name of the benchmark."""
    unit: str
    """Unit of `ours` and `baseline`."""
    kind: Kind
    ours: Measured
    baseline: Measured | None = None
    """The baseline's result from the same run; None for what is only compared with a limit."""

    @property
    def ratio(self) -> float | None:
        """The ratio of the medians; None without a baseline, or if it would divide by zero."""
        return None if self.baseline is None else self._ratio(self.ours, self.baseline)

    @property
    def ratios(self) -> tuple[float, ...]:
        """The ratio of each repeat, whose runs alternated; that of the medians without pairs."""
        if self.baseline is None or self.ratio is None:
            return ()
        if len(self.ours.values) != len(self.baseline.values):
            return (self.ratio,)
        pairs = zip(self.ours.values, self.baseline.values, strict=True)
        found = [self._ratio(ours, baseline) for ours, baseline in pairs]
        return tuple(one for one in found if one is not None)

    def _ratio(self, ours: float, baseline: float) -> float | None:
        above, below = (baseline, ours) if self.kind == "time" else (ours, baseline)
        return above / below if below else None


@dataclass(frozen=True)
class Findings:
    """What a benchmark returns that has more to tell than its rows."""

    rows: list[Row]
    notes: tuple[str, ...] = ()
    """Sentences for the end of the output, such as that a baseline could not be measured."""
    curves: tuple[Curve, ...] = ()


@dataclass(frozen=True)
class Curve:
    """A quantity measured at several sizes, for a plot."""

    title: str
    """What grows, such as `Sorting a manifest`."""
    size_unit: str
    """What the sizes count, such as `clips`."""
    unit: str
    """Unit of the values."""
    sizes: tuple[float, ...]
    values: tuple[float, ...]
    exponent: float | None
    """Slope of the straight line through the points with logarithmic axes, which is 1 for a
    quantity that is proportional to the size; None for fewer than two points."""
    expected: float | None = None
    """The exponent that the quantity should have; None if none is expected."""
    fitted_from: float = 0.0
    """Smallest size that the line is fitted to. Below it, a constant part dominates."""


def faster(name: str, ours: float, baseline: float) -> Row:
    """Return a row for times in seconds, where smaller is better."""
    return Row(name, "s", "time", Measured(ours), Measured(baseline))


def higher(name: str, unit: str, ours: float, baseline: float | None = None) -> Row:
    """Return a row for a rate, where larger is better. Without a baseline, a gate has a limit."""
    return Row(name, unit, "rate", Measured(ours), _optional(baseline))


def smaller(name: str, unit: str, ours: float, baseline: float | None = None) -> Row:
    """Return a row for a quantity that must be small, such as memory, a difference or a count.

    Args:
        name: What was measured.
        unit: Unit of the quantity.
        ours: Our result.
        baseline: What it is compared with; None for what only has a limit.
    """
    return Row(name, unit, "size", Measured(ours), _optional(baseline))


def _optional(value: float | None) -> Measured | None:
    return None if value is None else Measured(value)


def synchronize(device: str) -> None:
    """Wait until the device has finished all work."""
    # Torch is imported here because decoder processes import this module and do not need torch.
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def median_seconds(
    works: dict[str, Work], device: str, repeats: int, warm: bool = False
) -> dict[str, Measured]:
    """Return the wall time of each function, in seconds: the median, and that of each run.

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
    return {name: Measured(seconds) for name, seconds in taken.items()}


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
        gc.collect()  # models of earlier measurements, which would be freed during this one
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return _in_child(_added_bytes, (make, arguments))


class MeasurementError(STGTError):
    """A process that measures something ended without a result."""


def added_time_and_bytes(
    make: Callable[..., Work], arguments: tuple[Any, ...], repeats: int, alone: bool = True
) -> tuple[list[float], int]:
    """Return the seconds of each run of a function, and the memory that its first run adds.

    Args:
        make: Creates the inputs and returns the function, which runs again and again.
        arguments: Arguments of `make`.
        repeats: Number of timed runs. A run that takes long is not repeated.
        alone: Whether to measure in a new process, as memory needs that is to be exact.
    """
    if alone:
        return _in_child(_time_and_added_bytes, (make, arguments, repeats))
    return _time_and_added_bytes(make, arguments, repeats)


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


def returned_by_child(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """Return what a function returns in a new process with further environment variables.

    Args:
        function: Function to run.
        arguments: Its arguments.
        environment: Variables that must be set before a process starts, by name.
    """
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        return _in_child(function, arguments)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _in_child(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, function, arguments))
    try:
        child.start()
        sender.close()
        return receiver.recv()
    except EOFError as error:
        child.join()
        raise MeasurementError(
            f"a process that measures ended with code {child.exitcode} and no result: see its "
            "error above, or, for code -9, give the machine more memory; rows of benchmarks that "
            "are complete are kept"
        ) from error
    except BaseException:
        if child.pid is not None:
            child.terminate()  # an interrupt or SIGTERM ends the measurement, too
        raise
    finally:
        if child.pid is not None:
            child.join()


def _send(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    # After an interrupt, which reaches all processes of a terminal, the parent says what happened.
    signal.signal(signal.SIGINT, lambda *_: sys.exit(1))
    with exit_on_sigterm():
        try:
            sender.send(function(*arguments))
        except StoppedError:
            sys.exit(EXIT_SIGTERM)  # a stage was ended; the parent says so


def end_with_parent() -> None:
    """Send SIGTERM to this child process when its parent has ended, however it did."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a process that multiprocessing started"

    def end() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()


def _timed(
    work: Callable[..., Any], arguments: tuple[Any, ...], connect: Work | None
) -> tuple[float, float]:
    if connect is not None:
        connect()
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started, float(status_bytes("VmHWM"))


def _time_and_added_bytes(
    make: Callable[..., Work], arguments: tuple[Any, ...], repeats: int
) -> tuple[list[float], int]:
    work = make(*arguments)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark
    before = status_bytes("VmRSS")
    taken = [_seconds(work)]
    added = max(0, status_bytes("VmHWM") - before)
    if taken[0] < LONG_S:  # the first run also imports modules and fills caches
        taken = [_seconds(work) for _ in range(repeats)]
    return taken, added


def _seconds(work: Work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


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
