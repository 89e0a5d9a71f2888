"""Recorded runs of benchmarks: their folders and pages, and what changed between two of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipelines.bench.comparison import compare_runs
from pipelines.bench.config import BenchConfig, BenchName
from pipelines.bench.gates import Hardware, judge, read_gates
from pipelines.bench.harness import Curve, Measured, Row, faster, higher, smaller
from pipelines.bench.record import (
    BenchRecordError,
    RunRecord,
    begin,
    curve_records,
    new_folder,
    read_run,
    row_record,
    write,
)
from pipelines.bench.report import figure, page

TWO_CORES = Hardware(cores=2, gpu="none")


def recorded(
    output: Path, rows: Sequence[Row], names: tuple[BenchName, ...] = ("graph",)
) -> tuple[str, RunRecord]:
    """Record a run that measured some rows; its folder and its record."""
    folder = new_folder(str(output))
    run = begin(BenchConfig(names=names, output=str(output)), folder, TWO_CORES)
    run["rows"] = [row_record(one) for one in judge(rows, read_gates(None), TWO_CORES)]
    run["measurements"] = [{"name": name, "seconds": 1.5, "load_at_start": 0.1} for name in names]
    run["finished"] = True
    write(folder, run)
    return folder, run


def times(name: str, ours: Sequence[float], baseline: Sequence[float]) -> Row:
    return faster(name, Measured(ours), Measured(baseline))


def test_a_run_keeps_the_values_of_all_repeats(tmp_path: Path) -> None:
    folder, _ = recorded(tmp_path, [times("graph", [2, 1, 4], [10, 8, 12])])
    run = read_run(folder)
    (row,) = run["rows"]
    assert (row["ours"], row["baseline"], row["ratio"]) == (2, 10, 5)
    assert row["ours_repeats"] == [2, 1, 4]
    assert row["ours_spread"] == [1, 4]
    assert row["baseline_repeats"] == [10, 8, 12]
    assert row["ratio_repeats"] == [5, 8, 3]
    assert (row["verdict"], row["target"], row["limit_ratio"]) == ("met", ">= 5", 5)
    assert run["versions"]["torch"]
    assert run["hardware"]["cpus"]
    assert len(run["load_at_start"]) == 3
    config = json.loads((Path(folder) / "config.json").read_text())
    assert (config["job"], config["names"]) == ("bench", ["graph"])


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path: Path) -> None:
    folders = [recorded(tmp_path, [])[0] for _ in range(3)]
    assert len(set(folders)) == 3
    assert all((Path(folder) / "run.json").is_file() for folder in folders)


def test_a_row_changes_if_all_repeats_are_on_one_side(tmp_path: Path) -> None:
    rows = {
        "graph": ([1, 1, 1], [5, 6, 7]),
        "graph/a": ([1, 1, 1], [5, 6, 7]),
        "graph/b": ([1, 1, 1], [5, 6, 7]),
        "graph/c": ([1], [5]),
    }
    first, _ = recorded(tmp_path, [times(name, *values) for name, values in rows.items()])
    second, _ = recorded(
        tmp_path,
        [
            times("graph", [2, 2, 2], [6, 7, 8]),  # ratios 3 to 4: below 5 to 7
            times("graph/a", [2, 2, 2], [16, 17, 18]),  # 8 to 9: above
            times("graph/b", [2, 2, 2], [14, 17, 18]),  # 7 to 9: they touch
            times("graph/c", [1], [50]),  # one repeat has no spread
        ],
    )
    found = compare_runs(first, second, str(tmp_path))
    assert {row["name"]: row["verdict"] for row in found} == {
        "graph": "worse",
        "graph/a": "better",
        "graph/b": "same",
        "graph/c": "unknown",
    }
    assert [row["name"] for row in found if not row["ok"]] == ["graph"]
    assert found[0]["first"] == 6
    assert found[0]["second"] == 3.5
    assert found[0]["targets"] == [True, False]


def test_the_better_direction_depends_on_the_kind_of_row(tmp_path: Path) -> None:
    runs = [
        recorded(
            tmp_path,
            [
                smaller("graph/memory", "bytes", Measured([value, value]), Measured([10, 10])),
                smaller("graph/time", "s", Measured([value, value])),
                higher("graph/rate", "clips/s", Measured([value, value])),
                higher("graph/share", "clips/s", Measured([value, value]), Measured([10, 10])),
                smaller("recovery/lost", "steps", Measured([value, value]), 60),
            ],
        )[0]
        for value in (1, 2)
    ]
    found = compare_runs(*runs, str(tmp_path))
    assert [row["verdict"] for row in found] == [
        "worse",
        "worse",
        "better",
        "better",
        "worse",
    ]
    assert [row["unit"] for row in found] == ["ratio", "s", "clips/s", "ratio", "steps"]


def test_rows_of_one_run_alone_are_listed(tmp_path: Path) -> None:
    shared = times("graph", [1, 1], [5, 5])
    first, _ = recorded(tmp_path, [shared, smaller("graph/old", "s", 1.0)])
    second, _ = recorded(tmp_path, [shared, smaller("graph/new", "s", 1.0)])
    found = {row["name"]: row["verdict"] for row in compare_runs(first, second, str(tmp_path))}
    assert found == {
        "graph": "same",
        "graph/old": "only in the first",
        "graph/new": "only in the second",
    }


def test_a_comparison_leaves_a_page_and_its_values(tmp_path: Path) -> None:
    runs = [recorded(tmp_path, [times("graph", [1, 1], [k, k])]) for k in (5, 9)]
    changed = {**runs[1][1], "cores": 64}
    write(runs[1][0], RunRecord(**changed))
    compare_runs(runs[0][0], f"{runs[1][0]}/run.json", str(tmp_path / "out"))
    (folder,) = (tmp_path / "out").iterdir()
    values = json.loads((folder / "compare.json").read_text())
    assert any(line.startswith("the runs differ in cores: 2 (") for line in values["differing"])
    text = (folder / "compare.html").read_text()
    assert "better" in text
    assert "The runs differ in cores: 2" in text


def test_runs_without_a_common_row_are_refused(tmp_path: Path) -> None:
    first, _ = recorded(tmp_path, [smaller("graph/a", "s", 1.0)])
    second, _ = recorded(tmp_path, [smaller("spans", "s", 1.0, 1.0)], ("spans",))
    with pytest.raises(BenchRecordError, match="no row in common"):
        compare_runs(first, second, str(tmp_path))


def test_a_folder_without_a_run_is_refused_and_names_those_in_it(tmp_path: Path) -> None:
    folder, _ = recorded(tmp_path / "out", [])
    with pytest.raises(BenchRecordError, match=rf"has the runs {Path(folder).name}"):
        read_run(str(tmp_path / "out"))
    with pytest.raises(BenchRecordError, match="does not exist; give the folder of a run"):
        read_run(str(tmp_path / "nowhere"))
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(BenchRecordError, match="no record of a run"):
        read_run(str(tmp_path))


def test_the_page_shows_rows_gates_notes_and_curves(tmp_path: Path) -> None:
    _, run = recorded(
        tmp_path,
        [
            times("graph", [1, 1.1, 1.2], [4, 4.4, 4.9]),
            smaller("graph/memory", "bytes", 4.9e8, 1.7e9),
            smaller("graph/unknown", "s", 0.25),
        ],
    )
    curve = Curve("Sorting", "clips", "s", (1e3, 1e4, 1e5), (0.1, 0.9, 9.0), 1.0, 1.0, 1e4)
    run["curves"] = curve_records([curve])
    run["notes"] = ["torchcodec is not <installed>"]
    text = page(run)
    assert "Graph attention is five times as fast" in text
    assert ">missed</td>" in text
    assert "490 MB" in text
    assert "250 ms" in text
    assert "no gate" in text
    assert "Torchcodec is not &lt;installed&gt;." in text
    assert "exponent 1.00, expected 1 at most" in text
    assert text.count("<circle") == 3


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, "s", "12.3 ms"),
        (75.25, "s", "75.25 s"),
        (4.88e9, "bytes", "4.88 GB"),
        (86400, "frames", "86,400 frames"),
        (0.313, "min/s", "0.313 min/s"),
        (0, "steps", "0 steps"),
        (1.4e-6, "max abs", "1.4e-06 max abs"),
        (3.456, "ratio", "3.46"),
    ],
)
def test_figures_have_a_suitable_unit(value: float, unit: str, text: str) -> None:
    assert figure(value, unit) == text
