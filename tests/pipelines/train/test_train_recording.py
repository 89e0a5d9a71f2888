"""What MLflow shows of trainings that fail, are interrupted, or cannot reach it, on a real Ray."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from pipelines.common.config import TrackingConfig
from pipelines.common.output_folder import RUN
from pipelines.train import metrics_log, run_folder
from pipelines.train.config import TrainConfig
from pipelines.train.run import run_train
from stgt.config import OptimConfig
from stgt.errors import NonFiniteLossError
from tests.helpers.data import PROJECT, TinyData
from tests.helpers.training import tiny_train
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.ray

LOCK = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1])
database.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
input()
"""


def client_of(config: TrainConfig) -> MlflowClient:
    return MlflowClient(tracking_uri=config.tracking.uri)


def run_of(config: TrainConfig) -> Run | None:
    record = Path(config.output, RUN)
    if not record.exists():
        return None
    return client_of(config).get_run(json.loads(record.read_text())["run_id"])


def steps_of(config: TrainConfig, run: Run | None) -> list[int]:
    if run is None:
        return []
    points = client_of(config).get_metric_history(run.info.run_id, "loss/total")
    return [point.step for point in points]


def test_the_steps_before_a_failure_are_recorded_with_the_reason(
    tiny_data: TinyData, mlflow_database: Path, tmp_path: Path
) -> None:
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    config = tiny_train(
        tiny_data,
        tmp_path / "run",
        val_store=None,
        num_workers=1,
        steps=50,
        checkpoint_every=50,
        progress_every=50,
        optim=OptimConfig(lr=1e30, warmup_steps=0),
        metric_names=1,
    )
    with pytest.raises(NonFiniteLossError) as caught:
        run_train(config)
    run = run_of(config)
    assert run is not None
    assert run.info.status == "FAILED"
    assert f"loss is not finite at step {caught.value.step}" in run.data.tags["end_reason"]
    assert caught.value.step >= 1
    assert steps_of(config, run) == list(range(1, caught.value.step + 1))
    # A run that an earlier version began keeps its names of metrics.
    groups = {name.rpartition("/")[0] for name in run.data.metrics}
    assert "data" in groups
    assert "samples" not in groups


@pytest.mark.slow
def test_an_interrupted_training_shows_its_steps_without_a_checkpoint(
    joining: dict[str, str], tiny_data: TinyData, mlflow_database: Path, tmp_path: Path
) -> None:
    """Metrics arrive by time, in the database that the environment names."""
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    config = tiny_train(tiny_data, tmp_path / "run")
    job = subprocess.Popen(
        [
            sys.executable, "-m", "jobs.train", "pretrain_stage1_tiny",
            f"--data={tiny_data.train_store}", f"--output={config.output}",
            f"--vocab={tiny_data.vocab}", "--steps=5000", "--global-batch=8", "--num-workers=1",
            "--checkpoint-every=5000", "--tracking.send-every-s=0.2",
        ],
        cwd=PROJECT,
        env={
            **joining,
            "MLFLOW_TRACKING_URI": str(config.tracking.uri),
            "MLFLOW_EXPERIMENT_NAME": "named by the environment",
        },
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: len(steps_of(config, run_of(config))) >= 3, every_s=0.2)
        run = run_of(config)
        assert run is not None
        assert run.info.status == "RUNNING"
        assert run_folder.latest(config.output) is None
        job.send_signal(signal.SIGINT)
        _, said = job.communicate(timeout=60)
    finally:
        job.kill()
        job.wait()
    assert job.returncode == 130, said
    run = run_of(config)
    assert run is not None
    assert (run.info.status, run.data.tags["end_reason"]) == ("KILLED", "interrupted (SIGINT)")
    steps = steps_of(config, run)
    assert steps == list(range(1, len(steps) + 1))
    experiment = client_of(config).get_experiment_by_name("named by the environment")
    assert experiment is not None
    assert run.info.experiment_id == experiment.experiment_id
    source = run.data.tags["mlflow.source.name"]
    assert source.startswith("python -m jobs.train pretrain_stage1_tiny --data=")
    assert "hardware.cluster_cpus" in run.data.tags
    recorded = json.loads(Path(config.output, "config.json").read_text())["tracking"]
    assert recorded["uri"] == config.tracking.uri


@pytest.mark.slow
@pytest.mark.soak
def test_a_training_outlasts_a_locked_database(
    tiny_data: TinyData, mlflow_database: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another process writes to the database from the start until the training has ended."""
    database = shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    tracking = TrackingConfig(uri=f"sqlite:///{database}", send_every_s=1)
    config = replace(
        tiny_train(tiny_data, tmp_path / "run", val_store=None, num_workers=1), tracking=tracking
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", LOCK, str(database)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        summary = run_train(config)
    finally:
        holder.kill()
        holder.wait()
    assert summary["step"] == 6
    said = [message for message in caplog.messages if "cannot be used" in message]
    said += [message for message in caplog.messages if "has not opened the run" in message]
    assert len(said) == 1
    assert f"its metrics are kept in {config.output}/metrics" in said[0]
    assert "Traceback" not in caplog.text
    assert run_train(config)["run_id"] is not None
    run = run_of(config)
    assert run is not None
    assert run.info.status == "FINISHED"
    assert steps_of(config, run) == list(range(1, 7))
    assert metrics_log.steps(config.output) == [2, 4, 6]
