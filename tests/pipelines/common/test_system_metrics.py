"""System metrics of a run: measured at intervals, kept while MLflow cannot be used."""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.common import system_metrics
from pipelines.common.config import TrackingConfig
from pipelines.common.recording import Recording
from pipelines.common.system_metrics import SystemMetrics
from stgt.errors import SettingError
from tests.helpers.waiting import wait_until

NAMES = {
    "system/cpu_utilization_percentage",
    "system/system_memory_usage_megabytes",
    "system/disk_usage_percentage",
    "system/network_receive_megabytes",
}


@pytest.fixture
def config(mlflow_database: Path, tmp_path: Path) -> TrackingConfig:
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    return TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", system_metrics_every_s=0.3)


def recording_in(folder: Path, config: TrackingConfig) -> Recording:
    return Recording(config, "run", str(folder / "run.json"), {}, meanwhile="the work continues")


def points_of(config: TrackingConfig, recording: Recording) -> list[tuple[int, int]]:
    assert recording.run_id is not None
    client = MlflowClient(tracking_uri=config.uri)
    history = client.get_metric_history(recording.run_id, "system/cpu_utilization_percentage")
    return [(point.timestamp, point.step) for point in history]


@pytest.mark.slow
def test_a_run_has_system_metrics_by_seconds_since_its_start(
    config: TrackingConfig, tmp_path: Path
) -> None:
    recording = recording_in(tmp_path, config)
    with recording.running():
        wait_until(lambda: len(points_of(config, recording)) >= 3)
    assert recording.finish()
    assert recording.run_id is not None
    run = MlflowClient(tracking_uri=config.uri).get_run(recording.run_id)
    assert set(run.data.metrics) >= NAMES
    assert 0 <= run.data.metrics["system/cpu_utilization_percentage"] <= 100
    for time_ms, step in points_of(config, recording):
        assert step == (time_ms - run.info.start_time) // 1000


@pytest.mark.slow
def test_a_run_that_is_opened_late_counts_from_the_start_of_the_work(
    config: TrackingConfig, tmp_path: Path
) -> None:
    recording = recording_in(tmp_path, config)
    database = sqlite3.connect(tmp_path / "mlflow.db")
    database.execute("ALTER TABLE runs RENAME COLUMN name TO hidden")
    began = time.monotonic()
    with recording.running():
        wait_until(lambda: time.monotonic() - began >= 1.5)
        database.execute("ALTER TABLE runs RENAME COLUMN hidden TO name")
        database.close()
    assert recording.finish()
    assert recording.run_id is not None
    run = MlflowClient(tracking_uri=config.uri).get_run(recording.run_id)
    assert run.info.end_time - run.info.start_time >= 1500
    points = points_of(config, recording)
    assert max(step for _, step in points) >= 1
    for time_ms, step in points:
        assert step == (time_ms - run.info.start_time) // 1000


@pytest.mark.slow
def test_a_run_that_only_the_next_start_can_open_counts_from_the_first_one(
    config: TrackingConfig, tmp_path: Path
) -> None:
    database = sqlite3.connect(tmp_path / "mlflow.db")
    database.execute("ALTER TABLE runs RENAME COLUMN name TO hidden")
    recording = recording_in(tmp_path, config)
    with recording.running():
        began = time.monotonic()
        wait_until(lambda: time.monotonic() - began >= 1.5)
    assert not recording.finish()
    database.execute("ALTER TABLE runs RENAME COLUMN hidden TO name")
    database.close()
    again = recording_in(tmp_path, config)
    assert again.finish()
    assert again.run_id is not None
    run = MlflowClient(tracking_uri=config.uri).get_run(again.run_id)
    points = points_of(config, again)
    assert min(time_ms for time_ms, _ in points) == run.info.start_time
    assert [step for _, step in points] == [
        (time_ms - run.info.start_time) // 1000 for time_ms, _ in points
    ]


