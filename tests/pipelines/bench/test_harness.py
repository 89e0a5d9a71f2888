"""The processes that measure end with the one that waits for them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.helpers.data import PROJECT
from tests.helpers.waiting import has_ended, wait_until

MEASURE_FOR_LONG = """
import subprocess
import sys

from jobs.entry import run_job
from pipelines.bench.harness import in_child
from stgt.errors import StoppedError

LONG = "import time; print('measuring', flush=True); time.sleep(300)"


def work():
    # Stages that record themselves in MLflow explain how they were ended.
    try:
        subprocess.run([sys.executable, "-c", LONG])
    except SystemExit as error:
        raise StoppedError("the stage was stopped by SIGTERM") from error


if __name__ == "__main__":
    run_job(lambda: {"seconds": in_child(work, ())[0]})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "told"),
    [
        (signal.SIGTERM, 143, "error: stopped by SIGTERM; run the same command again to continue"),
        (signal.SIGINT, 130, "error: interrupted; run the same command again to continue"),
        (signal.SIGKILL, -9, ""),
    ],
)
def test_a_measurement_ends_with_the_benchmark(
    tmp_path: Path, number: signal.Signals, code: int, told: str
) -> None:
    (tmp_path / "measure.py").write_text(MEASURE_FOR_LONG)
    with (tmp_path / "said").open("w") as said:
        bench = subprocess.Popen(
            [sys.executable, str(tmp_path / "measure.py")],
            env={"PYTHONPATH": str(PROJECT)},
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
    try:
        assert bench.stdout is not None
        assert bench.stdout.readline() == "measuring\n"
        # The process that measures, the one that it started, and one of multiprocessing's own.
        children = psutil.Process(bench.pid).children(recursive=True)
        assert len(children) >= 2
        bench.send_signal(number)
        assert bench.wait(timeout=60) == code
        wait_until(lambda: all(map(has_ended, children)), 60)
    finally:
        bench.kill()
        bench.wait()
    assert (tmp_path / "said").read_text().strip() == told
