"""A trial in its process: which errors end it, and how a stopped one leaves the process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray.train
from mlflow import MlflowClient
from ray import tune
from ray.train import RunConfig, ScalingConfig
from ray.util.placement_group import placement_group_table

from pipelines.artifacts.checkpoints import COMPLETE
from pipelines.common import storage
from pipelines.common.config import TrackingConfig
from pipelines.common.output_folder import CONFIG
from pipelines.common.recording import Recording
from pipelines.common.tracking import recorded_run_id
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.trial import ENDING_S, FAULT, ReportToTune, TrialJob, read_fault, run_trial
from pipelines.train import run_folder
from pipelines.train.elastic import EvenSharesTrainer
from pipelines.train.recipes import pretrain_stage1_tiny
from tests.helpers.waiting import wait_until

JOB = TrialJob(trial="trial_00000", seed=0, values={}, until=None)


def sweep(output: Path) -> SweepConfig:
    train = pretrain_stage1_tiny((str(output / "no clips"),), str(output), "no vocabulary")
    return SweepConfig(train=train, space=("optim.lr=grid(1e-3)",))


def test_an_error_that_another_attempt_would_meet_again_ends_the_trial(tmp_path: Path) -> None:
    run_trial(dict(JOB), sweep(tmp_path), None)
    fault = read_fault(str(tmp_path / "trials" / JOB["trial"]))
    assert fault is not None
    assert not fault["diverged"]
    assert "no clips" in fault["reason"]


def test_any_other_error_reaches_tune_which_tries_again(tmp_path: Path) -> None:
    """Such as one of the file system, here of a file that cannot be read."""
    trial = tmp_path / "trials" / JOB["trial"]
    storage.write_bytes(storage.join(run_folder.checkpoint_uri(str(trial), 2), COMPLETE), b"")
    (trial / CONFIG).mkdir()
    with pytest.raises(IsADirectoryError):
        run_trial(dict(JOB), sweep(tmp_path), None)
    assert not (trial / FAULT).exists()


@pytest.mark.ray
def test_a_stopped_trial_ends_its_workers_and_its_run_and_another_uses_its_process(
    ray_cluster: None, mlflow_database: Path, tmp_path: Path
) -> None:
    """With Tune, Ray Train and MLflow, but nothing to train."""
    database = shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    tracking = TrackingConfig(uri=f"sqlite:///{database}", experiment="trials")

    def work(settings: Mapping[str, Any]) -> None:
        (tmp_path / f"{settings['name']}.worker").write_text(str(os.getpid()))
        for step in range(1, 4):
            ray.train.report({"step": step})

    def trial(job: dict[str, Any]) -> None:
        # A worker that found no room would wait for longer.
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "20"
        # As in a sweep: by default, Tune gives up a process that does not end a trial within 2 s.
        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(ENDING_S)
        name = job["trial"]
        (tmp_path / f"{name}.pid").write_text(str(os.getpid()))
        record = str(tmp_path / name / "run.json")
        recording = Recording(tracking, name, record, {}, meanwhile="the trial continues")
        with recording.running():
            EvenSharesTrainer(
                work,
                allowed_worker_counts=(1,),
                reserved=True,
                train_loop_config={"name": name},
                scaling_config=ScalingConfig(num_workers=1),
                run_config=RunConfig(
                    name=name,
                    storage_path=str(tmp_path / "train"),
                    callbacks=[ReportToTune()],  # type: ignore[list-item]
                ),
            ).fit()
        recording.finish()

    tuner = tune.Tuner(
        tune.with_resources(trial, tune.PlacementGroupFactory([{}, {"CPU": 1}])),
        param_space={"trial": tune.grid_search(["stopped", "next"])},
        tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=1),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(tmp_path),
            verbose=0,
            stop=lambda _, result: result["config"]["trial"] == "stopped",
        ),
    )
    results = tuner.fit()
    assert results.errors == []
    assert [(one.metrics or {})["step"] for one in results] == [1, 3]
    pids = [int((tmp_path / f"{name}.pid").read_text()) for name in ("stopped", "next")]
    assert pids[0] == pids[1]
    client = MlflowClient(tracking_uri=tracking.uri)
    runs = [
        client.get_run(recorded_run_id(str(tmp_path / name / "run.json")) or "")
        for name in ("stopped", "next")
    ]
    assert [run.info.status for run in runs] == ["KILLED", "FINISHED"]
    workers = [int(path.read_text()) for path in tmp_path.glob("*.worker")]
    assert len(set(workers)) == 2
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in workers), 30)
    states = {one["state"] for one in placement_group_table().values()}
    assert states <= {"REMOVED"}
