"""The benchmark growth: exponents, curves at small sizes, and runs that were killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.bench.config import BenchConfig
from pipelines.bench.growth import SERIES, UNFINISHED, WORKERS, Point, Points, exponent
from pipelines.bench.run import run_bench
from tests.helpers.data import PROJECT


def refuse_ray(config: BenchConfig) -> None:
    raise AssertionError("small sizes need no Ray")


def test_the_exponent_is_the_slope_with_logarithmic_axes() -> None:
    assert exponent([10, 100, 1000], [3, 30, 300]) == pytest.approx(1)
    assert exponent([10, 100], [5, 500]) == pytest.approx(2)
    assert exponent([4, 8, 16], [7, 7, 7]) == pytest.approx(0)
    # Least squares over four points: slope of 0, 1, 1, 2 over 0, 1, 2, 3.
    assert exponent([1, 10, 100, 1000], [1, 10, 10, 100]) == pytest.approx(0.6)
    assert exponent([10], [3]) is None


@pytest.mark.slow
def test_a_small_run_records_every_curve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = BenchConfig(
        names=("growth",), growth_sizes="small", repeats=1, output=str(tmp_path / "out")
    )
    with caplog.at_level("INFO"):
        rows = run_bench(config, refuse_ray)
    names = [row["name"] for row in rows]
    assert [name for name in names if "memory" not in name] == [
        f"growth/{series.name}" for series in SERIES
    ]
    (folder,) = [one for one in (tmp_path / "out").iterdir() if one.name != UNFINISHED]
    run = json.loads((folder / "run.json").read_text())
    assert run["finished"]
    times = {one["title"]: one for one in run["curves"] if one["unit"] == "s"}
    assert len(times) == len(SERIES)
    for series in SERIES:
        curve = times[f"{series.title}: time"]
        assert (curve["sizes"], curve["exponent"] is None) == (list(series.small), False)
        assert min(curve["values"]) > 0
    page = (folder / "report.html").read_text()
    assert page.count("<figcaption") == len(run["curves"])
    assert "growth was measured at small sizes" in caplog.records[-1].getMessage()
    # Nothing is left that a later run would continue.
    assert not any((tmp_path / "out" / UNFINISHED).glob("*/*"))


def test_points_that_are_known_are_not_measured_again(tmp_path: Path) -> None:
    measured = []

    def measure() -> Point:
        measured.append(1)
        return Point(values=[2.5, 2.25], bytes=1000, load=0.5)

    first = Points(str(tmp_path / "points")).get("ingest plan", 1000, measure)
    assert len(measured) == 1
    again = Points(str(tmp_path / "points"))
    assert again.get("ingest plan", 1000, measure) == first
    assert len(measured) == 1
    again.get("ingest plan", 10_000, measure)
    assert len(measured) == 2
    again.remove()
    Points(str(tmp_path / "points")).get("ingest plan", 1000, measure)
    assert len(measured) == 3


@pytest.mark.slow
@pytest.mark.soak
def test_a_killed_run_continues(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "jobs.bench", "growth", "--growth-sizes", "small",
        "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    ) as run:
        assert run.stderr is not None
        known = 0
        for line in run.stderr:
            known += " at " in line and "growth/" in line
            if known == 3:
                run.send_signal(signal.SIGKILL)
                break
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "growth continues with 3 points" in done.stderr
    assert "growth/manifest: measuring" not in done.stderr
    runs = sorted(one for one in (tmp_path / "out").iterdir() if one.name != UNFINISHED)
    records = [json.loads((one / "run.json").read_text()) for one in runs]
    assert [one["finished"] for one in records] == [False, True]
    assert len(records[1]["rows"]) == len(done.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_full_sizes_are_measured_within_an_hour(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.bench", "growth", "--repeats", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder,) = [one for one in (tmp_path / "bench-output").iterdir() if one.name != UNFINISHED]
    run = json.loads((folder / "run.json").read_text())
    sizes = {one["title"]: one["sizes"] for one in run["curves"] if one["unit"] != "bytes"}
    for series in SERIES:
        assert sizes[f"{series.title}: time"] == list(series.full)
    assert sizes["Ingest: clips per second"] == list(WORKERS)
    assert "growth/workers" in {row["name"] for row in run["rows"]}
