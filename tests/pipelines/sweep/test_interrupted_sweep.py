"""A sweep that is interrupted says so, and so does MLflow."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.helpers.data import PROJECT, TinyData
from tests.helpers.waiting import wait_until


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_and_its_trials_are_closed(
    joining: dict[str, str],
    tiny_data: TinyData,
    mlflow_database: Path,
    tmp_path: Path,
    number: signal.Signals,
    local: bool,
) -> None:
    uri = f"sqlite:///{shutil.copy(mlflow_database, tmp_path / 'mlflow.db')}"
    output = tmp_path / "sweep"
    job = subprocess.Popen(
        [
            sys.executable, "-m", "jobs.sweep", f"--data={tiny_data.train_store}",
            f"--val-store={tiny_data.val_store}", f"--vocab={tiny_data.vocab}",
            "--steps=5000", "--global-batch=16", "--checkpoint-every=5000",
            f"--tracking.uri={uri}", f"--output={output}",
        ],
        cwd=PROJECT,
        env={k: v for k, v in joining.items() if not local or k != "RAY_ADDRESS"},
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    client = MlflowClient(tracking_uri=uri)
    try:
        wait_until(lambda: list(output.glob("trials/*/mlflow_run.json")), every_s=0.2)
        job.send_signal(number)
        _, said = job.communicate(timeout=200)
    finally:
        job.kill()
        job.wait()
    assert job.returncode == (130 if number == signal.SIGINT else 143), said
    if number == signal.SIGTERM:
        assert "was stopped by SIGTERM; run the same command again to continue" in said
    record = json.loads((output / "mlflow_run.json").read_text())
    parent = client.get_run(record["run_id"])
    assert parent.info.status == "KILLED"
    reason = parent.data.tags["end_reason"]
    assert reason == "interrupted (SIGINT)" or "stopped by SIGTERM" in reason
    for path in output.glob("trials/*/mlflow_run.json"):
        trial = client.get_run(json.loads(path.read_text())["run_id"])
        assert trial.info.status == "KILLED"
        assert trial.data.tags["mlflow.parentRunId"] == record["run_id"]
    assert not (output / "result.json").exists()
