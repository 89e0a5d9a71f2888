"""Exports to and from S3 whose requests fail now and then."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.common import storage
from tests.helpers.exports import clip, come_back, write_manifest, write_tars
from tests.helpers.faulty_s3 import FaultyS3

pytestmark = pytest.mark.slow


def test_videos_on_s3_and_members_of_tars_there_are_written_to_tars_on_s3(
    tmp_path: Path, s3: FaultyS3
) -> None:
    s3.fail(0.2)
    try:
        place = "s3://bucket/exports/videos"
        names = ("a::b.mp4", "A::B.mp4", "e*f [1].webm")
        for name in names:
            storage.write_bytes(storage.join(place, name), b"\0\0\0\x18ftypisom" + name.encode())
        rows = [clip(name, storage.join(place, name)) for name in names]
        rows.append(clip("none", storage.join(place, "none.mp4")))
        manifest = write_manifest(tmp_path / "m.parquet", rows)
        output = "s3://bucket/exports/tars"
        (record,) = write_tars(manifest, output)
        assert [(file["videos"], file["clips"]) for file in record["files"]] == [(3, 3)]
        assert [one["reason"] for one in record["rejected"]] == ["missing"]
        back = come_back(output)
        assert {row["clip_id"] for row in back} == set(names)
        # Tars of tars: the videos are read by their position, and have the same bytes.
        again = write_manifest(tmp_path / "again.parquet", back)
        (second,) = write_tars(again, str(tmp_path / "second"))
        local = write_manifest(
            tmp_path / "local.parquet", [row for row in rows if row["clip_id"] != "none"]
        )
        (third,) = write_tars(local, str(tmp_path / "third"))
        assert second["files"] == third["files"]
    finally:
        s3.fail(0)
