"""Compares two runs of benchmarks: which rows became better or worse by more than their spread.

A row is compared by its ratio to the baseline where it has one, because both sides of a ratio ran
in turns on the same machine, and by its value otherwise. It changed if the values of all repeats of
one run are on the same side of all those of the other.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from pipelines.bench import report
from pipelines.bench.record import BenchRecordError, RowRecord, RunRecord, is_busy, read_run
from pipelines.common import storage
from pipelines.common.config import flatten

logger = logging.getLogger(__name__)

PAGE, JSON = "compare.html", "compare.json"
EXACT = "= "
"""Beginning of the target of a count that must be exact."""

Change = Literal["better", "worse", "same", "unknown", "only in the first", "only in the second"]


class RowChange(TypedDict):
    """How a row of the second run compares with that of the first."""

    name: str
    unit: str
    """Unit of the compared figure; `ratio` for the ratio to the baseline."""
    first: float | None
    second: float | None
    first_repeats: list[float]
    second_repeats: list[float]
    change: float | None
    """second / first"""
    verdict: Change
    """`unknown` if a run has a single repeat, whose spread is not known, and the figures differ."""
    ok: bool
    """False if the row is worse."""
    targets: list[bool]
    """Whether the row missed no gate, in each run that has it."""


def compare_runs(first: str, second: str, output: str) -> list[Mapping[str, Any]]:
    """Compare two runs, log a table, and write compare.json and compare.html.

    Args:
        first: Folder of a run, or its run.json.
        second: The run to compare with it.
        output: Folder that gets the folder of the comparison.

    Returns:
        One mapping per row.

    Raises:
        BenchRecordError: One of the runs does not exist, or they have no row in common.
    """
    runs = read_run(first), read_run(second)
    rows = [
        _change(name, *(_row(run, name) for run in runs))
        for name in dict.fromkeys(row["name"] for run in runs for row in run["rows"])
    ]
    if not any(len(row["targets"]) == len(runs) for row in rows):
        raise BenchRecordError(
            f"the runs {first} ({', '.join(runs[0]['names'])}) and {second} "
            f"({', '.join(runs[1]['names'])}) have no row in common; give runs of the same "
            "benchmark"
        )
    differing = _differences(*runs)
    folder = storage.join(output, f"{runs[0]['run']}-vs-{runs[1]['run']}")
    values = {"first": runs[0], "second": runs[1], "differing": differing, "rows": rows}
    page = storage.join(folder, PAGE)
    storage.write_json(
        storage.join(folder, JSON),
        {"first": first, "second": second, "differing": differing, "rows": rows},
    )
    storage.write_bytes(page, report.comparison_page(values).encode())
    for line in differing:
        logger.warning("%s", line)
    logger.info("%s vs. %s\n%s", runs[1]["run"], runs[0]["run"], _table(rows))
    logger.info("page: %s", page)
    return [dict(row) for row in rows]


def _row(run: RunRecord, name: str) -> RowRecord | None:
    return next((row for row in run["rows"] if row["name"] == name), None)


def _change(name: str, first: RowRecord | None, second: RowRecord | None) -> RowChange:
    known = first or second
    assert known is not None
    both = [row for row in (first, second) if row is not None]
    # A count that must be exact is shown as it is, and not as a share of what it counts among.
    by_ratio = all(
        row["baseline_repeats"] and row["ratio_repeats"] and not row["target"].startswith(EXACT)
        for row in both
    )
    figures = [_figures(row, by_ratio) for row in (first, second)]
    medians = [None if row is None else _median(row, by_ratio) for row in (first, second)]
    if first is None or second is None:
        verdict: Change = "only in the first" if second is None else "only in the second"
    else:
        higher_is_better = known["kind"] == "rate" or (by_ratio and known["kind"] == "time")
        verdict = _verdict(figures[0], figures[1], higher_is_better)
    before, after = medians
    return RowChange(
        name=name,
        unit="ratio" if by_ratio else known["unit"],
        first=before,
        second=after,
        first_repeats=figures[0],
        second_repeats=figures[1],
        change=None if not before or after is None else round(after / before, 6),
        verdict=verdict,
        ok=verdict != "worse",
        targets=[row["ok"] for row in both],
    )


def _figures(row: RowRecord | None, by_ratio: bool) -> list[float]:
    if row is None:
        return []
    return row["ratio_repeats"] if by_ratio else row["ours_repeats"]


def _median(row: RowRecord, by_ratio: bool) -> float | None:
    return row["ratio"] if by_ratio else row["ours"]


def _verdict(first: list[float], second: list[float], higher_is_better: bool) -> Change:
    if sorted(first) == sorted(second):
        return "same"
    if min(len(first), len(second)) < 2:
        return "unknown"
    if min(second) > max(first):
        return "better" if higher_is_better else "worse"
    if max(second) < min(first):
        return "worse" if higher_is_better else "better"
    return "same"


def _differences(first: RunRecord, second: RunRecord) -> list[str]:
    """Return what else differs between two runs and may explain a change, in sentences."""
    facts = [
        flatten(
            {
                "device": run["device"],
                "cores": run["cores"],
                "gpu": run["gpu"],
                "hardware": run["hardware"],
                "versions": run["versions"],
                "commit": None if run["commit"] is None else run["commit"]["sha"][:12],
                "uncommitted changes": run["commit"] is not None and run["commit"]["is_dirty"],
                "finished": run["finished"],
            }
        )
        for run in (first, second)
    ]
    found = [
        f"the runs differ in {name}: {facts[0].get(name, 'unknown')} ({first['run']}); "
        f"{facts[1].get(name, 'unknown')} ({second['run']})"
        for name in dict.fromkeys((*facts[0], *facts[1]))
        if facts[0].get(name) != facts[1].get(name)
    ]
    loads = [run["load_at_start"][0] for run in (first, second)]
    if any(is_busy(load, run["cores"]) for load, run in zip(loads, (first, second), strict=True)):
        found.append(
            f"the machine was busy before the first benchmark: load {loads[0]} ({first['run']}); "
            f"{loads[1]} ({second['run']})"
        )
    return found


def _table(rows: Sequence[RowChange]) -> str:
    width = max([20, *(len(row["name"]) + 1 for row in rows)])
    lines = [f"{'':{width}}{'first':>12}{'second':>12}{'change':>9}"]
    lines += [
        f"{row['name']:{width}}{_shown(row['first']):>12}{_shown(row['second']):>12}"
        f"{_percent(row['change']):>9}  {row['verdict']}   ({row['unit']})"
        for row in rows
    ]
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(change: float | None) -> str:
    return "-" if change is None else f"{100 * (change - 1):+.1f} %"
