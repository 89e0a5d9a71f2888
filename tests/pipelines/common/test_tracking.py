"""MLflow's database and runs, through kills and restarts."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipelines.common import ray_errors, tracking
from pipelines.common.config import TrackingConfig
from pipelines.common.tracking import Run, StepMetrics
from tests.helpers.data import PROJECT
from tests.helpers.waiting import wait_until

OPEN_A_RUN = """
import sys
from pipelines.common.config import TrackingConfig
from pipelines.common.tracking import Run
folder = sys.argv[1]
Run.open(TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"), "run", f"{folder}/run.json")
"""


@pytest.mark.parametrize(
    "after_s", [0.0, *(pytest.param(s, marks=pytest.mark.soak) for s in (0.1, 0.2, 0.4, 0.8, 1.6))]
)
def test_a_database_whose_making_was_killed_is_made_anew(tmp_path: Path, after_s: float) -> None:
    maker = subprocess.Popen([sys.executable, "-c", OPEN_A_RUN, str(tmp_path)], cwd=PROJECT)
    try:
        wait_until(lambda: list(tmp_path.glob(".mlflow.db.*.tmp")) or maker.poll() is not None)
        time.sleep(after_s)
    finally:
        maker.kill()
        maker.wait()
    if not after_s:
        assert list(tmp_path.glob(".mlflow.db.*.tmp"))
        assert not (tmp_path / "mlflow.db").exists()
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    run = Run.open(config, "run", str(tmp_path / "run.json"))
    run.log_metrics({"loss": 2.0})
    run.finish(succeeded=True)
    assert not list(tmp_path.glob(".mlflow.db.*.tmp"))
    client = MlflowClient(tracking_uri=config.uri)
    assert client.get_metric_history(run.run_id, "loss")[0].value == 2.0


def test_a_resumed_run_may_have_other_settings(tmp_path: Path) -> None:
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    first = Run.open(config, "run", str(tmp_path / "run.json"))
    first.log_config({"lr": 1.0, "loaders": 1})
    again = Run.open(config, "run", str(tmp_path / "run.json"))
    again.log_config({"lr": 1.0, "loaders": 2, "seed": 0})
    assert again.run_id == first.run_id
    params = MlflowClient(tracking_uri=config.uri).get_run(first.run_id).data.params
    assert params == {"lr": "1.0", "loaders": "1", "seed": "0"}


def test_a_full_disk_is_known_as_one_and_can_be_mended(
    small_disk: Callable[[str], Path],
) -> None:
    small = small_disk("300k")
    config = TrackingConfig(uri=f"sqlite:///{small}/mlflow.db")
    with pytest.raises(Exception, match="full") as caught:
        Run.open(config, "run", str(small / "run.json"))
    assert ray_errors.disk_is_full(caught.value)
    small_disk("20m")
    Run.open(config, "run", str(small / "run.json")).finish(succeeded=True)


def test_steps_sent_again_after_a_crash_are_entered_once(tmp_path: Path) -> None:
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    run = Run.open(config, "run", str(tmp_path / "run.json"))
    rows: list[StepMetrics] = [
        {"step": step, "time_ms": 1000 + step, "metrics": {"loss": 1 / step, "lr": 0.1}}
        for step in (1, 2, 3)
    ]
    run.log_steps(rows[:2])  # killed before it could note that they were sent
    run.log_steps(rows, logged_step=3)
    history = MlflowClient(tracking_uri=config.uri).get_metric_history(run.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]


def test_work_that_cannot_begin_ends_at_once_and_its_run_is_marked(tmp_path: Path) -> None:
    """What `prepare` raises is not held up by a server that answers late."""
    failed, opened = threading.Event(), threading.Event()

    class LateRun:
        def fail(self) -> None:
            failed.set()

    def open_late() -> Any:
        assert opened.wait(timeout=30)
        return LateRun()

    def prepare() -> None:
        raise ValueError("no cluster")

    with pytest.raises(ValueError, match="no cluster"):
        tracking.recorded_result(
            str(tmp_path / "result.json"),
            open_run=open_late,
            prepare=prepare,
            work=lambda: None,
            record=lambda run, result: True,
        )
    assert not failed.is_set()
    opened.set()
    assert failed.wait(timeout=30)
