"""What MLflow knows about a run besides its settings and metrics."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

from pipelines.common import provenance
from pipelines.common.config import TrackingConfig
from pipelines.common.provenance import About, DatasetInput, Origin
from pipelines.common.recording import Recording
from pipelines.common.tracking import Run

KIND = "mlflow.experimentKind"
STORE = DatasetInput("/data/clips/train-ab", "clip store", "0123456789abcdef" * 4, "training", 40)
TRAINING = About(
    job="train",
    summary="Trains a model.",
    recipe="pretrain_tiny",
    datasets=(STORE, replace(STORE, context="validation", clips=4)),
    fingerprints={"data": STORE.digest},
    step="pre-trained",
)


@pytest.fixture(scope="module")
def shared(mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    copy = shutil.copy(mlflow_database, tmp_path_factory.mktemp("shared") / "mlflow.db")
    return TrackingConfig(uri=f"sqlite:///{copy}", experiment="details", system_metrics_every_s=0)


@pytest.fixture
def client(shared: TrackingConfig) -> MlflowClient:
    return MlflowClient(tracking_uri=shared.uri)


def recorded(
    config: TrackingConfig, folder: Path, name: str, about: About, values: Mapping[str, Any]
) -> tuple[Recording, str]:
    recording = Recording(
        config, name, str(folder / "mlflow_run.json"), values, meanwhile="it goes on", about=about
    )
    with recording.running():
        assert recording.run_id is not None
    return recording, recording.run_id


@pytest.mark.slow
def test_a_run_has_source_user_code_machine_and_data(
    shared: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    with provenance.using_command("python -m jobs.train pretrain_tiny --data http://me:pa55@h/d"):
        recording, run_id = recorded(shared, tmp_path, "first", TRAINING, {"lr": 0.1})
    assert recording.finish()
    run = client.get_run(run_id)
    tags = run.data.tags
    command = "python -m jobs.train pretrain_tiny --data http://***@h/d"
    assert (tags["mlflow.source.name"], tags["mlflow.source.type"]) == (command, "JOB")
    assert tags["mlflow.user"] == run.info.user_id == provenance.user()
    commit = provenance.commit()
    if commit is not None:
        assert tags["mlflow.source.git.commit"] == commit.sha
        assert tags["git.dirty"] == ("yes" if commit.is_dirty else "no")
    assert (tags["job"], tags["recipe"]) == ("train", "pretrain_tiny")
    assert tags["fingerprint.data"] == STORE.digest
    assert tags["source.directory"] == str(Path.cwd())
    assert tags["versions.torch"] == provenance.versions()["torch"]
    assert tags["hardware.cpus"] == provenance.hardware()["cpus"]
    assert tags["lineage"] == "pre-trained as first"
    inputs = {
        one.tags[0].value: (one.dataset.name, one.dataset.digest, json.loads(one.dataset.source))
        for one in run.inputs.dataset_inputs
    }
    source = {"uri": "/data/clips/train-ab"}
    assert inputs == {
        "training": ("clips/train-ab", STORE.digest[:12], source),
        "validation": ("clips/train-ab (validation)", STORE.digest[:12], source),
    }
    text = tags["mlflow.note.content"]
    assert text.startswith("Trains a model.\n\n")
    assert f"`{command}`" in text
    assert "clip store `/data/clips/train-ab`, 40 clips" in text


def test_a_server_that_takes_no_data_sets_records_the_rest(
    shared: TrackingConfig,
    client: MlflowClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Such as an older one. What it lacks is sent once it can take it."""

    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("no such endpoint", error_code=ENDPOINT_NOT_FOUND)

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_inputs", refuse)
        recording, run_id = recorded(shared, tmp_path, "without", TRAINING, {"lr": 0.1})
        recording.deliver(lambda run: run.log_metrics({"loss": 1.0}))
        assert not recording.finish()
    run = client.get_run(run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 1.0})
    assert run.data.params == {"lr": "0.1"}
    (said,) = [one for one in caplog.messages if "no such endpoint" in one]
    assert "cannot store the settings and the origin of the run: " in said
    assert said.endswith("and everything else is recorded")
    again, _ = recorded(shared, tmp_path, "without", TRAINING, {"lr": 0.1})
    assert again.finish()
    assert len(client.get_run(run_id).inputs.dataset_inputs) == 2


