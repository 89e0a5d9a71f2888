"""Checkpoints in MLflow: entries that say where the weights lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow.pyfunc
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipelines.common.config import TrackingConfig
from pipelines.common.mlflow_errors import MlflowUnavailableError
from pipelines.common.tracking import Run, StepMetrics


@pytest.fixture
def config(mlflow_database: Path, tmp_path: Path) -> TrackingConfig:
    copy = shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    return TrackingConfig(uri=f"sqlite:///{copy}", experiment="checkpoints")


@pytest.fixture
def client(config: TrackingConfig) -> MlflowClient:
    return MlflowClient(tracking_uri=config.uri, registry_uri=config.uri)


@pytest.fixture
def run(config: TrackingConfig, tmp_path: Path) -> Run:
    """A run that has the metrics of its last step."""
    run = Run.open(config, "run", str(tmp_path / "run.json"))
    row = StepMetrics(step=6, time_ms=1_000, metrics={"loss/total": 1.0, "val/t2v/R1": 40.0})
    run.log_steps([row])
    return run


METRICS = {"loss/total": 1.0, "val/t2v/R1": 40.0}
URI = "s3://bucket/my run/checkpoints/step-00000006"


@pytest.mark.slow
def test_a_checkpoint_is_an_output_of_its_run_without_charts_of_its_own(
    run: Run, client: MlflowClient
) -> None:
    for _ in range(2):
        run.log_checkpoint("model", URI, 6, METRICS, size_bytes=7_000)
    found = client.get_run(run.run_id)
    assert found.data.tags["checkpoint_uri"] == URI
    (output,) = found.outputs.model_outputs
    assert output.step == 6
    model = client.get_logged_model(output.model_id)
    assert (model.model_type, str(model.status)) == ("checkpoint pointer", "READY")
    assert model.params == {"step": "6"}
    assert model.metrics is not None
    assert {one.key: one.value for one in model.metrics} == METRICS
    # The run's curves are the only ones, with their points once.
    assert set(found.data.metrics) == set(METRICS)
    for name in METRICS:
        assert len(client.get_metric_history(run.run_id, name)) == 1


def test_the_best_checkpoint_has_the_time_of_its_step(run: Run, client: MlflowClient) -> None:
    run.log_steps([StepMetrics(step=9, time_ms=2_000, metrics={"val/t2v/R1": 30.0})])
    run.log_checkpoint("model_best", URI, 6, {"val/t2v/R1": 40.0}, final=False, time_ms=1_000)
    assert client.get_run(run.run_id).data.tags["best_checkpoint_uri"] == URI
    history = client.get_metric_history(run.run_id, "val/t2v/R1")
    assert [(point.step, point.value) for point in history] == [(6, 40.0), (9, 30.0)]


def test_the_last_checkpoint_is_one_entry_if_it_is_the_best(run: Run, client: MlflowClient) -> None:
    run.log_checkpoint("model", URI, 6, METRICS)
    run.log_checkpoint("model_best", URI, 6, {"val/t2v/R1": 40.0}, final=False)
    found = client.get_run(run.run_id)
    assert len(found.outputs.model_outputs) == 1
    assert found.data.tags["checkpoint_uri"] == found.data.tags["best_checkpoint_uri"] == URI


@pytest.mark.slow
def test_a_registered_pointer_has_files_and_says_how_to_make_a_model(
    run: Run,
    client: MlflowClient,
    config: TrackingConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(config.uri))  # MLflow's registry asks it alone
    run.log_checkpoint("model", URI, 6, METRICS, size_bytes=7_000)
    output = client.get_run(run.run_id).outputs.model_outputs[0]
    client.create_registered_model("by hand")
    version = client.create_model_version(
        "by hand", f"models:/{output.model_id}", model_id=output.model_id
    )
    place = mlflow.artifacts.download_artifacts(
        f"models:/by hand/{version.version}", dst_path=str(tmp_path)
    )
    facts = json.loads((Path(place) / "checkpoint.json").read_text())
    assert facts == {
        "checkpoint": URI,
        "step": 6,
        "metrics": METRICS,
        "size_bytes": 7_000,
        "make_a_model": f"python -m jobs.register '{URI}' --name NAME",
    }
    assert "contains no weights" in (Path(place) / "README.md").read_text()
    with pytest.raises(RuntimeError, match="contains no weights; make a model .* jobs.register"):
        mlflow.pyfunc.load_model(place)


def test_what_an_error_interrupted_goes_on(
    run: Run, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server takes metrics, but no files; then it takes them."""

    def refuse(*_: object) -> None:
        raise MlflowException("the disk of the server is full")

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_model_artifacts", refuse)
        for _ in range(2):
            with pytest.raises(MlflowUnavailableError, match="disk of the server"):
                run.log_checkpoint("model", URI, 6, METRICS)
    (output,) = client.get_run(run.run_id).outputs.model_outputs
    assert str(client.get_logged_model(output.model_id).status) == "PENDING"
    run.log_checkpoint("model", URI, 6, METRICS)
    experiment = client.get_run(run.run_id).info.experiment_id
    (model,) = client.search_logged_models([experiment])
    assert (model.model_id, str(model.status)) == (output.model_id, "READY")
    assert len(client.get_metric_history(run.run_id, "loss/total")) == 1


def test_a_run_of_an_earlier_version_keeps_the_names_it_began_with(
    run: Run, client: MlflowClient
) -> None:
    row = StepMetrics(step=3, time_ms=500, metrics={"checkpoint/loss/total": 2.0})
    run.log_steps([row])
    run.log_checkpoint("model", URI, 6, METRICS)
    history = client.get_metric_history(run.run_id, "checkpoint/loss/total")
    assert [(point.step, point.value) for point in history] == [(3, 2.0), (6, 1.0)]
