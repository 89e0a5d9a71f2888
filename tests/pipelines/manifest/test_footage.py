"""Videos that are found rather than named: in folders, and in tar archives."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.manifest.config import ManifestConfig, ManifestFormat
from pipelines.manifest.formats import footage
from pipelines.manifest.run import run_manifest
from stgt.errors import ManifestError
from tests.helpers.archives import link, write_tar

MKV = b"\x1aE\xdf\xa3" + bytes(60)


def manifest(
    tmp_path: Path, name: ManifestFormat, *videos: Path | str, annotations: Sequence[Path] = ()
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The clips by id, with places relative to `tmp_path`, and why the others are rejected."""
    output = tmp_path / "out" / "m.parquet"
    summary = run_manifest(
        ManifestConfig(
            annotations=tuple(map(str, annotations)),
            videos=tuple(map(str, videos)),
            output=str(output),
            format=name,
        )
    )
    clips = {row["clip_id"]: row for row in pq.read_table(output).to_pylist()}
    for clip in clips.values():
        clip["video_uri"] = os.path.relpath(clip["video_uri"], tmp_path)
        clip["extras"] = json.loads(clip["extras"])
        assert clip["source"] == name
        assert clip["video_id"] == clip["clip_id"]
    assert summary["clips"] == len(clips)
    bad = pq.read_table(summary["rejected_rows"]).to_pylist() if summary["rejected_rows"] else []
    assert summary["rejected"] == len(bad)
    reasons = dict(row["reason"].split(": ", 1) for row in bad if ": " in row["reason"])
    assert len(reasons) == len(bad)
    return clips, reasons


def write(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def test_every_container_in_a_folder_is_a_clip_under_its_path(tmp_path: Path) -> None:
    odd = [
        "sp ace",
        "new\nline",
        "h#ash",
        "p%20",
        "a::b",
        "x.tar#y",
        "*?[1]",
        "\u00fcber",
        "dots.in.it",
    ]
    write(tmp_path / "v", {f"deep/er/{name}.mp4": b"x" for name in odd})
    write(tmp_path / "v", {"A.MP4": b"x", "a.mp4": b"x", "DIR/b.webm": b"x", "dir/b.webm": b"x"})
    clips, reasons = manifest(tmp_path, "folder", tmp_path / "v")
    expected = {f"deep/er/{name}": f"v/deep/er/{name}.mp4" for name in odd}
    expected |= {"A": "v/A.MP4", "a": "v/a.mp4", "DIR/b": "v/DIR/b.webm", "dir/b": "v/dir/b.webm"}
    assert {name: clip["video_uri"] for name, clip in clips.items()} == expected
    assert {tuple(clip["captions"]) for clip in clips.values()} == {()}
    assert reasons == {}


def test_videos_that_share_a_stem_keep_their_extension(tmp_path: Path) -> None:
    names = ("b.mp4", "b.mkv", "b.mp4.mov", "d/b.mp4", "c.mp4", "B.mp4")
    write(tmp_path / "v", dict.fromkeys(names, b"x"))
    clips, _ = manifest(tmp_path, "folder", tmp_path / "v")
    assert set(clips) == {"b.mp4", "b.mkv", "b.mp4.mov", "d/b", "c", "B"}
    assert clips["b.mp4"]["video_uri"] == "v/b.mp4"
    assert clips["b.mp4.mov"]["video_uri"] == "v/b.mp4.mov"


def test_files_that_are_no_videos_are_rejected_or_passed_over(tmp_path: Path) -> None:
    files = {
        "good.mp4": b"x",
        "good.jpg": b"thumbnail",
        "alone.png": b"picture",
        "half.mp4.part": b"x",
        "half2.mp4": b"x",
        "half2.mp4.aria2": b"x",
        "half3.f137.mp4.part-Frag12": b"x",
        "GL01.LRV": b"x",
        "notes.md": b"x",
        ".hidden.mp4": b"x",
        ".folder/x.mp4": b"x",
        "named.camera1": MKV,
        "unnamed": b"\x47" + bytes(187) + (b"\x47" + bytes(187)) * 3,
        "other.xyz": b"text",
        "more.tar": b"x",
        "none": b"",
    }
    write(tmp_path / "v", files)
    (tmp_path / "v" / "dead.mp4").symlink_to("gone.mp4")
    os.mkfifo(tmp_path / "v" / "pipe.mp4")
    (tmp_path / "v" / os.fsdecode(b"latin\xfc.mp4")).write_bytes(b"x")
    clips, reasons = manifest(tmp_path, "folder", tmp_path / "v")
    assert set(clips) == {"good", "named", "unnamed"}
    unknown = "its extension is unknown, and its first bytes are not those of a video"
    incomplete = "it is a download that is not complete; finish it or remove the file"
    assert reasons == {
        "alone.png": "it is a picture; name it in a table (--format generic) to use it",
        "half.mp4.part": incomplete,
        "half3.f137.mp4.part-Frag12": incomplete,
        "'half2.mp4'": "its download is not complete, since there is a file half2.mp4.aria2",
        "more.tar": "it is an archive; read .tar files with --format webdataset, and extract "
        "others",
        "GL01.LRV": "it is a small copy that a camera writes beside its video",
        "other.xyz": unknown,
        "none": unknown,
        "'dead.mp4'": "it is a link to a file that does not exist",
        "'pipe.mp4'": "it is a device or a pipe, not a file",
        r"'latin\udcfc.mp4'": "its name is not UTF-8 text; rename it",
    }


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    write(tmp_path, {"v/a.mp4": b"x", "elsewhere/b.mp4": b"x", "c.mp4": b"x"})
    (tmp_path / "v" / "loop").symlink_to(tmp_path / "v")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "v")
    (tmp_path / "v" / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "v" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "v" / "file.mp4").symlink_to(tmp_path / "c.mp4")
    clips, _ = manifest(tmp_path, "folder", tmp_path / "v")
    assert set(clips) == {"a", "again/b", "file"}


