"""Small data sets, and the settings that tests ingest them with."""

from __future__ import annotations

import atexit
import functools
import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.common.config import TrackingConfig
from pipelines.ingest.config import IngestConfig
from pipelines.quickstart import store

PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class TinyData:
    """Generated videos with their manifests, stores and vocabulary."""

    videos: str
    vocab: str
    train_manifest: str
    train_store: str
    val_store: str


@functools.cache
def _tracking_folder() -> str:
    """One MLflow database for all ingests: making one takes seconds."""
    folder = tempfile.mkdtemp(prefix="stgt-mlflow-")
    atexit.register(shutil.rmtree, folder)
    return folder


def tiny_ingest(manifest: str, output: str, **changes: Any) -> IngestConfig:
    """The ingest of the tests: three shards of the training clips."""
    values = {
        "manifest": manifest,
        "output": output,
        "sampling": store.tiny_sampling(),
        "clips_per_shard": 14,
        "num_workers": 2,
        "tracking": TrackingConfig(uri=f"sqlite:///{_tracking_folder()}/mlflow.db"),
    }
    return IngestConfig(**{**values, **changes})


def digests(store: str) -> dict[str, str]:
    """Checksums of a store's files, without what tells of the run that made them."""
    of_the_run = {"report.html", "report.json", "mlflow_run.json", "config.json", ".lock"}
    files = [
        path for path in Path(store).rglob("*") if path.is_file() and path.name not in of_the_run
    ]
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
