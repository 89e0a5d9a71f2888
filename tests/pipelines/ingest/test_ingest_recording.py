"""An ingest goes on without MLflow, and the next start sends its results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.artifacts.clip_store import ClipStore
from pipelines.common.config import TrackingConfig
from pipelines.ingest.run import run_ingest
from stgt.errors import ClipStoreError
from tests.helpers.data import TinyData, digests, tiny_ingest
from tests.helpers.mlflow_servers import BrokenServer

pytestmark = pytest.mark.ray


@pytest.fixture
def refusing() -> Iterator[TrackingConfig]:
    """An MLflow server that grants no permission to its experiments."""
    server = BrokenServer()
    server.status, server.body = 403, b'{"error_code": "PERMISSION_DENIED", "message": "quota"}'
    # System metrics would be kept beside the store, like everything that could not be sent.
    yield TrackingConfig(uri=f"http://{server.address}", system_metrics_every_s=0)
    server.close()


@pytest.fixture
def working(mlflow_database: Path, tmp_path: Path) -> TrackingConfig:
    return TrackingConfig(uri=f"sqlite:///{shutil.copy(mlflow_database, tmp_path / 'mlflow.db')}")


def test_an_ingest_is_recorded_by_the_start_after_mlflow_works(
    tiny_data: TinyData,
    refusing: TrackingConfig,
    working: TrackingConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = tiny_ingest(tiny_data.train_manifest, str(tmp_path / "store"), tracking=refusing)
    summary = run_ingest(config)
    store = Path(summary["store"])
    said = [message for message in caplog.messages if "PERMISSION_DENIED" in message]
    assert len(said) == 1
    assert f"the ingest continues and its results are kept in {store}" in said[0]
    assert digests(str(store)).keys() - digests(tiny_data.train_store).keys() == {
        "mlflow_pending.json"
    }
    again = run_ingest(replace(config, tracking=working))
    assert again["clips"] == summary["clips"]
    assert digests(str(store)) == digests(tiny_data.train_store)
    run_id = json.loads((store / "mlflow_run.json").read_text())["run_id"]
    client = MlflowClient(tracking_uri=working.uri)
    run = client.get_run(run_id)
    assert (run.info.status, run.data.metrics["clips"]) == ("FINISHED", summary["clips"])
    names = {artifact.path for artifact in client.list_artifacts(run_id)}
    assert names == {"config.json", "report.html", "report.json"}
    tags = run.data.tags
    assert tags["fingerprint.store"] == ClipStore(str(store)).catalogue["digest"]
    manifest = json.loads((store / "store.json").read_text())["manifest_sha256"]
    assert tags["fingerprint.manifest"] == manifest
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.digest, data.tags[0].value) == (manifest[:12], "ingest")
    assert tags["mlflow.note.content"].startswith("Decodes the clips of a manifest")
    # Nothing is left to send.
    run_ingest(replace(config, tracking=refusing))
    assert len([one for one in caplog.messages if "PERMISSION_DENIED" in one]) == 1


def test_an_ingest_that_fails_shows_its_report_and_the_reason(
    tiny_data: TinyData, working: TrackingConfig, tmp_path: Path
) -> None:
    config = tiny_ingest(
        tiny_data.train_manifest, str(tmp_path / "store"), tracking=working, max_bad_fraction=0.0
    )
    with pytest.raises(ClipStoreError, match="clips are bad") as caught:
        run_ingest(config)
    record = next((tmp_path / "store").rglob("mlflow_run.json"))
    run_id = json.loads(record.read_text())["run_id"]
    run = MlflowClient(tracking_uri=working.uri).get_run(run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["end_reason"] == " ".join(str(caught.value).split())[:500]
    assert run.data.metrics["quarantined"] == 1
