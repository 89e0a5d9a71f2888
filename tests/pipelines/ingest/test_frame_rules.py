"""Stores that began under earlier rules for the frames of a clip continue under them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.artifacts.clip_store import CATALOGUE, STORE, ClipStore
from pipelines.common import storage
from pipelines.ingest.run import run_ingest
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.run import run_manifest
from pipelines.video.config import SamplingConfig
from tests.helpers.data import digests, tiny_ingest

SPANS = [
    ("16_video_starts_late/late.mp4", 3, 5),
    ("16_video_starts_late/late.mp4", 5, 7),
    ("15_vfr_span_empty/slides.mp4", 12, 18),
    ("18_sar_crop/sar2.mp4", 0, 1),
]
SAMPLING = SamplingConfig(num_frames=4, size=32, resize="crop")


@pytest.fixture
def manifest(cases_dir: Path, tmp_path: Path) -> str:
    rows = [
        {"video": str(cases_dir / name), "caption": "x", "start_s": start_s, "end_s": end_s}
        for name, start_s, end_s in SPANS
    ]
    annotations = tmp_path / "spans.jsonl"
    annotations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = str(tmp_path / "spans.parquet")
    run_manifest(
        ManifestConfig(
            annotations=(str(annotations),),
            videos=(str(cases_dir),),
            output=manifest,
            format="generic",
        )
    )
    return manifest


def frames_of(store: str) -> dict[tuple[str, float], tuple[list[int], int]]:
    """Indices and width of the frames of each clip, by the video's name and the start."""
    reader = ClipStore(store)
    rows = [
        row
        for shard in range(len(reader.shard_sizes))
        for row in reader.read_shard(shard).to_pylist()
    ]
    return {
        (Path(row["video_uri"]).name, row["start_s"]): (row["frame_indices"], row["width"])
        for row in rows
    }


@pytest.mark.ray
def test_an_unfinished_store_continues_under_the_rules_it_began_with(
    manifest: str, ray_cluster: None, tmp_path: Path
) -> None:
    config = tiny_ingest(
        manifest,
        str(tmp_path / "clips"),
        sampling=replace(SAMPLING, frame_rules=1),
        clips_per_shard=2,
        max_bad_fraction=1.0,
    )
    store = run_ingest(config)["store"]
    assert frames_of(store) == {
        ("late.mp4", 3.0): ([75, 81, 87, 93], 320),
        ("sar2.mp4", 0.0): ([0, 2, 5, 7], 320),
    }
    record = storage.read_json(storage.join(store, STORE))
    assert "frame_rules" not in record["sampling"], "earlier versions wrote no such field"
    whole = digests(store)
    storage.remove(storage.join(store, CATALOGUE))
    storage.remove(storage.join(store, "shards", "00001.json"))
    now = replace(config, sampling=SAMPLING)
    assert now.sampling.frame_rules == 2
    assert run_ingest(now)["store"] == store
    assert digests(store) == whole
    assert ClipStore(store).sampling.frame_rules == 1

    other = run_ingest(replace(now, output=str(tmp_path / "others")))["store"]
    assert storage.name_of(other) != storage.name_of(store)
    assert frames_of(other) == {
        ("late.mp4", 3.0): ([0, 12, 25, 37], 320),
        ("late.mp4", 5.0): ([50, 62, 75, 87], 320),
        ("slides.mp4", 12.0): ([1, 1, 1, 1], 160),
        ("sar2.mp4", 0.0): ([0, 2, 5, 7], 640),
    }
    assert ClipStore(other).sampling.frame_rules == 2
