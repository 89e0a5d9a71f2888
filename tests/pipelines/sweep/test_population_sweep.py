"""A whole sweep with a population, by the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.artifacts.checkpoints import WEIGHTS
from pipelines.sweep.journal import Journal
from pipelines.sweep.population import FACTORS
from pipelines.train import run_folder
from tests.helpers.data import PROJECT, TinyData


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.soak
def test_a_member_continues_with_weights_and_perturbed_values_of_another(
    joining: dict[str, str], tiny_data: TinyData, mlflow_database: Path, tmp_path: Path
) -> None:
    uri = f"sqlite:///{shutil.copy(mlflow_database, tmp_path / 'mlflow.db')}"
    output = tmp_path / "sweep"
    done = subprocess.run(
        [
            sys.executable, "-m", "jobs.sweep", "pretrain_stage1_tiny",
            f"--data={tiny_data.train_store}", f"--val-store={tiny_data.val_store}",
            f"--vocab={tiny_data.vocab}", f"--output={output}", f"--tracking.uri={uri}",
            "--search=pbt", "--trials=4", "--space=optim.lr=loguniform(1e-4,1e-2)",
            "--metric=val/t2v/Rmean", "--steps=4", "--round-steps=2", "--checkpoint-every=2",
            "--keep-checkpoints=9", "--global-batch=16", "--num-workers=1",
        ],
        cwd=PROJECT,
        env=joining,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["trials"], summary["failed"], summary["diverged"]) == (4, 0, 0)
    journal = Journal(str(output))
    assert {(end.status, end.step) for end in journal.ends.values()} == {("finished", 4)}
    (changed,) = [trial for trial in journal.trials.values() if trial.rounds]
    (change,) = changed.rounds
    donor = journal.trials[change["from"]]
    assert change["step"] == 2
    expected = [min(max(donor.values["optim.lr"] * factor, 1e-4), 1e-2) for factor in FACTORS]
    assert changed.values["optim.lr"] in [pytest.approx(one) for one in expected]

    def weights(name: str, step: int) -> bytes:
        checkpoint = run_folder.checkpoint_uri(journal.folder(name), step)
        return Path(checkpoint, WEIGHTS).read_bytes()

    assert weights(changed.name, 2) == weights(donor.name, 2)
    assert weights(changed.name, 4) != weights(donor.name, 4)
    client = MlflowClient(tracking_uri=uri)
    for name in journal.trials:
        run_id = json.loads(Path(journal.folder(name), "mlflow_run.json").read_text())["run_id"]
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == summary["run_id"]
        history = client.get_metric_history(run_id, "loss/total")
        assert sorted(point.step for point in history) == [1, 2, 3, 4]
        files = {one.path for one in client.list_artifacts(run_id)}
        assert ("perturbations.json" in files) == (name == changed.name)
        if name == changed.name:
            client.download_artifacts(run_id, "perturbations.json", str(tmp_path))
            client.download_artifacts(run_id, "config.json", str(tmp_path))
    told = json.loads((tmp_path / "perturbations.json").read_text())
    assert told == {"changes": [json.loads(json.dumps(change))]}
    trained = json.loads((tmp_path / "config.json").read_text())
    assert trained["optim"]["lr"] == changed.values["optim.lr"]
