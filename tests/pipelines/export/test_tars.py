"""Tars of a manifest's videos, without Ray: what they contain, and that they come back."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts import tar_samples
from pipelines.common import storage
from pipelines.export.config import ExportConfig
from pipelines.export.plan import plan_tars
from pipelines.export.run import run_export
from pipelines.export.tar_form import (
    SampleWriter,
    UnreadableVideoError,
    member_extension,
    tar_name,
)
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.run import run_manifest
from stgt.errors import ManifestError, STGTError
from tests.helpers.exports import clip, come_back, write_manifest, write_tars


@pytest.fixture
def video(tmp_path: Path) -> Callable[..., str]:
    """Writes a file with the beginning of a video, and contents that its name determines."""

    def write(name: str) -> str:
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0\0\0\x18ftypisom" + name.encode() * 300)
        return str(path)

    return write


def test_clips_come_back_with_ids_spans_captions_and_the_bytes_of_their_videos(
    tmp_path: Path, video: Callable[..., str]
) -> None:
    film, plain = video("Film #1 (100%).MKV"), video("a.b.c.mp4")
    rows = [
        clip("film/1", film, start_s=0.0, end_s=2.5, extras='{"a": [1, 2.5], "b": null}'),
        clip("film/2", film, start_s=2.5, end_s=7.123456789, captions=["x", "y"], split="val"),
        clip("film/3", film, captions=[], source="urls"),
        clip("Plain", plain, captions=["the \u00e9t\u00e9\nof two lines"]),
        # Names that differ only in case, in different folders, and hostile ones.
        clip("PLAIN", video("A.B.C.mp4")),
        clip("../../evil", video("..evil.mp4"), video_id="../../evil"),
    ]
    manifest = write_manifest(tmp_path / "manifest.parquet", rows)
    output = tmp_path / "tars"
    records = write_tars(manifest, output, videos_per_tar=2)
    files = [record["files"] for record in records]
    assert [[file["videos"] for file in one] for one in files] == [[2], [2]]
    assert sum(file["clips"] for one in files for file in one) == len(rows)
    back = come_back(output)
    videos = {}
    for row in back:
        archive, _, member = row.pop("video_uri").partition("#")
        with tarfile.open(archive) as opened:
            file = opened.extractfile(member)
            assert file is not None
            videos[row["clip_id"]] = file.read()
    expected = storage.read_table(manifest).to_pylist()
    assert {row["clip_id"]: Path(row.pop("video_uri")).read_bytes() for row in expected} == videos
    assert back == expected


def test_each_sample_has_a_video_a_json_and_the_first_caption(
    tmp_path: Path, video: Callable[..., str]
) -> None:
    place = video("v.webm")
    rows = [clip("one", place, captions=["first", "second"]), clip("two", place, captions=[])]
    write_tars(write_manifest(tmp_path / "m.parquet", rows), tmp_path / "tars")
    with tarfile.open(tmp_path / "tars" / tar_name(0)) as opened:
        names = opened.getnames()
        file = opened.extractfile("00000-000000.json")
        assert file is not None
        sample = json.loads(file.read())
    first = min(rows, key=lambda row: row["clip_hash"])
    assert names[:2] == ["00000-000000.webm", "00000-000000.json"]
    assert ("00000-000000.txt" in names) == bool(first["captions"])
    assert sample["sha256"] == hashlib.sha256(Path(place).read_bytes()).hexdigest()
    assert sample.get("caption") == next(iter(first["captions"]), None)
    assert {one["clip_id"] for one in sample["manifest_clips"]} == {"one", "two"}


def test_the_bytes_depend_on_the_manifest_alone(tmp_path: Path, video: Callable[..., str]) -> None:
    rows = [clip(f"clip{number}", video(f"{number % 5}.mp4")) for number in range(12)]
    manifest = write_manifest(tmp_path / "m.parquet", rows)
    first = write_tars(manifest, tmp_path / "first", 2)
    for path in (tmp_path / "videos").iterdir():
        path.touch()
    assert write_tars(manifest, tmp_path / "second", 2) == first
    assert len({file["sha256"] for record in first for file in record["files"]}) == 3


def test_an_unreadable_video_is_one_row_and_leaves_no_trace_in_the_tar(
    tmp_path: Path, video: Callable[..., str]
) -> None:
    empty = Path(video("empty.mp4"))
    empty.write_bytes(b"")
    folder = tmp_path / "videos" / "folder.mp4"
    folder.mkdir()
    bad = {
        str(empty): "empty",
        str(tmp_path / "none.mp4"): "missing",
        str(folder): "not_a_video",
        f"{tmp_path}/none.tar#member.mp4": "missing",
        "ftp://127.0.0.1:9/a.mp4": "unreachable",
    }
    rows = [clip(f"good{number}", video(f"{number}.mp4")) for number in range(3)]
    rows += [clip(f"bad{place}-{n}", uri) for place, uri in enumerate(bad) for n in range(2)]
    manifest = write_manifest(tmp_path / "m.parquet", rows)
    (record,) = write_tars(manifest, tmp_path / "tars")
    assert {one["video_uri"]: one["reason"] for one in record["rejected"]} == bad
    assert all(len(one["clip_ids"]) == 2 for one in record["rejected"])
    assert {row["clip_id"] for row in come_back(tmp_path / "tars")} == {"good0", "good1", "good2"}


@pytest.mark.slow
def test_a_video_with_megabytes_of_text_comes_back(
    tmp_path: Path, video: Callable[..., str]
) -> None:
    film = video("film.mp4")
    extras = json.dumps({"text": "t" * 90_000})
    rows = [clip(f"film/{number}", film, extras=extras) for number in range(100)]
    rows.append(clip("plain", video("plain.mp4")))
    write_tars(write_manifest(tmp_path / "m.parquet", rows), tmp_path / "tars")
    back = {row["clip_id"]: row["extras"] for row in come_back(tmp_path / "tars")}
    assert back == {row["clip_id"]: row["extras"] for row in rows}


def test_extras_with_half_a_character_come_back(tmp_path: Path, video: Callable[..., str]) -> None:
    extras = json.dumps({"note": "\ud800", "title": "caf\u00e9"}, sort_keys=True)
    rows = [clip("odd", video("odd.mp4"), extras=extras)]
    write_tars(write_manifest(tmp_path / "m.parquet", rows), tmp_path / "tars")
    (back,) = come_back(tmp_path / "tars")
    assert json.loads(back["extras"]) == json.loads(extras)


def test_more_text_than_is_read_back_costs_its_video(
    tmp_path: Path, video: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_samples, "MOST_BYTES", 20_000)
    film = video("film.mp4")
    rows = [clip(f"film/{number}", film) for number in range(200)]
    rows.append(clip("plain", video("plain.mp4")))
    manifest = write_manifest(tmp_path / "m.parquet", rows)
    (record,) = write_tars(manifest, tmp_path / "tars")
    (rejected,) = record["rejected"]
    assert (rejected["reason"], len(rejected["clip_ids"])) == ("too_large", 200)
    assert "its 200 clips have" in rejected["message"]
    assert "more than the 20,000 bytes that are read back" in rejected["message"]
    assert [row["clip_id"] for row in come_back(tmp_path / "tars")] == ["plain"]


def test_only_lists_of_clips_may_be_large(tmp_path: Path, video: Callable[..., str]) -> None:
    write_tars(write_manifest(tmp_path / "m.parquet", [clip("a", video("a.mp4"))]), tmp_path / "t")
    with tarfile.open(tmp_path / "t" / "00001.tar", "w") as archive:
        for name, data in (
            ("b.mp4", b"\0\0\0\x18ftypisom"),
            ("b.json", json.dumps({"text": "t" * 9_000_000}).encode()),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    back = tmp_path / "back.parquet"
    made = run_manifest(
        ManifestConfig(annotations=(str(tmp_path / "t"),), output=str(back), format="webdataset")
    )
    (row,) = storage.read_table(str(made["rejected_rows"])).to_pylist()
    assert row["reason"] == "b.mp4: b.json has more than 8,388,608 bytes"


def test_tars_are_limited_in_bytes(tmp_path: Path) -> None:
    sizes = [3_000, 30_000, 3_000, 3_000, 3_000, 50_000, 3_000]
    rows = []
    for number, size in enumerate(sizes):
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(bytes([number]) * size)
        rows.append(clip(f"clip{number}", str(path)))
    manifest = write_manifest(tmp_path / "m.parquet", rows)
    output = tmp_path / "tars"
    (record,) = write_tars(manifest, output, bytes_per_tar=25_000)
    names = [file["name"] for file in record["files"]]
    assert names == [tar_name(0, number) for number in range(len(names))]
    assert {path.name for path in output.glob("*.tar")} == set(names)
    for file in record["files"]:
        content = (output / file["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (
            file["bytes"],
            file["sha256"],
        )
        # A tar ends with zeros up to a multiple of 10,240 bytes.
        assert file["videos"] == 1 or file["bytes"] <= 25_000 + 2 * 10_240
    assert 3 <= len(names) < len(sizes)
    assert {row["clip_id"] for row in come_back(output)} == {row["clip_id"] for row in rows}
    assert write_tars(manifest, tmp_path / "again", bytes_per_tar=25_000) == [record]


def test_a_tar_that_was_begun_for_an_unreadable_video_does_not_stay(
    tmp_path: Path, video: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_samples, "MOST_BYTES", 2_000)
    rows = [clip(name, video(f"{name}.mp4")) for name in "abc"]
    last = max(rows, key=lambda row: row["clip_hash"])
    last["extras"] = json.dumps({"text": "y" * 3_000})
    manifest = write_manifest(tmp_path / "m.parquet", rows)
    (record,) = write_tars(manifest, tmp_path / "tars", bytes_per_tar=1)
    assert [one["clip_ids"] for one in record["rejected"]] == [[last["clip_id"]]]
    assert {path.name for path in (tmp_path / "tars").glob("*.tar")} == {
        file["name"] for file in record["files"]
    }
    assert all(file["videos"] for file in record["files"])


class Ending(io.BytesIO):
    """A file whose reading fails after some bytes."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > 20_000:
            raise OSError("the disk is broken")
        return super().read(min(size or 0, 16_384))


