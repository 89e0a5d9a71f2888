"""Tars of a manifest's videos, written in the test's own process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.artifacts.manifest import SCHEMA, clip_hash
from pipelines.common import storage
from pipelines.common.ray_errors import raise_packed
from pipelines.export.plan import plan_tars
from pipelines.export.tar_form import record_uri
from pipelines.export.tar_writer import TarWriter
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.run import run_manifest

Row = dict[str, Any]


def clip(clip_id: str, video_uri: str, **values: Any) -> Row:
    """A row of a manifest."""
    return {
        "clip_hash": clip_hash(clip_id),
        "clip_id": clip_id,
        "video_id": Path(video_uri).stem,
        "video_uri": video_uri,
        "start_s": None,
        "end_s": None,
        "captions": [f"caption of {clip_id}"],
        "split": "train",
        "source": "test",
        "extras": "{}",
        **values,
    }


def write_manifest(path: Path, rows: list[Row]) -> str:
    """Write a manifest, and return its path."""
    ordered = sorted(rows, key=lambda row: row["clip_hash"])
    storage.write_table(str(path), pa.Table.from_pylist(ordered, schema=SCHEMA))
    return str(path)


def write_tars(
    manifest: str,
    output: Path | str,
    videos_per_tar: int = 1000,
    bytes_per_tar: int = 1024**3,
) -> list[Row]:
    """Write all tars in this process, and return the records of the parts."""
    plan = plan_tars(manifest, videos_per_tar)
    writer = TarWriter(plan, str(output), bytes_per_tar)
    for part in range(plan.num_parts):
        answer = writer({"part": np.array([part])})
        for error in answer.get("error", ()):
            raise_packed(error)
    return [storage.read_json(record_uri(str(output), part)) for part in range(plan.num_parts)]


def come_back(output: Path | str) -> list[Row]:
    """Rows of the manifest that the tars in a folder give."""
    back = storage.join(str(output), "back.parquet")
    made = run_manifest(
        ManifestConfig(annotations=(str(output),), output=back, format="webdataset")
    )
    assert made["rejected"] == 0
    return storage.read_table(made["manifest"]).to_pylist()
