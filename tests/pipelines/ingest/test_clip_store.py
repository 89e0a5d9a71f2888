"""What a clip store tells of its clips without reading their frames."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileOpener

from pipelines.artifacts.clip_store import (
    CLIP_SCHEMA,
    ClipStore,
    read_sampling,
    recorded_sampling,
    shard_uri,
    shard_writer,
)
from pipelines.artifacts.manifest import whole_videos_table
from pipelines.common import storage
from pipelines.common.config import fingerprint, to_dict
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.plan import plan_ingest, store_uri
from pipelines.video.config import SamplingConfig

NUMBERS = [[2, 0, 1], [3, 1], []]
"""Numbers of captions of the clips of three shards."""
MORE_THAN = [[2, 1], [2, 1, 1], []]
FRAME_BYTES = 200_000


def _write(folder: Path, with_captions: bool) -> str:
    """Write a store; those of earlier versions do not record how many captions there are."""
    store = str(folder / "store")
    shards = []
    (folder / "store" / "shards").mkdir(parents=True)
    for shard, numbers in enumerate(NUMBERS):
        rows = [
            {"clip_id": f"{shard}-{n}", "captions": ["x"] * n, "frames": [bytes(FRAME_BYTES)]}
            for n in numbers
        ]
        with shard_writer(shard_uri(store, shard)) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=CLIP_SCHEMA))
        record: dict[str, Any] = {"shard": shard, "revision": 0, "clips": len(rows)}
        shards.append({**record, "captions": MORE_THAN[shard]} if with_captions else record)
    catalogue = {"sampling": asdict(SamplingConfig()), "clips": 5, "shards": shards}
    (folder / "store" / "catalogue.json").write_text(json.dumps(catalogue))
    return store


@pytest.mark.parametrize("with_captions", [True, False])
def test_the_captions_of_each_shard_are_counted(tmp_path: Path, with_captions: bool) -> None:
    store = ClipStore(_write(tmp_path, with_captions))
    assert store.captions_per_shard == MORE_THAN
    assert [store.caption_counts(shard).tolist() for shard in range(3)] == NUMBERS


def test_captions_that_the_catalogue_lacks_are_read_once_and_no_frames_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ClipStore(_write(tmp_path, with_captions=False))
    read: list[int] = []
    whole = LocalFileOpener.__getattr__

    class Counted(LocalFileOpener):
        def read(self, length: int = -1) -> bytes:
            data = whole(self, "read")(length)
            read.append(len(data))
            return data

    monkeypatch.setattr("fsspec.implementations.local.LocalFileOpener", Counted)
    assert store.captions_per_shard == MORE_THAN
    assert 0 < sum(read) < FRAME_BYTES + 3 * 70_000
    read.clear()
    assert store.captions_per_shard == MORE_THAN
    assert not read


def test_a_store_of_an_earlier_version_keeps_its_folder_and_its_rules(tmp_path: Path) -> None:
    """Its settings have no rules, so they would be those of another store today."""
    manifest = str(tmp_path / "manifest.parquet")
    storage.write_table(manifest, whole_videos_table({"a": "/a.mp4"}, {"a": "x"}, "test"))
    config = IngestConfig(manifest=manifest, output=str(tmp_path / "clips"))
    new = plan_ingest(config)
    assert (new.store, new.config.sampling.frame_rules) == (store_uri(config), 2)
    sampling = to_dict(SamplingConfig())
    del sampling["frame_rules"]
    earlier = tmp_path / "clips" / fingerprint(sampling)
    assert str(earlier) != new.store
    storage.write_json(str(earlier / "store.json"), {"sampling": sampling})
    plan = plan_ingest(config)
    assert (plan.store, plan.config.sampling.frame_rules) == (str(earlier), 1)
    assert recorded_sampling(plan.config.sampling) == sampling
    assert read_sampling(sampling) == plan.config.sampling
    # A store with today's rules goes first.
    storage.write_json(str(Path(new.store) / "store.json"), {})
    assert plan_ingest(config).store == new.store