def test_descriptions_beside_a_video_are_used(tmp_path: Path) -> None:
    files = {
        "both.mp4": b"x",
        "both.json": json.dumps(
            {"key": "both", "status": "success", "caption": "Tom &amp; I", "n": 1}
        ),
        "both.txt": "other",
        "text.mp4": b"x",
        "text.TXT": "\ufeff a dog \n",
        "blank.mp4": b"x",
        "blank.txt": " \n",
        "several.mp4": b"x",
        "several.json": '{"caption": ["one", "two"]}',
        "failed.mp4": b"",
        "failed.json": '{"status": "failed_to_download", "error_message": "403"}',
        "latin.mp4": b"x",
        "latin.txt": b"caf\xe9",
        "list.mp4": b"x",
        "list.json": "[1]",
        "broken.mp4": b"x",
        "broken.json": '{"caption": ',
        "huge.mp4": b"x",
        "huge.txt": "w" * (footage.MOST_SIDECAR_BYTES + 1),
        "deep.mp4": b"x",
        "deep.json": "[" * 100_000,
    }
    write(tmp_path / "v", files)
    clips, reasons = manifest(tmp_path, "folder", tmp_path / "v")
    assert {name: clip["captions"] for name, clip in clips.items()} == {
        "both": ["Tom & I"],
        "text": ["a dog"],
        "blank": [],
        "several": ["one", "two"],
    }
    assert clips["both"]["extras"] == {"n": 1}
    assert reasons.pop("deep.mp4").startswith("deep.json is not valid: ")
    assert reasons.pop("broken.mp4").startswith("broken.json is not valid: ")
    assert reasons == {
        "failed.mp4": "failed_to_download: 403",
        "latin.mp4": "latin.txt is not UTF-8 text; convert it",
        "list.mp4": "list.json does not contain an object; rename or remove it",
        "huge.mp4": f"huge.txt has more than {footage.MOST_SIDECAR_BYTES:,} bytes",
    }