def test_a_resumed_run_has_the_source_of_its_latest_start_and_each_input_once(
    shared: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    for command in ("python -m jobs.train a", "python -m jobs.train a --allow-changes"):
        with provenance.using_command(command):
            recording, run_id = recorded(shared, tmp_path, "again", TRAINING, {})
        assert recording.finish()
    run = client.get_run(run_id)
    assert run.data.tags["mlflow.source.name"] == "python -m jobs.train a --allow-changes"
    assert len(run.inputs.dataset_inputs) == 2


def test_a_description_that_somebody_edited_is_kept(
    shared: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    run = Run.open(shared, "described", str(tmp_path / "run.json"))
    run.describe("first")
    run.describe("second")
    assert client.get_run(run.run_id).data.tags["mlflow.note.content"] == "second"
    client.set_tag(run.run_id, "mlflow.note.content", "what I found")
    run.describe("third")
    assert client.get_run(run.run_id).data.tags["mlflow.note.content"] == "what I found"


def test_lineage_leads_from_an_evaluation_to_the_pre_training(
    shared: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    first, pretraining = recorded(shared, tmp_path / "a", "stage one", TRAINING, {})
    assert first.finish()
    origin = Origin("/a/checkpoints/step-6", pretraining, shared.uri)
    tuning = replace(TRAINING, step="fine-tuned", origin=origin)
    second, finetuning = recorded(shared, tmp_path / "b", "stage two", tuning, {})
    checkpoint = "/b/checkpoints/step-9"
    second.deliver(lambda run: run.log_checkpoint("stage two", checkpoint, 9, {"loss": 1.0}))
    assert second.finish()
    about = About(
        job="evaluate",
        summary="Evaluates a model.",
        step="evaluated",
        origin=Origin(checkpoint, finetuning, shared.uri),
    )
    third, evaluation = recorded(shared, tmp_path / "c", "on a benchmark", about, {})
    third.deliver(lambda run: run.log_metrics({"t2v/R1": 40.0}))
    assert third.finish()
    run = client.get_run(evaluation)
    assert run.data.tags["lineage"] == (
        "pre-trained as stage one -> fine-tuned as stage two -> evaluated as on a benchmark"
    )
    assert run.data.tags["lineage.run"] == finetuning
    assert client.get_run(finetuning).data.tags["lineage.run"] == pretraining
    text = run.data.tags["mlflow.note.content"]
    experiment = run.info.experiment_id
    assert f"[stage two](#/experiments/{experiment}/runs/{finetuning}?workflowType=" in text
    # The model of the checkpoint has the metrics of its evaluation.
    (entry,) = run.inputs.model_inputs
    model = client.get_logged_model(entry.model_id)
    assert model.source_run_id == finetuning
    assert model.metrics is not None
    assert {(one.key, one.value) for one in model.metrics} == {("loss", 1.0), ("t2v/R1", 40.0)}


@pytest.mark.parametrize(
    "origin",
    [
        Origin("s3://models/imported"),
        Origin("s3://models/imported", "0" * 32, "http://elsewhere"),
        Origin("s3://models/imported", "0" * 32, "{uri}"),
    ],
    ids=["no run", "another server", "deleted"],
)
def test_without_its_run_a_checkpoint_is_named_by_its_uri(
    shared: TrackingConfig, client: MlflowClient, tmp_path: Path, origin: Origin
) -> None:
    if origin.tracking_uri == "{uri}":
        origin = replace(origin, tracking_uri=shared.uri)
    about = replace(TRAINING, step="fine-tuned", origin=origin)
    recording, run_id = recorded(shared, tmp_path, "tuned", about, {})
    assert recording.finish()
    tags = client.get_run(run_id).data.tags
    assert tags["lineage"] == "checkpoint s3://models/imported -> fine-tuned as tuned"
    assert tags["lineage.checkpoint"] == "s3://models/imported"
    assert tags.get("lineage.run") == origin.run_id


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "custom_model_development"),
        ("genai_development_inferred", "custom_model_development"),
        ("no_inferred_type", "custom_model_development"),
        ("genai_development", "genai_development"),
        ("finetuning", "finetuning"),
    ],
)
def test_an_experiment_is_about_model_training_unless_somebody_chose(
    shared: TrackingConfig,
    client: MlflowClient,
    tmp_path: Path,
    before: str | None,
    after: str,
) -> None:
    number = client.create_experiment(f"kind {before}")
    if before is not None:
        client.set_experiment_tag(number, KIND, before)
    config = replace(shared, experiment=f"kind {before}")
    Run.open(config, "run", str(tmp_path / "run.json")).finish()
    assert client.get_experiment(number).tags[KIND] == after


def test_a_new_experiment_is_about_model_training(
    shared: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    config = replace(shared, experiment="of a new kind")
    Run.open(config, "run", str(tmp_path / "run.json")).finish()
    experiment = client.get_experiment_by_name("of a new kind")
    assert experiment is not None
    assert experiment.tags[KIND] == "custom_model_development"
