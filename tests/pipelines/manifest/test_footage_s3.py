"""Prefixes and archives on S3 as sources of clips."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.common import storage
from pipelines.manifest.config import ManifestConfig, ManifestFormat
from pipelines.manifest.run import run_manifest
from stgt.errors import ManifestError
from tests.helpers.archives import write_tar
from tests.helpers.faulty_s3 import FaultyS3

pytestmark = pytest.mark.slow

PLACE = "s3://bucket/footage"
VIDEO = bytes(300_000)


def manifest(tmp_path: Path, name: ManifestFormat, *videos: str) -> tuple[list[dict], list[str]]:
    output = str(tmp_path / "m.parquet")
    summary = run_manifest(ManifestConfig(videos=videos, output=output, format=name))
    bad = pq.read_table(summary["rejected_rows"]).to_pylist() if summary["rejected_rows"] else []
    rows = sorted(pq.read_table(output).to_pylist(), key=lambda row: row["clip_id"])
    return rows, [row["reason"] for row in bad]


def test_a_prefix_and_an_archive_give_the_clips_of_a_folder(s3: FaultyS3, tmp_path: Path) -> None:
    """Of the videos, only the first bytes of the one without an extension are read."""
    s3.fail(0)
    files = {
        "a.mp4": VIDEO,
        "a.txt": b"one",
        "A.mp4": VIDEO,
        "sub/b c::#%d.mkv": VIDEO,
        "sub/b c::#%d.json": json.dumps({"caption": "two", "n": 1}).encode(),
        "typeless": b"\x1aE\xdf\xa3" + VIDEO,
        "empty.dat": b"",
    }
    for name, data in files.items():
        storage.write_bytes(f"{PLACE}/v/{name}", data)
        path = tmp_path / "v" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    parts = (("a.mp4", "a.txt", "A.mp4"), tuple(files)[3:])
    for number, names in enumerate(parts):
        path = write_tar(tmp_path / "x.tar", {name: files[name] for name in names})
        storage.put_file(path, f"{PLACE}/t/{number}.tar")
    local, reasons = manifest(tmp_path, "folder", str(tmp_path / "v"))
    before = s3.bytes_read("/footage/")
    remote, remote_reasons = manifest(tmp_path, "folder", f"{PLACE}/v")
    assert s3.bytes_read("/footage/") - before < 2000
    archived, _ = manifest(tmp_path, "webdataset", f"{PLACE}/t/*.tar")
    assert s3.bytes_read("/footage/") - before < 5 * 70_000
    assert reasons == remote_reasons
    for rows, place in ((local, f"{tmp_path}/v/"), (remote, f"{PLACE}/v/"), (archived, "")):
        for row in rows:
            row["video_uri"] = row["video_uri"].removeprefix(place).rpartition(".tar#")[2]
            row["source"] = ""
    assert [row["clip_id"] for row in local] == ["A", "a", "sub/b c::#%d", "typeless"]
    assert [row["captions"] for row in local] == [[], ["one"], ["two"], []]
    assert remote == local
    assert archived == local
    assert manifest(tmp_path, "webdataset", f"{PLACE}/t")[0] != []


def test_remote_sources_that_are_not_there_are_named(s3: FaultyS3, tmp_path: Path) -> None:
    s3.fail(0)
    sources: tuple[tuple[ManifestFormat, str], ...] = (
        ("folder", "s3://bucket/nothing"),
        ("folder", "s3://forbidden/x"),
        ("webdataset", "s3://bucket/nothing/x.tar"),
        ("webdataset", "s3://bucket/nothing"),
        ("webdataset", "s3://bucket/forbidden/x.tar"),
    )
    for name, uri in sources:
        with pytest.raises(ManifestError) as told:
            manifest(tmp_path, name, uri)
        assert uri in str(told.value)


def test_an_archive_is_read_whole_in_spite_of_faults(s3: FaultyS3, tmp_path: Path) -> None:
    files = {f"{number:03d}.mp4": bytes(70_000) for number in range(20)}
    storage.put_file(write_tar(tmp_path / "x.tar", files), f"{PLACE}/faults/x.tar")
    s3.fail(0.3)
    try:
        rows, reasons = manifest(tmp_path, "webdataset", f"{PLACE}/faults/x.tar")
    finally:
        s3.fail(0)
    assert len(rows) == 20
    assert reasons == []
