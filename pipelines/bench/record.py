"""The record of a run of benchmarks: `run.json` in a folder of its own, complete after every step.

It is written again after each benchmark, so a run that is killed keeps the rows that it measured.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any, TypedDict

from pipelines.bench.config import BenchConfig
from pipelines.bench.gates import Hardware, JudgedRow, Verdict
from pipelines.bench.harness import Curve, Kind
from pipelines.common import provenance, storage
from pipelines.common.output_folder import write_config
from stgt.errors import STGTError

RUN = "run.json"
REPORT = "report.html"
FORMAT = 1
BUSY_PER_CORE = 0.25
"""Load per core above which a machine is too busy for good measurements."""


class BenchRecordError(STGTError):
    """A folder has no record of a run of benchmarks."""


class RowRecord(TypedDict):
    """A row as plain values."""

    name: str
    unit: str
    kind: Kind
    ours: float
    baseline: float | None
    """The baseline of the same run, or the limit of a gate."""
    ratio: float | None
    target: str
    ok: bool
    verdict: Verdict
    means: str | None
    """What the gate stands for; None without a gate."""
    ours_spread: list[float]
    """The smallest and the largest value of all repeats."""
    ours_repeats: list[float]
    baseline_repeats: list[float]
    """Empty for a row that is only compared with a limit."""
    ratio_repeats: list[float]
    limit_ratio: float | None
    """The least or the largest ratio that meets the gate; None if the gate sets none."""


class MeasurementRecord(TypedDict):
    """One benchmark of a run."""

    name: str
    seconds: float
    load_at_start: float
    """Processes that were running or waiting for a CPU, as a mean over the last minute."""


class RunRecord(TypedDict):
    """Everything that is known about a run of benchmarks."""

    format: int
    run: str
    """Name of the folder: when the run began, in UTC."""
    started: str
    finished: bool
    """Whether all benchmarks ran. A run that was killed has the rows of those before."""
    names: list[str]
    repeats: int
    device: str
    cores: int
    gpu: str
    hardware: dict[str, str]
    versions: dict[str, str]
    commit: dict[str, Any] | None
    """Commit of the project, if it runs from a git checkout of its own."""
    command: str | None
    load_at_start: list[float]
    """Load of the machine over the last 1, 5 and 15 minutes before the first benchmark."""
    gates: str
    measurements: list[MeasurementRecord]
    rows: list[RowRecord]
    curves: list[dict[str, Any]]
    notes: list[str]


def is_busy(load: float, cores: int) -> bool:
    """Return whether a machine with this load is too busy for good measurements."""
    return load > BUSY_PER_CORE * cores


def new_folder(output: str) -> str:
    """Return the folder for a run that begins now, below an output folder; none is used twice."""
    name = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    taken = set(storage.list_names(output)) if storage.exists(output) else set()
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return storage.join(output, found)


def begin(config: BenchConfig, folder: str, hardware: Hardware) -> RunRecord:
    """Write the record of a run that has measured nothing yet, and its config, and return it."""
    commit = provenance.commit()
    record = RunRecord(
        format=FORMAT,
        run=storage.name_of(folder),
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        finished=False,
        names=list(config.names),
        repeats=config.repeats,
        device=config.device,
        cores=hardware.cores,
        gpu=hardware.gpu,
        hardware=provenance.hardware(),
        versions=provenance.versions(),
        commit=None if commit is None else asdict(commit),
        command=provenance.command_line(),
        load_at_start=[round(value, 2) for value in os.getloadavg()],
        gates="of the project" if config.gates is None else config.gates,
        measurements=[],
        rows=[],
        curves=[],
        notes=[],
    )
    write(folder, record)
    write_config(folder, "bench", config)
    return record


def write(folder: str, record: RunRecord) -> None:
    """Write a record to its folder."""
    storage.write_json(storage.join(folder, RUN), record)


def row_record(judged: JudgedRow) -> RowRecord:
    """Return a row with the values of all repeats."""
    row, gate = judged.row, judged.gate
    limit = None
    if gate is not None and judged.verdict in ("met", "missed"):
        limit = (
            gate.value if not gate.is_limit else 1.0 if gate.value and not row.baseline else None
        )
    return RowRecord(
        **judged.to_dict(),
        kind=row.kind,
        verdict=judged.verdict,
        means=None if gate is None else gate.means,
        ours_spread=list(row.ours.spread),
        ours_repeats=list(row.ours.values),
        baseline_repeats=[] if row.baseline is None else list(row.baseline.values),
        ratio_repeats=list(_ratios(judged)),
        limit_ratio=limit,
    )


def _ratios(judged: JudgedRow) -> Sequence[float]:
    if judged.row.baseline is not None:
        return judged.row.ratios
    limit = judged.baseline
    return [value / limit for value in judged.row.ours.values] if limit else []


def curve_records(curves: Iterable[Curve]) -> list[dict[str, Any]]:
    """Return curves as plain values."""
    return [asdict(curve) for curve in curves]


def read_run(uri: str) -> RunRecord:
    """Read the record of a run.

    Args:
        uri: Folder of the run, or its run.json.

    Raises:
        BenchRecordError: There is none.
    """
    place = storage.resolve(uri)
    file = place if place.endswith(".json") else storage.join(place, RUN)
    if not storage.exists(file):
        parent = place if storage.exists(place) and storage.list_names(place) else ""
        runs = [
            name
            for name in (storage.list_names(parent) if parent else [])
            if storage.exists(storage.join(parent, name, RUN))
        ]
        hint = f"; {place} has the runs {', '.join(sorted(runs))}" if runs else ""
        raise BenchRecordError(
            f"{file} does not exist; give the folder of a run of jobs.bench{hint}"
        )
    record = storage.read_json(file)
    if not isinstance(record, dict) or record.get("format") != FORMAT or "rows" not in record:
        raise BenchRecordError(
            f"{file} is no record of a run of jobs.bench, or is one of another version; give the "
            "folder of a run"
        )
    return RunRecord(**record)
