"""The same videos from a folder, an archive and URLs give equal clips, frames and reasons."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.clip_store import ClipStore
from pipelines.feed.dataset_checks import check_source
from pipelines.fetch.config import FetchConfig
from pipelines.fetch.run import run_fetch
from pipelines.ingest.run import run_ingest
from pipelines.manifest.config import ManifestConfig, ManifestFormat
from pipelines.manifest.run import run_manifest
from stgt.errors import ClipStoreError
from tests.helpers import http_server as behave
from tests.helpers.archives import write_tar
from tests.helpers.data import TinyData, tiny_ingest
from tests.helpers.http_server import http_server

CAPTIONS = {"d/0": ["a circle"], "d/1": ["one", "two"], "d/2": [], "d/3": []}
WITHOUT = "without"
"""In tables, a caption that is empty is an error of its row."""
SAME = ("clip_id", "captions", "frames", "frame_indices", "split")
FACTS = ("width", "height", "fps", "duration_s", "num_source_frames", "source_bytes", "codec")

pytestmark = pytest.mark.ray


@pytest.fixture
def files(tiny_data: TinyData) -> dict[str, bytes]:
    """Four videos, what is written beside two of them, and a page that is named as a video."""
    videos = sorted(Path(tiny_data.videos).rglob("*.mp4"))
    good = [path for path in videos if path.stat().st_size][: len(CAPTIONS)]
    found = {f"{name}.mp4": path.read_bytes() for name, path in zip(CAPTIONS, good, strict=True)}
    found |= {"d/0.txt": b"a circle", "d/1.json": b'{"caption": ["one", "two"], "n": 1}'}
    return {**found, "page.mp4": b"<html>403</html>"}


def stored(manifest: str, output: Path) -> tuple[str, list[dict[str, Any]], list[tuple[str, str]]]:
    """The store of a manifest, what all sources have in common, and the quarantine."""
    uri = run_ingest(tiny_ingest(manifest, str(output), max_bad_fraction=0.5))["store"]
    store = ClipStore(uri)
    rows = [
        {name: row[name] for name in (*SAME, *FACTS)}
        for shard in range(len(store.shard_sizes))
        for row in store.read_shard(shard).to_pylist()
    ]
    bad = pq.read_table(f"{uri}/quarantine").to_pylist()
    return uri, rows, [(row["clip_id"], row["reason"]) for row in bad]


def fetched(files: dict[str, bytes], folder: Path) -> str:
    """The manifest of the same videos by their URLs."""
    with http_server() as server:
        rows = [["clip_id", "url", "caption"]]
        for name, captions in CAPTIONS.items():
            url = server.add(f"/{name}.mp4", behave.file(files[f"{name}.mp4"]))
            rows += [[name, url, caption] for caption in captions or [WITHOUT]]
        rows.append(["page", server.add("/page.mp4", behave.file(files["page.mp4"])), WITHOUT])
        with (folder / "urls.csv").open("w", newline="") as table:
            csv.writer(table).writerows(rows)
        summary = run_fetch(
            FetchConfig(
                annotations=(str(folder / "urls.csv"),),
                output=str(folder / "fetched"),
                allow_http=True,
                allow_private=True,
                num_workers=1,
            )
        )
    assert summary["reasons"] == {"not_a_video": 1}
    return str(summary["manifest"])


def test_a_folder_an_archive_and_urls_give_the_same_clips(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    for name, data in files.items():
        path = tmp_path / "footage" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write_tar(tmp_path / "footage.tar", files)
    found = {}
    sources: dict[ManifestFormat, str] = {"folder": "footage", "webdataset": "footage.tar"}
    for name, source in sources.items():
        manifest = str(tmp_path / f"{name}.parquet")
        summary = run_manifest(
            ManifestConfig(videos=(str(tmp_path / source),), output=manifest, format=name)
        )
        assert (summary["clips"], summary["captions"], summary["rejected"]) == (5, 3, 0)
        store, rows, bad = stored(manifest, tmp_path / name)
        assert {row["clip_id"]: row["captions"] for row in rows} == CAPTIONS
        assert bad == [("page", "not_a_video")]
        with pytest.raises(ClipStoreError, match="contains 2 clips without a caption"):
            check_source(store, 64, 12, "squash")
        found[name] = rows
    verify = tiny_ingest(manifest, str(tmp_path / "webdataset"), verify=True)
    assert run_ingest(verify)["store"] == store
    _, by_url, bad = stored(fetched(files, tmp_path), tmp_path / "urls")
    assert bad == []
    for row in by_url:
        row["captions"] = [caption for caption in row["captions"] if caption != WITHOUT]
    assert found["folder"] == found["webdataset"] == by_url