def test_a_description_that_cannot_be_read_costs_one_row(tmp_path: Path) -> None:
    """A description that is no file has a row of its own; otherwise its video is rejected."""
    names = ("dead", "loop", "pipe", "half", "good", "broken", "table")
    write(tmp_path / "v", {f"{name}.mp4": b"x" for name in names})
    write(tmp_path / "v", {"good.txt": "a dog", "half.txt": "a d", "half.txt.part": "a d"})
    (tmp_path / "v" / "dead.txt").symlink_to("gone.txt")
    (tmp_path / "v" / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(tmp_path / "v" / "pipe.json")
    for name in ("broken.txt", "table.json", "unknown.xyz"):
        # A regular file, of which even root cannot read the first bytes.
        (tmp_path / "v" / name).symlink_to("/proc/self/mem")
    clips, reasons = manifest(tmp_path, "folder", tmp_path / "v")
    assert {name: clip["captions"] for name, clip in clips.items()} == {
        "dead": [],
        "loop": [],
        "pipe": [],
        "half": [],
        "good": ["a dog"],
    }
    assert reasons == {
        "'dead.txt'": "it is a link to a file that does not exist",
        "'loop.txt'": "it cannot be read (Too many levels of symbolic links)",
        "'pipe.json'": "it is a device or a pipe, not a file",
        "'half.txt'": "its download is not complete, since there is a file half.txt.part",
        "half.txt.part": "it is a download that is not complete; finish it or remove the file",
        "broken.mp4": "broken.txt cannot be read (Input/output error)",
        "table.mp4": "table.json cannot be read (Input/output error)",
        "unknown.xyz": "it cannot be read (Input/output error)",
    }


def test_ids_of_several_folders_begin_with_their_names(tmp_path: Path) -> None:
    for name in ("one", "two", "x/one"):
        write(tmp_path / name, {"d/a.mp4": b"x"})
    clips, _ = manifest(tmp_path, "folder", tmp_path / "one", tmp_path / "two")
    assert {name: clip["video_uri"] for name, clip in clips.items()} == {
        "one/d/a": "one/d/a.mp4",
        "two/d/a": "two/d/a.mp4",
    }
    with pytest.raises(ManifestError, match="do not all have different names"):
        manifest(tmp_path, "folder", tmp_path / "one", tmp_path / "x" / "one")


@pytest.mark.parametrize("name", ["folder", "webdataset"])
def test_folders_without_videos_are_named_in_one_sentence(
    tmp_path: Path, name: ManifestFormat
) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "texts", {"a.txt": "x", "b.mp4.txt": "x"})
    for place in ("empty", "texts", "gone", "texts/a.txt"):
        with pytest.raises(ManifestError) as told:
            manifest(tmp_path, name, tmp_path / place)
        assert str(tmp_path / place) in str(told.value)
        assert not (tmp_path / "out").exists()


def test_settings_that_do_not_fit_a_format_are_refused() -> None:
    for name, settings, said in (
        ("folder", {"annotations": ("a.csv",), "videos": ("v",)}, "not used by the format folder"),
        ("folder", {}, "give the folders that contain the videos"),
        ("webdataset", {}, "give tar files or the folders that contain them"),
        ("webvid", {"videos": ("v",)}, "give a file"),
    ):
        with pytest.raises(ValueError, match=said):
            ManifestConfig(output="m.parquet", format=name, **settings)  # type: ignore[arg-type]


def sample(key: str, **row: Any) -> dict[str, bytes | str | tarfile.TarInfo]:
    told = {"key": key, "status": "success", "error_message": None, **row}
    return {f"{key}.json": json.dumps(told), f"{key}.mp4": b"video of " + key.encode()}