@pytest.mark.slow
def test_what_could_not_be_sent_is_sent_by_the_next_start(
    config: TrackingConfig, tmp_path: Path
) -> None:
    recording = recording_in(tmp_path, config)
    database = sqlite3.connect(tmp_path / "mlflow.db")
    kept = tmp_path / "mlflow_system_metrics.json"
    rows = SystemMetrics(0.3, lambda: None)
    with recording.running():
        database.execute("ALTER TABLE metrics RENAME TO hidden")
        rows.start()
        wait_until(lambda: len(rows.rows()) >= 2)
    rows.stop()
    assert not recording.finish()
    left = json.loads(kept.read_text())
    assert left
    database.execute("ALTER TABLE hidden RENAME TO metrics")
    database.close()
    again = recording_in(tmp_path, config)
    assert again.finish()
    assert not kept.exists()
    assert {row["time_ms"] for row in left} <= {point[0] for point in points_of(config, again)}


@pytest.mark.slow
def test_work_that_fails_keeps_them_beside_those_of_earlier_starts(
    config: TrackingConfig, tmp_path: Path
) -> None:
    kept = tmp_path / "mlflow_system_metrics.json"
    earlier = {"time_ms": 1, "metrics": {"system/cpu_utilization_percentage": 1.0}}
    kept.write_text(json.dumps([earlier]))
    recording = recording_in(tmp_path, config)
    database = sqlite3.connect(tmp_path / "mlflow.db")
    rows = SystemMetrics(0.3, lambda: None)

    def work() -> None:
        with recording.running():
            database.execute("ALTER TABLE metrics RENAME TO hidden")
            rows.start()
            wait_until(lambda: len(rows.rows()) >= 2)
            raise ValueError("the work failed")

    with pytest.raises(ValueError, match="the work failed"):
        work()
    rows.stop()
    database.close()
    assert json.loads(kept.read_text())[0] == earlier
    assert len(json.loads(kept.read_text())) >= 2


def test_rows_are_forgotten_once_they_were_sent_and_added_once() -> None:
    rows = SystemMetrics(None, lambda: None)
    made = [{"time_ms": time_ms, "metrics": {"system/cpu": 1.0}} for time_ms in (1, 2, 3)]
    rows.add(made)
    rows.add(made)
    assert rows.rows() == made
    rows.forget(made[:2])
    assert rows.rows() == made[2:]
    rows.add(made[:1])
    assert rows.rows() == [made[0], made[2]]


@pytest.mark.parametrize(
    ("setting", "environment", "every_s"),
    [
        (None, {}, 30.0),
        (None, {"INTERVAL": "5"}, 5.0),
        (7.0, {"INTERVAL": "5"}, 7.0),
        (0.0, {}, None),
        (None, {"SWITCH": "false"}, None),
        (7.0, {"SWITCH": "false"}, 7.0),
    ],
)
def test_a_flag_or_the_environment_turns_them_off(
    monkeypatch: pytest.MonkeyPatch,
    setting: float | None,
    environment: dict[str, str],
    every_s: float | None,
) -> None:
    for name, variable in (
        ("SWITCH", system_metrics.SWITCH),
        ("INTERVAL", system_metrics.INTERVAL),
    ):
        monkeypatch.delenv(variable, raising=False)
        if name in environment:
            monkeypatch.setenv(variable, environment[name])
    config = TrackingConfig(system_metrics_every_s=setting)
    assert system_metrics.interval_s(config) == every_s


def test_without_system_metrics_there_is_no_thread() -> None:
    rows = SystemMetrics(None, lambda: None)
    rows.start()
    assert "system metrics" not in [thread.name for thread in threading.enumerate()]
    rows.stop()
    assert rows.rows() == []


def test_a_wrong_interval_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(system_metrics.INTERVAL, "often")
    with pytest.raises(SettingError, match=r"INTERVAL = 'often': must be a positive number"):
        system_metrics.interval_s(TrackingConfig())
    with pytest.raises(SettingError, match="must not be negative"):
        TrackingConfig(system_metrics_every_s=-1.0)