@pytest.mark.parametrize("broken", [io.BytesIO(bytes(40_000)), Ending(bytes(99_000))])
def test_a_video_that_breaks_off_is_taken_out_again(tmp_path: Path, broken: io.BytesIO) -> None:
    rows = [clip("a", "/a.mp4")]
    for name in ("with", "without"):
        with SampleWriter(tmp_path / name) as writer:
            writer.add("1", "mp4", io.BytesIO(bytes(50_000)), 50_000, rows)
            if name == "with":
                with pytest.raises(UnreadableVideoError):
                    writer.add("2", "mp4", broken, 99_000, rows)
            writer.add("3", "mp4", io.BytesIO(bytes(700)), 700, rows)
    assert (tmp_path / "with").read_bytes() == (tmp_path / "without").read_bytes()


def test_many_videos_in_a_row_that_cannot_be_fetched_end_the_run(tmp_path: Path) -> None:
    # The operating system refuses names of this length, which is neither missing nor forbidden.
    rows = [clip(f"clip{number}", f"/{number:0300d}.mp4") for number in range(12)]
    with pytest.raises(STGTError, match="10 videos in a row could not be fetched"):
        write_tars(write_manifest(tmp_path / "m.parquet", rows), tmp_path / "tars")
    assert not (tmp_path / "tars" / tar_name(0)).exists()