def rejected_in_archives(tmp_path: Path, *ids: str) -> dict[str, str]:
    """Why archives in the folder `t` are rejected, by name; the others have clips with `ids`."""
    output = str(tmp_path / "m.parquet")
    config = ManifestConfig(videos=(str(tmp_path / "t"),), output=output, format="webdataset")
    summary = run_manifest(config)
    assert pq.read_table(output)["clip_id"].to_pylist() == list(ids)
    rows = pq.read_table(summary["rejected_rows"] or "").to_pylist()
    reasons = {Path(row["file"]).name: row["reason"] for row in rows}
    assert len(reasons) == len(rows)
    return reasons


def test_archives_of_video2dataset_become_clips(tmp_path: Path) -> None:
    failed = json.dumps({"key": "000001", "status": "failed_to_download", "error_message": "404"})
    write_tar(
        tmp_path / "00000.tar",
        {
            **sample("000000", url="https://e.org/0", caption=""),
            "000000.txt": "a man",
            "000001.json": failed,
            "000001.txt": "a failed one",
            **sample("000002", caption="two"),
            "000003.json": json.dumps({"key": "000003", "status": "success"}),
            "000004.mp4": b"x",
            "readme.md": "x",
            "000005.mp4": b"x",
            "000005.jpg": b"x",
            "alone.jpg": b"x",
            "none.cls": "3",
            "typeless": MKV,
            "._000000.mp4": b"of macOS",
            ".thumbnails/000000.mp4": b"x",
        },
        tarfile.PAX_FORMAT,
    )
    clips, reasons = manifest(tmp_path, "webdataset", annotations=[tmp_path / "00000.tar"])
    assert {name: clip["captions"] for name, clip in clips.items()} == {
        "000000": ["a man"],
        "000002": ["two"],
        "000004": [],
        "000005": [],
        "typeless": [],
    }
    assert clips["000000"]["video_uri"] == "00000.tar#000000.mp4"
    assert clips["000000"]["extras"] == {"url": "https://e.org/0"}
    assert reasons == {
        "000001": "failed_to_download: 404",
        "000003": "the archive has its description, but no video",
        "alone.jpg": "it is a picture; name it in a table (--format generic) to use it",
    }


