"""Metrics reach MLflow early, once, and without holding up the training."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.common.config import TrackingConfig
from pipelines.common.recording import Recording
from pipelines.common.tracking import Run, StepMetrics
from pipelines.train import metrics_log
from pipelines.train.metrics_sender import MetricsSender
from tests.helpers.mlflow_servers import BrokenServer
from tests.helpers.waiting import wait_until


@pytest.fixture
def config(mlflow_database: Path, tmp_path: Path) -> TrackingConfig:
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    return TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")


def recording_in(folder: Path, config: TrackingConfig) -> Recording:
    return Recording(config, "run", f"{folder}/mlflow_run.json", {}, meanwhile="training continues")


def rows(steps: Sequence[int], started_ms: int, **late: float) -> list[StepMetrics]:
    """Metrics of steps; `late` ones belong to the last step."""
    found: list[StepMetrics] = [
        {"step": step, "time_ms": started_ms + step, "metrics": {"loss": 1 / step, "lr": 0.1}}
        for step in steps
    ]
    found[-1]["metrics"].update({name.replace("_", "/"): value for name, value in late.items()})
    return found


def history(config: TrackingConfig, recording: Recording, metric: str) -> list[tuple[int, float]]:
    client = MlflowClient(tracking_uri=config.uri)
    assert recording.run_id is not None
    points = client.get_metric_history(recording.run_id, metric)
    return [(point.step, point.value) for point in points]


def test_steps_are_recorded_before_the_first_checkpoint_and_once_when_repeated(
    config: TrackingConfig, tmp_path: Path
) -> None:
    """Workers crash after step 5 with a checkpoint at 4, then the driver after step 7."""
    first = recording_in(tmp_path, config)
    with MetricsSender(str(tmp_path), first, every_s=0.02) as sender:
        sender.add(rows([1, 2, 3], 0))
        wait_until(lambda: first.run_id and len(history(config, first, "loss")) == 3)
        # Validation adds to step 4 after it was sent; then its checkpoint is complete.
        sender.add(rows([4], 0))
        wait_until(lambda: len(history(config, first, "loss")) == 4)
        sender.add([{"step": 4, "time_ms": 4, "metrics": {"val/t2v/R1": 40.0}}])
        kept = rows([1, 2, 3, 4], 0)
        kept[-1]["metrics"].update({"val/t2v/R1": 40.0, "samples/skipped": 2.0})
        metrics_log.write(str(tmp_path), kept)  # type: ignore[arg-type]
        sender.checkpoint(4)
        sender.add(rows([5, 6], 0))
        wait_until(lambda: len(history(config, first, "loss")) == 6)
        # The workers start again after step 4.
        sender.add(rows([5, 6, 7], 1000))
    expected = [(step, 1 / step) for step in range(1, 8)]
    assert history(config, first, "loss") == expected
    assert history(config, first, "val/t2v/R1") == [(4, 40.0)]
    assert history(config, first, "samples/skipped") == [(4, 2.0)]
    # Another driver repeats them again, up to a checkpoint that it reads from the folder.
    again = recording_in(tmp_path, config)
    with MetricsSender(str(tmp_path), again, every_s=0.02, checkpoint=4) as sender:
        sender.add(rows([5, 6, 7, 8], 2000))
        done = rows([5, 6, 7, 8], 2000)
        done[-1]["metrics"].update({"val/t2v/R1": 50.0, "samples/skipped": 2.0})
        metrics_log.write(str(tmp_path), done)  # type: ignore[arg-type]
        sender.checkpoint(8)
    assert history(config, again, "loss") == [*expected, (8, 1 / 8)]
    assert history(config, again, "val/t2v/R1") == [(4, 40.0), (8, 50.0)]


def test_validation_between_checkpoints_is_recorded_with_its_step(
    config: TrackingConfig, tmp_path: Path
) -> None:
    recording = recording_in(tmp_path, config)
    with MetricsSender(str(tmp_path), recording, every_s=0.02) as sender:
        sender.add(rows([1, 2], 0))
        wait_until(lambda: recording.run_id and len(history(config, recording, "loss")) == 2)
        sender.add([{"step": 2, "time_ms": 2, "metrics": {"val/t2v/R1": 40.0}}])
        sender.add(rows([3], 0))
        wait_until(lambda: len(history(config, recording, "loss")) == 3)
    assert history(config, recording, "val/t2v/R1") == [(2, 40.0)]


def test_a_lost_message_leaves_no_step_out(config: TrackingConfig, tmp_path: Path) -> None:
    recording = recording_in(tmp_path, config)
    with MetricsSender(str(tmp_path), recording, every_s=100) as sender:
        sender.add(rows([1, 2, 4], 0))
    assert history(config, recording, "loss") == [(1, 1.0), (2, 0.5)]
    metrics_log.write(str(tmp_path), rows([1, 2, 3, 4], 0))  # type: ignore[arg-type]
    again = MetricsSender(str(tmp_path), recording, every_s=100, checkpoint=4)
    assert recording.attempt(again.send_to)
    assert [step for step, _ in history(config, recording, "loss")] == [1, 2, 3, 4]


def test_late_metrics_do_not_stand_for_a_step_whose_own_message_was_lost(
    config: TrackingConfig, tmp_path: Path
) -> None:
    recording = recording_in(tmp_path, config)
    kept = rows([1, 2, 3], 0)
    kept[1]["metrics"]["val/t2v/R1"] = 40.0
    with MetricsSender(str(tmp_path), recording, every_s=100) as sender:
        sender.add([kept[0], {"step": 2, "time_ms": 2, "metrics": {"val/t2v/R1": 40.0}}, kept[2]])
    assert history(config, recording, "loss") == [(1, 1.0)]
    metrics_log.write(str(tmp_path), kept)  # type: ignore[arg-type]
    again = MetricsSender(str(tmp_path), recording, every_s=100, checkpoint=3)
    assert recording.attempt(again.send_to)
    assert [step for step, _ in history(config, recording, "loss")] == [1, 2, 3]
    assert history(config, recording, "val/t2v/R1") == [(2, 40.0)]


def test_a_run_that_an_earlier_version_began_is_continued(
    config: TrackingConfig, tmp_path: Path
) -> None:
    """It sent everything up to a checkpoint, and kept one number of how far it had come."""
    metrics_log.write(str(tmp_path), rows([1, 2], 0, val_R1=1.0))  # type: ignore[arg-type]
    metrics_log.write(str(tmp_path), rows([3, 4], 0, val_R1=2.0))  # type: ignore[arg-type]
    run = Run.open(config, "run", f"{tmp_path}/mlflow_run.json")
    run.log_steps(metrics_log.read(str(tmp_path), 2))
    MlflowClient(tracking_uri=config.uri).set_tag(run.run_id, "logged_step", "2")
    recording = recording_in(tmp_path, config)
    sender = MetricsSender(str(tmp_path), recording, every_s=100, checkpoint=4)
    assert recording.attempt(sender.send_to)
    assert recording.run_id == run.run_id
    assert [step for step, _ in history(config, recording, "loss")] == [1, 2, 3, 4]
    assert history(config, recording, "val/R1") == [(2, 1.0), (4, 2.0)]


@pytest.mark.slow
def test_a_slow_server_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipelines.train.metrics_sender.CLOSING_S", 0.2)
    server = BrokenServer()
    server.delay_s = 5.0
    try:
        config = TrackingConfig(uri=f"http://{server.address}")
        recording = recording_in(tmp_path, config)
        started = time.monotonic()
        with MetricsSender(str(tmp_path), recording, every_s=0.01) as sender:
            for step in range(1, 200):
                sender.add(rows([step], 0))
            sender.checkpoint(100)
            assert time.monotonic() - started < 2.5
            wait_until(lambda: server.requests == 1)
            started = time.monotonic()
        assert time.monotonic() - started < 2.5
        assert server.most_at_once == 1
        assert server.requests == 1
    finally:
        server.close()
