"""Annotations and videos on S3: one listing per prefix, and names that are taken as they are."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.common import storage
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.formats import files
from pipelines.manifest.run import run_manifest
from tests.helpers.faulty_s3 import FaultyS3

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prefix(s3: FaultyS3) -> str:
    s3.fail(0)
    prefix = "s3://bucket/found"
    for name in ("one/a.mp4", "two/deep/b.WEBM", "one/colon:c::d.mp4", "one/e*f[1].mp4"):
        storage.write_bytes(storage.join(prefix, name), b"video")
    return prefix


def uris(tmp_path: Path, prefix: str, *names: str, annotations: str = "") -> dict[str, str]:
    if not annotations:
        annotations = str(tmp_path / "t.jsonl")
        rows = [json.dumps({"video": name, "caption": "x"}) for name in names]
        (tmp_path / "t.jsonl").write_text("\n".join(rows))
    run_manifest(
        ManifestConfig(
            annotations=(annotations,),
            videos=(f"{prefix}/one", f"{prefix}/two"),
            output=str(tmp_path / "m.parquet"),
            format="generic",
        )
    )
    rows = pq.read_table(tmp_path / "m.parquet").to_pylist()
    return {row["clip_id"]: row["video_uri"].removeprefix(f"{prefix}/") for row in rows}


def test_videos_are_found_by_stem_below_several_prefixes(tmp_path: Path, prefix: str) -> None:
    found = uris(tmp_path, prefix, "a", "b", "colon:c::d.mp4", "e*f[1].mp4", "none.mp4")
    assert found == {
        "a": "one/a.mp4",
        "b": "two/deep/b.WEBM",
        "colon:c::d.mp4": "one/colon:c::d.mp4",
        "e*f[1].mp4": "one/e*f[1].mp4",
        "none.mp4": "one/none.mp4",
    }


def test_a_prefix_that_is_too_large_or_forbidden_is_not_listed(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "MOST_LISTED", 2)
    assert uris(tmp_path, prefix, "a.mp4", "b") == {"a.mp4": "one/a.mp4", "b": "two/deep/b.WEBM"}
    assert "found/one contains more than 2 objects and is not listed" in caplog.text

    def forbidden(uri: str, most: int) -> list[str]:
        raise PermissionError(13, "Access Denied", uri)

    monkeypatch.setattr(storage, "list_below", forbidden)
    assert uris(tmp_path, prefix, "a.mp4", "b") == {"a.mp4": "one/a.mp4", "b": "one/b"}
    assert "must not be listed" in caplog.text


def test_annotations_and_videos_of_a_table_on_s3(tmp_path: Path, prefix: str) -> None:
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("a.csv", "video,caption\na.mp4,one\n")
        archive.writestr("b.tsv", "video\tcaption\nb.mp4\ttwo\n")
    storage.put_file(tmp_path / "t.zip", f"{prefix}/t.zip")
    found = uris(tmp_path, prefix, annotations=f"{prefix}/t.zip")
    assert found == {"a.mp4": "one/a.mp4", "b.mp4": "two/deep/b.WEBM"}