def test_archives_are_given_by_name_folder_or_pattern(tmp_path: Path) -> None:
    for place in ("d/1.tar", "d/e/2.tar", "f/[3].tar", "f/3.tar"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        write_tar(tmp_path / place, {f"{place.replace('/', '-')}.mp4": place})
    write(tmp_path / "d", {"1.parquet": b"x", "1_stats.json": b"{}"})

    def names(*videos: str, annotations: Sequence[str] = ()) -> set[str]:
        given = [tmp_path / name for name in annotations]
        clips, _ = manifest(
            tmp_path, "webdataset", *(tmp_path / name for name in videos), annotations=given
        )
        return {clip["video_uri"].partition("#")[0] for clip in clips.values()}

    assert names("d") == {"d/1.tar", "d/e/2.tar"}
    assert names("d/*.tar") == {"d/1.tar"}
    assert names("d/*/*.tar", annotations=["d/1.tar"]) == {"d/1.tar", "d/e/2.tar"}
    assert names("d", "d/1.tar") == {"d/1.tar", "d/e/2.tar"}
    assert names("f/[3].tar") == {"f/[3].tar"}
    with pytest.raises(ManifestError, match=r"contains no files that match none\*"):
        names("d/none*.tar")
    with pytest.raises(ManifestError, match=r"1\.parquet is not a \.tar file"):
        names("d/1.parquet")


def test_an_id_that_two_archives_use_is_rejected_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", {"0.mp4": name, f"{name}.mp4": name})
    clips, reasons = manifest(tmp_path, "webdataset", tmp_path / "a.tar", tmp_path / "b.tar")
    assert set(clips) == {"0", "a", "b"}
    assert clips["0"]["video_uri"] == "a.tar#0.mp4"
    assert reasons == {"another clip has the id 0 as well": str(tmp_path / "a.tar#0.mp4")}


def test_bad_archives_cost_one_row_each(tmp_path: Path) -> None:
    place = tmp_path / "t"
    place.mkdir()
    write_tar(place / "cut.tar", {"c0.mp4": b"x" * 2000, "c1.mp4": b"x" * 2000})
    with (place / "cut.tar").open("r+b") as file:
        file.truncate(512 + 2048 + 512 + 100)
    entries = {"../up.mp4": b"x", "soft.mp4": link("soft.mp4", "/etc/passwd"), "g.mp4": b"x"}
    write_tar(place / "strange.tar", entries)
    write(place, {"page.tar": "<html>", "zero.tar": b"", "z.tar.gz": b"\x1f\x8b\x08\0"})
    write_tar(place / "texts.tar", {"a.md": b"x"})
    (place / os.fsdecode(b"latin\xfc.tar")).write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    output = tmp_path / "m.parquet"
    summary = run_manifest(
        ManifestConfig(videos=(str(place),), output=str(output), format="webdataset")
    )
    rows = pq.read_table(summary["rejected_rows"] or "").to_pylist()
    found = {(Path(row["file"]).name, row["row"]): row["reason"] for row in rows}
    said = {
        ("cut.tar", 2): "the archive ends at byte 3,172, in the middle of 'c1.mp4'",
        ("strange.tar", 1): "'../up.mp4': its name points outside of the archive",
        ("strange.tar", 2): "'soft.mp4': it is a link to '/etc/passwd'",
        ("page.tar", 1): "the file is not a tar archive",
        ("zero.tar", 1): "the file is empty",
        ("z.tar.gz", 1): "the archive is compressed (gzip)",
        ("texts.tar", 1): "the archive contains no videos",
        (r"latin\udcfc.tar", 1): "the file is empty",
    }
    assert found.keys() == said.keys()
    assert all(found[key].startswith(text) for key, text in said.items()), found
    assert pq.read_table(output)["clip_id"].to_pylist() == ["g", "c0"]
    written = {tmp_path / name for name in ("m.parquet", "m.rejected.parquet", "m.config.json")}
    assert set(tmp_path.rglob("*")) - set(before) <= written


def test_archives_that_are_no_files_cost_one_row_each(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    write_tar(tmp_path / "t" / "good.tar", {"a.mp4": b"x"})
    (tmp_path / "t" / "dead.tar").symlink_to("gone.tar")
    (tmp_path / "t" / "loop.tar").symlink_to("loop.tar")
    os.mkfifo(tmp_path / "t" / "pipe.tar")
    assert rejected_in_archives(tmp_path, "a") == {
        "dead.tar": "it is a link to a file that does not exist",
        "loop.tar": "it cannot be read (Too many levels of symbolic links)",
        "pipe.tar": "it is a device or a pipe, not a file",
    }
    with pytest.raises(ManifestError, match=r"gone\.tar does not exist; check its name"):
        manifest(tmp_path, "webdataset", tmp_path / "t" / "gone.tar")


def test_archives_that_are_named_as_compressed_ones_are_refused(tmp_path: Path) -> None:
    """Since `x.tgz#a.mp4` is not the URI of a member, the ingest would miss their videos."""
    (tmp_path / "t").mkdir()
    write_tar(tmp_path / "t" / "good.tar", {"a.mp4": b"x"})
    for name in ("plain.tgz", "PLAIN.TAR.GZ", "plain.tar.zst"):
        write_tar(tmp_path / "t" / name, {f"{name}.mp4": b"x"})
    write(tmp_path / "t", {"real.tgz": b"\x1f\x8b\x08\0"})
    reasons = rejected_in_archives(tmp_path, "a")
    assert reasons.pop("real.tgz").startswith("the archive is compressed (gzip)")
    named = (
        "its name is that of a compressed archive, but its contents are not compressed; if it is "
        "a tar archive, rename it to end in .tar"
    )
    assert reasons == dict.fromkeys(("plain.tgz", "PLAIN.TAR.GZ", "plain.tar.zst"), named)


def test_an_impossible_clip_in_the_list_of_an_archive_costs_its_video(tmp_path: Path) -> None:
    usual = {
        "clip_id": "c",
        "video_id": "v",
        "start_s": 1,
        "end_s": None,
        "captions": ["a dog"],
        "split": "train",
        "source": "x",
        "extras": {},
    }
    changes: dict[str, dict[str, Any]] = {
        "good": {},
        "long": {"start_s": 10**400},
        "negative": {"start_s": -1},
        "swapped": {"start_s": 2.5, "end_s": 2},
        "none": {"start_s": 2, "end_s": 2.0},
        "blank": {"captions": ["a dog", " \n"]},
        "split": {"split": "\ud800"},
        "owner": {"video_id": "\ud800"},
        "origin": {"source": "\ud800"},
    }
    entries: dict[str, bytes | str | tarfile.TarInfo] = {}
    for name, change in changes.items():
        entries[f"{name}.mp4"] = b"x"
        entries[f"{name}.json"] = json.dumps({"manifest_clips": [{**usual, **change}]})
    write_tar(tmp_path / "x.tar", entries)
    output = str(tmp_path / "m.parquet")
    summary = run_manifest(
        ManifestConfig(videos=(str(tmp_path / "x.tar"),), output=output, format="webdataset")
    )
    (clip,) = pq.read_table(output).to_pylist()
    assert clip["video_uri"].endswith("x.tar#good.mp4")
    assert (clip["start_s"], clip["end_s"], clip["captions"]) == (1.0, None, ["a dog"])
    reasons = [row["reason"] for row in pq.read_table(summary["rejected_rows"] or "").to_pylist()]
    assert sum("cannot be encoded as UTF-8" in reason for reason in reasons) == 3
    said = {
        "long.mp4": "is not a valid time",
        "negative.mp4": "start_s = -1 is not a valid time",
        "swapped.mp4": "the end (2.0 s) is not after the start (2.5 s)",
        "none.mp4": "the end (2.0 s) is not after the start (2.0 s)",
        "blank.mp4": "a caption is blank",
    }
    for name, text in said.items():
        (reason,) = (one for one in reasons if one.startswith(name))
        assert reason.startswith(f"{name}: entry 0 of manifest_clips: ")
        assert text in reason
    assert len(reasons) == len(changes) - 1


def test_a_folder_and_its_archive_give_the_same_clips(tmp_path: Path) -> None:
    files = {
        "a.mp4": b"x",
        "a.txt": "one",
        "d/b.dots.mkv": b"x",
        "d/b.dots.json": '{"caption": "two", "license": "CC"}',
        "same.avi": b"x",
        "same.mp4": b"x",
    }
    write(tmp_path / "v", files)
    write_tar(tmp_path / "v.tar", {f"./{name}": data for name, data in files.items()})
    (one, _), (other, _) = (
        manifest(tmp_path, "folder", tmp_path / "v"),
        manifest(tmp_path, "webdataset", tmp_path / "v.tar"),
    )
    assert set(one) == {"a", "d/b.dots", "same.avi", "same.mp4"}
    for clips, place in ((one, "v/"), (other, "v.tar#")):
        for clip in clips.values():
            assert clip["video_uri"].startswith(place)
            clip["video_uri"] = clip["video_uri"].removeprefix(place)
            clip["source"] = ""
    assert one == other


def test_tables_may_name_members_of_archives(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    write_tar(tmp_path / "v" / "x.tar", {"a.mp4": b"x"})
    write(tmp_path / "other", {"unrelated.mp4": b"x"})
    write(tmp_path, {"t.csv": f"video,caption\nx.tar#a.mp4,one\n{tmp_path}/v/x.tar#b.mp4,two\n"})
    folders = (tmp_path / "other", tmp_path / "v")
    clips, _ = manifest(tmp_path, "generic", *folders, annotations=[tmp_path / "t.csv"])
    found = {clip["captions"][0]: clip["video_uri"] for clip in clips.values()}
    assert found == {"one": "v/x.tar#a.mp4", "two": "v/x.tar#b.mp4"}