def test_clips_of_a_video_are_in_one_part_and_the_manifest_is_read_in_order(
    tmp_path: Path,
) -> None:
    rows = [clip(f"clip{number}", f"/videos/{number % 70}.mp4") for number in range(700)]
    plan = plan_tars(write_manifest(tmp_path / "m.parquet", rows), 16)
    ordered = sorted(rows, key=lambda row: row["clip_hash"])
    assert (plan.num_parts, plan.num_videos) == (5, 70)
    assert sorted(plan.rows.tolist()) == list(range(700))
    seen: list[str] = []
    for part in range(plan.num_parts):
        numbers = plan.rows_of(part).tolist()
        assert numbers == sorted(numbers)
        videos = list(dict.fromkeys(ordered[number]["video_uri"] for number in numbers))
        assert len(videos) == (16 if part < 4 else 6)
        seen += videos
    assert seen == list(dict.fromkeys(row["video_uri"] for row in ordered))


def test_videos_that_are_not_fetched_yet_are_refused(tmp_path: Path) -> None:
    rows = [clip("a", "https://example.org/a.mp4")]
    manifest = write_manifest(tmp_path / "m.parquet", rows)
    with pytest.raises(ManifestError, match=r"fetch the videos with python -m jobs\.fetch"):
        run_export(ExportConfig(manifest=manifest, output=str(tmp_path / "tars")))
    assert not (tmp_path / "tars").exists()


@pytest.mark.parametrize(
    ("uri", "extension"),
    [
        ("/a/b.MP4", "mp4"),
        ("s3://bucket/x.y.avi", "avi"),
        ("/a/tar.tar#dir/x.webm", "webm"),
        ("/a/no_extension", "mp4"),
        ("/a.b/no_extension", "mp4"),
        ("/a/evil.json", "mp4"),
        ("/a/evil.mp4.txt", "mp4"),
    ],
)
def test_members_keep_the_extension_of_a_video_only(uri: str, extension: str) -> None:
    assert member_extension(uri) == extension


@pytest.mark.parametrize(
    "listed",
    [
        {},
        [],
        ["clip"],
        [{"clip_id": 3}],
        [{**json.loads(json.dumps(clip("a", "/a.mp4"))), "extras": "{}"}],
        [{**json.loads(json.dumps(clip("a", "/a.mp4"))), "extras": {}, "captions": [1]}],
        [{**json.loads(json.dumps(clip("", "/a.mp4"))), "extras": {}}],
        [{**json.loads(json.dumps(clip("a", "/a.mp4"))), "extras": {}, "start_s": True}],
    ],
)
def test_a_damaged_list_of_clips_costs_its_video(
    tmp_path: Path, video: Callable[..., str], listed: Any
) -> None:
    write_tars(write_manifest(tmp_path / "m.parquet", [clip("a", video("a.mp4"))]), tmp_path / "t")
    with tarfile.open(tmp_path / "t" / "00001.tar", "w") as archive:
        for name, data in (
            ("b.mp4", b"\0\0\0\x18ftypisom"),
            ("b.json", json.dumps({"manifest_clips": listed}).encode()),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    made = run_manifest(
        ManifestConfig(
            annotations=(str(tmp_path / "t"),),
            output=str(tmp_path / "back.parquet"),
            format="webdataset",
        )
    )
    assert (made["clips"], made["rejected"]) == (1, 1)
    (row,) = storage.read_table(str(made["rejected_rows"])).to_pylist()
    assert "manifest_clips" in row["reason"]
