"""The same videos as files and in an archive give equal clips, frames and reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.clip_store import ClipStore
from pipelines.feed.sources import check_source
from pipelines.ingest.run import run_ingest
from pipelines.manifest.config import ManifestConfig, ManifestFormat
from pipelines.manifest.run import run_manifest
from stgt.errors import ClipStoreError
from tests.helpers.archives import write_tar
from tests.helpers.data import TinyData, tiny_ingest

SAME = ("clip_id", "video_id", "captions", "frames", "frame_indices", "extras", "split")
FACTS = ("width", "height", "fps", "duration_s", "num_source_frames", "source_bytes", "codec")


@pytest.mark.ray
def test_a_folder_and_its_archive_give_the_same_store(tiny_data: TinyData, tmp_path: Path) -> None:
    videos = sorted(Path(tiny_data.videos).rglob("*.mp4"))
    good = [path for path in videos if path.stat().st_size][:4]
    files: dict[str, bytes] = {
        f"d/{number}.mp4": path.read_bytes() for number, path in enumerate(good)
    }
    files |= {"d/0.txt": b"a circle", "d/1.json": b'{"caption": ["one", "two"], "n": 1}'}
    files["page.mp4"] = b"<html>403</html>"
    for name, data in files.items():
        path = tmp_path / "footage" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write_tar(tmp_path / "footage.tar", files)

    def ingested(name: ManifestFormat, source: str) -> tuple[str, list[dict[str, Any]], Any]:
        manifest = str(tmp_path / f"{name}.parquet")
        summary = run_manifest(
            ManifestConfig(videos=(str(tmp_path / source),), output=manifest, format=name)
        )
        assert (summary["clips"], summary["captions"], summary["rejected"]) == (5, 3, 0)
        config = tiny_ingest(manifest, str(tmp_path / name), max_bad_fraction=0.5)
        uri = run_ingest(config)["store"]
        store = ClipStore(uri)
        rows = [
            row
            for shard in range(len(store.shard_sizes))
            for row in store.read_shard(shard).to_pylist()
        ]
        bad = pq.read_table(f"{uri}/quarantine").to_pylist()
        kept = [{name: row[name] for name in (*SAME, *FACTS)} for row in rows]
        return uri, kept, [(row["clip_id"], row["reason"], row["message"]) for row in bad]

    store, rows, bad = ingested("folder", "footage")
    archived_store, archived, archived_bad = ingested("webdataset", "footage.tar")
    assert archived == rows
    assert archived_bad == bad
    assert [entry[:2] for entry in bad] == [("page", "not_a_video")]
    assert {row["clip_id"]: row["captions"] for row in rows} == {
        "d/0": ["a circle"],
        "d/1": ["one", "two"],
        "d/2": [],
        "d/3": [],
    }
    for uri in (store, archived_store):
        with pytest.raises(ClipStoreError, match="contains 2 clips without a caption"):
            check_source(uri, 64, 12, "squash")
    config = tiny_ingest(
        str(tmp_path / "webdataset.parquet"), str(tmp_path / "webdataset"), verify=True
    )
    assert run_ingest(config)["store"] == archived_store
