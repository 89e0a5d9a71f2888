"""Whole sweeps: trials that finish, stop, diverge and fail; kills; and the best one again."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient
from ray.util.placement_group import placement_group_table
from ray.util.state import list_actors

from jobs import train as train_job
from jobs.command_line import read_command_line
from pipelines.common import storage
from pipelines.common.config import TrackingConfig
from pipelines.common.output_folder import config_record
from pipelines.common.tracking import StepMetrics
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.journal import Journal
from pipelines.sweep.run import SweepSummary, run_sweep
from pipelines.sweep.search import judged, next_setting
from pipelines.sweep.space import read_space
from pipelines.train import metrics_log
from pipelines.train.run import run_train
from stgt.errors import STGTError
from tests.helpers.data import PROJECT, TinyData
from tests.helpers.faulty_s3 import FaultyS3
from tests.helpers.kills import processes
from tests.helpers.training import tiny_train
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.ray

METRIC = "val/t2v/Rmean"
DIVERGES = 1e12
"""A learning rate with which the loss is not finite after the first step."""


def sweep_config(data: TinyData, output: Path, db: Path, /, **changes: Any) -> SweepConfig:
    train = tiny_train(
        data,
        output,
        num_workers=1,
        steps=4,
        tracking=TrackingConfig(uri=f"sqlite:///{db}", experiment="sweep"),
    )
    values: dict[str, Any] = {"train": train, "space": (), "metric": METRIC, "grace_steps": 2}
    return SweepConfig(**{**values, **changes})


def groups_in_use() -> list[dict[str, Any]]:
    return [one for one in placement_group_table().values() if one["state"] != "REMOVED"]


def trial_processes() -> set[str]:
    """All that Tune has started, also those that have ended."""
    address = ray.get_runtime_context().gcs_address  # there may be other clusters on this machine
    found = list_actors(address, filters=[("class_name", "=", "ImplicitFunc")], limit=1000)
    return {one.actor_id for one in found}


@pytest.fixture(scope="module")
def swept(
    tiny_data: TinyData, mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SweepConfig, SweepSummary]:
    """A good and a diverging setting, each with two seeds, and a refit of the good one."""
    folder = tmp_path_factory.mktemp("swept")
    database = Path(shutil.copy(mlflow_database, folder / "mlflow.db"))
    config = sweep_config(
        tiny_data,
        folder / "a sweep",
        database,
        space=(f"optim.lr=grid(1e-3,{DIVERGES})",),
        search="grid",
        repeats=2,
        refit=True,
    )
    return config, run_sweep(config)


def test_settings_are_judged_over_their_seeds_and_divergence_is_a_result(
    swept: tuple[SweepConfig, SweepSummary],
) -> None:
    config, summary = swept
    outcomes = Journal(config.output).outcomes()
    assert [(one.values["optim.lr"], one.seed) for one in outcomes] == [
        (1e-3, 0),
        (1e-3, 1),
        (DIVERGES, 0),
        (DIVERGES, 1),
    ]
    good = [one for one in outcomes if one.values["optim.lr"] == 1e-3]
    assert [one.status for one in outcomes[2:]] == ["diverged", "diverged"]
    assert "loss is not finite at step" in outcomes[2].reason
    metrics = [one.metric for one in good if one.metric is not None]
    assert len(metrics) == 2
    assert summary["best_params"] == {"optim.lr": 1e-3}
    assert summary["best_metric"] == pytest.approx(statistics.fmean(metrics))
    assert summary["best_spread"] == pytest.approx(statistics.stdev(metrics))
    assert (summary["trials"], summary["diverged"], summary["failed"]) == (4, 2, 0)
    assert groups_in_use() == []


def test_mlflow_shows_the_trials_below_their_sweep(
    swept: tuple[SweepConfig, SweepSummary],
) -> None:
    config, summary = swept
    client = MlflowClient(tracking_uri=config.train.tracking.uri)
    experiment = client.get_experiment_by_name("sweep")
    assert experiment is not None
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop(summary["run_id"] or "")
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics[f"best/{METRIC}"] == pytest.approx(summary["best_metric"])
    assert parent.data.metrics["trials/diverged"] == 2
    assert "report.html" in {one.path for one in client.list_artifacts(parent.info.run_id)}
    by_name = {run.info.run_name: run for run in runs.values()}
    assert by_name.keys() == {*(f"trial_{n:05d}" for n in range(4)), "refit"}
    for outcome in Journal(config.output).outcomes():
        run = by_name[outcome.name]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert float(run.data.params["optim.lr"]) == outcome.values["optim.lr"]
        expected = {"finished": "FINISHED", "diverged": "FAILED"}
        assert run.info.status == expected[outcome.status]
        if outcome.status == "finished":
            steps = client.get_metric_history(run.info.run_id, "loss/total")
            assert sorted(point.step for point in steps) == [1, 2, 3, 4]


def test_the_best_setting_is_reproduced_by_its_command(
    swept: tuple[SweepConfig, SweepSummary], tmp_path: Path
) -> None:
    config, summary = swept
    words = shlex.split(summary["command"])
    assert words[:3] == ["python", "-m", "jobs.train"]
    again, _ = read_command_line("train", train_job.JOB.command_line, words[3:])
    assert again.output.startswith(config.output)
    result = run_train(replace(again, output=str(tmp_path / "again")))
    (trial,) = (
        one for one in Journal(config.output).outcomes() if one.name == summary["best_trial"]
    )
    best = json.loads((tmp_path / "again" / "best.json").read_text())
    assert result["step"] == trial.step
    assert best["value"] == trial.metric


def test_the_refit_uses_the_validation_clips_as_well(
    swept: tuple[SweepConfig, SweepSummary],
) -> None:
    config, summary = swept
    recorded = json.loads(
        (Path(config.output) / "refit" / summary["best_trial"] / "config.json").read_text()
    )
    assert recorded["data"] == [*config.train.data, config.train.val_store]
    assert recorded["val_store"] is None
    assert recorded["optim"]["lr"] == 1e-3
    checkpoint = Path(summary["refit_checkpoint"] or "")
    assert checkpoint.name == "step-00000004"
    assert (checkpoint / "model.safetensors").exists()


def test_a_finished_sweep_gives_its_result_again_and_refuses_another_space(
    swept: tuple[SweepConfig, SweepSummary],
) -> None:
    config, summary = swept
    trial = Path(config.output) / "trials" / summary["best_trial"]
    before = {path: path.stat().st_mtime_ns for path in trial.glob("checkpoints/*/*")}
    # As if the driver had been killed right after the trial wrote its result.
    (trial / "ended.json").unlink()
    again = run_sweep(config)
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}
    assert before == {path: path.stat().st_mtime_ns for path in trial.glob("checkpoints/*/*")}
    other = replace(config, space=("optim.lr=grid(1e-3,1e-4)",))
    with pytest.raises(
        STGTError, match=r"different settings \(space: .*1000000000000.* -> .*0.0001"
    ):
        run_sweep(other)
    recipe = replace(config.train, recipe="finetune_msvd_tiny", precision="bf16")
    with pytest.raises(STGTError, match=r"of another recipe \(pretrain_stage1_tiny -> finetune_ms"):
        run_sweep(replace(config, train=recipe))
    assert run_sweep(replace(config, trials=1))["best_trial"] == summary["best_trial"]
    fewer = replace(config.train, val_clips=4)
    with pytest.raises(STGTError, match=r"different settings \(val_clips: 64 -> 4\)"):
        run_sweep(replace(config, train=fewer))
    twice = replace(config.train, data=(*config.train.data, str(config.train.val_store)))
    with pytest.raises(STGTError, match=r"different settings \(data_digest"):
        run_sweep(replace(config, train=twice))
    elsewhere = replace(config.train, output=str(trial))
    with pytest.raises(STGTError, match="is a folder of the job train"):
        run_sweep(replace(config, train=elsewhere))
    with pytest.raises(STGTError, match=r"different settings \(precision: 'fp32' -> 'bf16'\)"):
        run_sweep(replace(config, train=replace(config.train, precision="bf16")))


def test_a_killed_driver_continues_with_the_trials_of_an_undisturbed_sweep(
    joining: dict[str, str], tiny_data: TinyData, mlflow_database: Path, tmp_path: Path
) -> None:
    database = Path(shutil.copy(mlflow_database, tmp_path / "mlflow.db"))
    output = tmp_path / "sweep"
    space = "optim.lr=loguniform(1e-5,1e-2)"
    config = sweep_config(
        tiny_data,
        output,
        database,
        space=(space,),
        search="optuna",
        scheduler="none",
        trials=3,
        max_concurrent_trials=1,
    )
    config = replace(config, train=replace(config.train, checkpoint_every=2, steps=6))
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(config_record("sweep", config)))
    driver = subprocess.Popen(
        [sys.executable, "-m", "jobs.sweep", "--config", str(path)],
        cwd=PROJECT,
        env=joining,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    second = output / "trials" / "trial_00001" / "checkpoints" / "step-00000002" / "COMPLETE"
    try:
        wait_until(second.exists, 300, every_s=0.02)
    finally:
        driver.kill()
        driver.communicate()
    before = Journal(str(output))
    assert list(before.trials) == ["trial_00000", "trial_00001"]
    wait_until(lambda: not groups_in_use(), 60)
    summary = run_sweep(config)
    assert (summary["trials"], summary["failed"]) == (3, 0)
    after = Journal(str(output))
    assert {name: after.trials[name] for name in before.trials} == before.trials
    assert after.ends["trial_00000"] == before.ends["trial_00000"]
    outcomes = after.outcomes()
    for number, one in enumerate(outcomes):
        expected = next_setting(
            "optuna",
            read_space([space], config.train),
            number,
            judged(outcomes[:number], 1),
            config.train.seed,
            3,
        )
        assert one.values == expected
        assert (one.status, one.step) == ("finished", 6)
    client = MlflowClient(tracking_uri=config.train.tracking.uri)
    for one in outcomes:
        run_id = json.loads((output / "trials" / one.name / "mlflow_run.json").read_text())
        history = client.get_metric_history(run_id["run_id"], "loss/total")
        assert sorted(point.step for point in history) == [1, 2, 3, 4, 5, 6]
        assert client.get_run(run_id["run_id"]).info.status == "FINISHED"
    assert groups_in_use() == []


@pytest.mark.soak
@pytest.mark.slow
def test_stopped_trials_leave_their_process_to_the_next_and_are_shown_as_stopped(
    tiny_data: TinyData, mlflow_database: Path, tmp_path: Path
) -> None:
    """Both are behind a trial of an earlier start, so ASHA stops them by their first report."""
    database = Path(shutil.copy(mlflow_database, tmp_path / "mlflow.db"))
    output = tmp_path / "sweep"
    config = sweep_config(
        tiny_data,
        output,
        database,
        space=("optim.lr=grid(1e-3,2e-3,3e-3)",),
        search="grid",
        scheduler="asha",
        max_concurrent_trials=1,
    )
    journal = Journal(str(output))
    first = journal.begin(0, config.train.seed, {"optim.lr": 1e-3})
    row = StepMetrics(step=2, time_ms=0, metrics={METRIC: 100.0})
    metrics_log.write(journal.folder(first.name), [row])
    journal.end(first.name, "finished", 4, 100.0)
    processes_before = trial_processes()
    summary = run_sweep(config)
    assert (summary["trials"], summary["stopped_early"]) == (3, 2)
    stopped = Journal(str(output)).outcomes()[1:]
    assert [(one.status, one.step) for one in stopped] == [("stopped", 2)] * 2
    assert len(trial_processes() - processes_before) == 1
    assert groups_in_use() == []
    client = MlflowClient(tracking_uri=config.train.tracking.uri)
    for one in stopped:
        run_id = json.loads((output / "trials" / one.name / "mlflow_run.json").read_text())
        run = client.get_run(run_id["run_id"])
        assert run.info.status == "KILLED"
        assert run.data.tags["end_reason"] == f"stopped early: {one.reason}"
        assert one.reason.startswith("behind other trials at step 2 ")
        history = client.get_metric_history(run_id["run_id"], "loss/total")
        assert sorted(point.step for point in history)[:2] == [1, 2]


def test_a_trial_that_never_fits_is_refused_before_it_waits(
    tiny_data: TinyData, mlflow_database: Path, tmp_path: Path
) -> None:
    database = Path(shutil.copy(mlflow_database, tmp_path / "mlflow.db"))
    config = sweep_config(
        tiny_data, tmp_path / "sweep", database, space=("optim.lr=grid(1e-3)",), search="grid"
    )
    cpus = int(ray.cluster_resources()["CPU"])
    wide = replace(config.train, threads_per_worker=cpus + 1)
    with pytest.raises(STGTError, match=f"a trial needs {cpus + 1} CPUs"):
        run_sweep(replace(config, train=wide))
    assert not (tmp_path / "sweep" / "trials").exists()


@pytest.mark.soak
@pytest.mark.slow
def test_a_trial_whose_processes_die_continues_from_its_checkpoint(
    tiny_data: TinyData, mlflow_database: Path, tmp_path: Path
) -> None:
    database = Path(shutil.copy(mlflow_database, tmp_path / "mlflow.db"))
    config = sweep_config(
        tiny_data, tmp_path / "sweep", database, space=("optim.lr=grid(1e-3)",), search="grid"
    )
    config = replace(config, train=replace(config.train, checkpoint_every=2, steps=40))
    found: dict[str, Any] = {}
    sweep = threading.Thread(target=lambda: found.update(run_sweep(config)))
    sweep.start()
    trial = tmp_path / "sweep" / "trials" / "trial_00000"
    wait_until(lambda: list(trial.glob("checkpoints/step-00000004/COMPLETE")), every_s=0.02)
    for process in processes("ImplicitFunc"):
        os.kill(process.pid, signal.SIGKILL)
    sweep.join(timeout=300)
    assert (found["trials"], found["failed"]) == (1, 0)
    assert Journal(config.output).outcomes()[0].step == 40
    assert groups_in_use() == []


@pytest.mark.soak
@pytest.mark.slow
def test_a_lost_node_and_stopped_trials_leave_the_others_running_without_a_dashboard(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    script = [sys.executable, "-m", "tests.helpers.lose_a_sweep_node"]
    stores = [tiny_data.train_store, tiny_data.val_store, tiny_data.vocab]
    done = subprocess.run(
        [*script, *stores, str(tmp_path / "sweep")],
        cwd=PROJECT,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["nodes_lost"], found["trials"], found["failed"]) == (1, 5, 0)
    assert found["groups_in_use"] == 0
    assert "a training worker of a trial needs 2 CPUs on one node" in found["refused"]
    assert found["statuses"].count("stopped") >= 1
    assert set(found["statuses"]) == {"finished", "stopped"}


@pytest.mark.soak
@pytest.mark.slow
def test_a_sweep_on_object_storage_is_used_by_one_driver_and_continues(
    s3: FaultyS3, tiny_data: TinyData, mlflow_database: Path, tmp_path: Path
) -> None:
    database = Path(shutil.copy(mlflow_database, tmp_path / "mlflow.db"))
    config = sweep_config(
        tiny_data, Path("out"), database, space=("optim.lr=grid(1e-3,2e-3)",), search="grid"
    )
    output = "s3://bucket/sweep"
    train = replace(config.train, output=output, steps=40, checkpoint_every=2)
    config = replace(config, train=train, scheduler="none", max_concurrent_trials=1)
    found: dict[str, Any] = {}
    sweep = threading.Thread(target=lambda: found.update(run_sweep(config)))
    sweep.start()
    wait_until(lambda: Journal(output).trials)
    with pytest.raises(STGTError, match="is using s3://bucket/sweep"):
        run_sweep(config)
    sweep.join(timeout=400)
    assert (found["trials"], found["failed"]) == (2, 0)
    assert [one.status for one in Journal(output).outcomes()] == ["finished", "finished"]
    assert storage.exists(found["report"])
    assert not storage.exists(f"{output}/in_use.json")
    # Trials on other nodes have no file of this one.
    for name in Journal(output).trials:
        trial = storage.read_json(f"{output}/trials/{name}/config.json")
        assert trial["vocab"] == f"{output}/vocab.txt"
    again = run_sweep(config)
    assert again["best_metric"] == found["best_metric"]
