"""Runs benchmarks against their baselines, judges their rows by gates, and records the run."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.bench import comparison, gates, record, report
from pipelines.bench.config import BenchConfig, BenchName
from pipelines.bench.gates import Gate, Hardware, JudgedRow
from pipelines.bench.harness import Findings
from pipelines.common import storage
from stgt.errors import SettingError

ON_RAY: frozenset[BenchName] = frozenset(
    {"ingest", "fetch", "plan", "feed", "recovery", "sweep", "growth", "end_to_end"}
)
"""Benchmarks that start Ray, in this process or in a child."""

logger = logging.getLogger(__name__)


def run_bench(
    config: BenchConfig, connect: Callable[[BenchConfig], None]
) -> list[Mapping[str, Any]]:
    """Run benchmarks, log a table of their rows, and record them; or compare two recorded runs.

    Args:
        config: Which benchmarks to run, or which runs to compare.
        connect: Starts or joins Ray. Called in every process that needs Ray.

    Returns:
        One mapping per row. `ok` is true if the row misses no gate of this hardware or, of two
        runs, if it is not worse in the second.

    Raises:
        SettingError: The device is not available, or the gates cannot be used.
        BenchRecordError: A run to compare does not exist.
    """
    if config.compare is not None:
        return comparison.compare_runs(*config.compare, output=storage.resolve(config.output))
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise SettingError("device = 'cuda': no CUDA device was found; omit --device cuda")
    required = gates.read_gates(config.gates)
    hardware = gates.machine(config.device)
    folder = record.new_folder(storage.resolve(config.output))
    run = record.begin(config, folder, hardware)
    _tell_load(run["load_at_start"][0], hardware)
    judged: list[JudgedRow] = []
    for name in config.names:
        found, seconds, load = _measure(name, config, connect)
        judged += gates.judge(found.rows, required, hardware)
        run["rows"] += map(record.row_record, judged[len(run["rows"]) :])
        run["curves"] += record.curve_records(found.curves)
        run["notes"] += found.notes
        run["measurements"].append({"name": name, "seconds": seconds, "load_at_start": load})
        _write(folder, run)
    remarks = _remarks(config, judged, required, hardware)
    run["notes"] = [*remarks, *run["notes"]]
    run["finished"] = True
    _write(folder, run)
    page = storage.join(folder, record.REPORT)
    logger.info("on %s\n%s", _device_name(config.device), _table(judged))
    for line in (f"all values: {storage.join(folder, record.RUN)}; page: {page}", *run["notes"]):
        logger.info("%s", line)
    return [row.to_dict() for row in judged]


def _write(folder: str, run: record.RunRecord) -> None:
    """Write the record and the page of what a run has measured so far."""
    record.write(folder, run)
    storage.write_bytes(storage.join(folder, record.REPORT), report.page(run).encode())


def _tell_load(load: float, hardware: Hardware) -> None:
    if record.is_busy(load, hardware.cores):
        logger.warning(
            "the machine is busy (load %.1f on %d cores before the first benchmark): figures may "
            "be worse than on an idle one",
            load,
            hardware.cores,
        )


def _measure(
    name: BenchName, config: BenchConfig, connect: Callable[[BenchConfig], None]
) -> tuple[Findings, float, float]:
    """Run a benchmark and return what it found, its duration in seconds, and the load before it."""
    logger.info("%s: measuring", name)
    module = importlib.import_module(f"pipelines.bench.{name}")
    load, started = round(os.getloadavg()[0], 2), time.monotonic()
    if name == "growth":
        found = module.measure(config, functools.partial(connect, config))
    elif name in ON_RAY:
        found = module.measure(config.repeats, functools.partial(connect, config))
    else:
        found = module.measure(config.device, config.repeats)
    if not isinstance(found, Findings):
        found = Findings(found)
    return found, round(time.monotonic() - started, 1), load


def _remarks(
    config: BenchConfig, rows: Sequence[JudgedRow], required: Sequence[Gate], hardware: Hardware
) -> list[str]:
    """Return what the gates leave open, in sentences."""
    found = []
    if foreign := [one for one in rows if one.verdict == "other hardware"]:
        written_for = sorted({str(one.gate.written_for) for one in foreign if one.gate})
        found.append(
            "not judged, because their gates were written for other hardware "
            f"({'; '.join(written_for)}) than this ({hardware}): {_names(foreign)}; give gates of "
            "your own with --gates FILE"
        )
    if free := [one for one in rows if one.verdict == "no gate"]:
        found.append(f"rows without a gate: {_names(free)}")
    measured = [one.row.name for one in rows]
    if gone := gates.unmeasured(config.names, measured, required, hardware):
        found.append(f"gates without a measured row: {', '.join(gone)}")
    return found


def _names(rows: Sequence[JudgedRow]) -> str:
    return ", ".join(one.row.name for one in rows)


def _device_name(device: str) -> str:
    import torch

    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}"


def _table(rows: Sequence[JudgedRow]) -> str:
    width = max([20, *(len(one.row.name) + 1 for one in rows)])
    lines = [f"{'':{width}}{'ours':>14}{'baseline':>14}{'ratio':>9}  target"]
    lines += [
        f"{one.row.name:{width}}{one.row.ours:>14.4g}{_figure(one.baseline):>14}"
        f"{_figure(one.ratio, 3):>9}  {one.target}{'' if one.ok else '  MISSED'}   ({one.row.unit})"
        for one in rows
    ]
    return "\n".join(lines)


def _figure(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"
