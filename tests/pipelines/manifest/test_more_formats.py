"""Formats of other data sets, on small files of the same form as the published ones."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.manifest.config import ManifestConfig, ManifestFormat
from pipelines.manifest.run import run_manifest
from stgt.errors import ManifestError

Make = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A manifest as rows by clip id, of files in `tmp_path` and videos that are touched."""

    def made(
        name: ManifestFormat, *files: str, videos: tuple[str, ...] = (), **settings: Any
    ) -> dict[str, dict[str, Any]]:
        for video in videos:
            (tmp_path / "v" / video).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "v" / video).touch()
        output = tmp_path / "m.parquet"
        (tmp_path / "m.rejected.parquet").unlink(missing_ok=True)
        run_manifest(
            ManifestConfig(
                annotations=tuple(str(tmp_path / file) for file in files),
                videos=(str(tmp_path / "v"),),
                output=str(output),
                format=name,
                **settings,
            )
        )
        rows = pq.read_table(output).to_pylist()
        for row in rows:
            row["video"] = os.path.relpath(row["video_uri"], tmp_path / "v")
            row["extras"] = json.loads(row["extras"])
            assert row["source"] == name
        return {row["clip_id"]: row for row in rows}

    return made


def reasons(tmp_path: Path) -> list[str]:
    return [row["reason"] for row in pq.read_table(tmp_path / "m.rejected.parquet").to_pylist()]


def spans(clips: dict[str, dict[str, Any]]) -> dict[str, tuple[Any, Any]]:
    return {name: (clip["start_s"], clip["end_s"]) for name, clip in clips.items()}


def test_panda70m_rows_hold_the_clips_of_a_video(make: Make, tmp_path: Path) -> None:
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["videoID", "url", "timestamp", "caption", "matching_score"])
    url = "https://www.youtube.com/watch?v="
    times = "[['0:00:07.007', '0:00:11.011'], ['0:01:00.5', '1:00:00.000']]"
    table.writerow(["-aB_1", url, times, '["It\'s a man, \\"smiling\\".", \'two\']', "[0.43, 0.5]"])
    table.writerow(["short", url, times, "['one']", "[0.4]"])
    table.writerow(["odd", url, "[['0:00:07', 'soon'], ['0:00:01', '0:00:02']]", "['a', 'b']", ""])
    table.writerow(["code", url, "__import__('os')", "['a']", "[1]"])
    table.writerow(["long", url, "[['0:00:00', '0:00:01']]", repr(["w " * 70_000]), "[1.0]"])
    with zipfile.ZipFile(tmp_path / "panda70m_training_2m.zip", "w") as archive:
        archive.writestr("panda70m_training_2m.csv", text.getvalue())
    clips = make("panda70m", "panda70m_training_2m.zip", videos=("-aB_1.mkv", "odd.mp4"))
    assert spans(clips) == {
        "-aB_1_00000": (7.007, 11.011),
        "-aB_1_00001": (60.5, 3600.0),
        "odd_00001": (1.0, 2.0),
        "long_00000": (0.0, 1.0),
    }
    clip = clips["-aB_1_00000"]
    assert (clip["video_id"], clip["video"]) == ("-aB_1", "-aB_1.mkv")
    assert clip["captions"] == ['It\'s a man, "smiling".']
    assert clip["extras"] == {"matching_score": 0.43}
    short, odd, code = reasons(tmp_path)
    assert short == "short: the lists differ in length: timestamp has 2, caption has 1, " + (
        "matching_score has 1"
    )
    assert odd.startswith("odd: entry 1: timestamp = 'soon' is not a valid time")
    assert code.startswith("code: timestamp is not a list: ValueError")


INTERNVID = [
    {
        "YoutubeID": "x1",
        "Start_timestamp": "00:00:01.000",
        "End_timestamp": "00:00:02.500",
        "Caption": "one",
        "Aesthetic_Score": 4.3,
        "UMT_Score": 0.4,
    },
    {
        "YoutubeID": "x2",
        "Start_timestamp": "00:01:00.000",
        "End_timestamp": "00:01:05.000",
        "Caption": "two",
        "Aesthetic_Score": 4.0,
        "UMT_Score": 0.3,
    },
]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_internvid_clips_are_files_of_their_own_or_spans_of_whole_videos(
    make: Make, tmp_path: Path, kind: str
) -> None:
    rows = [*INTERNVID, INTERNVID[0], {**INTERNVID[0], "End_timestamp": "00:00:01.000"}]
    path = tmp_path / f"i.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        lines = [",".join(str(value) for value in row.values()) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    cut = "x2_00:01:00.000_00:01:05.000"
    clips = make("internvid", path.name, videos=("x1.webm", "x2.webm", f"cut/{cut}.mp4"))
    assert spans(clips) == {"x1_00:00:01.000_00:00:02.500": (1.0, 2.5), cut: (None, None)}
    assert [clip["video"] for clip in sorted(clips.values(), key=lambda clip: clip["clip_id"])] == [
        "x1.webm",
        f"cut/{cut}.mp4",
    ]
    assert float(clips[cut]["extras"]["UMT_Score"]) == 0.3
    assert reasons(tmp_path) == ["x1: the end (1.0 s) is not after the start (1.0 s)"]


def test_vatex_clips_are_cut_already_or_spans_of_whole_videos(make: Make, tmp_path: Path) -> None:
    entries = [
        {"videoID": "Ptf_2VRj-V0_000122_000132", "enCap": ["one", "two"], "chCap": ["\u4e00"]},
        {"videoID": "whole_000003_000013", "enCap": ["three"]},
        {"videoID": "private_000000_000010"},
    ]
    (tmp_path / "vatex.json").write_text(json.dumps(entries))
    videos = ("Ptf_2VRj-V0_000122_000132.mp4", "whole.mkv")
    clips = make("vatex", "vatex.json", videos=videos)
    assert spans(clips) == {
        "Ptf_2VRj-V0_000122_000132": (None, None),
        "whole_000003_000013": (3.0, 13.0),
    }
    clip = clips["Ptf_2VRj-V0_000122_000132"]
    assert (clip["captions"], clip["video"]) == (["one", "two"], videos[0])
    assert clip["extras"] == {"chCap": ["\u4e00"]}
    assert clips["whole_000003_000013"]["video"] == "whole.mkv"
    assert reasons(tmp_path) == ["private_000000_000010: caption is empty after cleaning"]


def activitynet(tmp_path: Path) -> tuple[str, str]:
    one = {
        "v_a": {
            "duration": 10.0,
            "timestamps": [[0, 4.5], [4.5, 10.03], [3, 3]],
            "sentences": ["One  thing. ", " Another thing.", "nothing"],
        },
        "v_b": {"duration": 5.0, "timestamps": [[0, 1]], "sentences": []},
        "v_c": {"duration": 5.0},
    }
    two = {"v_a": {"duration": 10.0, "timestamps": [[0, 4.5]], "sentences": ["The same span."]}}
    (tmp_path / "val_1.json").write_text(json.dumps(one))
    (tmp_path / "val_2.json").write_text(json.dumps(two))
    return "val_1.json", "val_2.json"


def test_activitynet_sentences_are_clips(make: Make, tmp_path: Path) -> None:
    clips = make("activitynet", *activitynet(tmp_path), videos=("v_a.mkv",), split="val")
    assert {name: clip["captions"] for name, clip in clips.items()} == {
        "v_a#0.0-4.5": ["One  thing.", "The same span."],
        "v_a#4.5-10.03": ["Another thing."],
    }
    assert {clip["video"] for clip in clips.values()} == {"v_a.mkv"}
    assert reasons(tmp_path) == [
        "v_a: sentence 3: the end (3.0 s) is not after the start (3.0 s)",
        "v_b: it has 1 time spans, but 0 sentences",
        "v_c: timestamps, sentences is missing or empty",
    ]


def test_activitynet_paragraphs_are_captions_of_whole_videos(make: Make, tmp_path: Path) -> None:
    files = activitynet(tmp_path)
    (clip,) = make("activitynet", *files, videos=("a.mp4",), caption="paragraph").values()
    assert (clip["clip_id"], clip["start_s"], clip["end_s"]) == ("v_a", None, None)
    assert clip["captions"] == ["One thing. Another thing. nothing", "The same span."]
    assert clip["video"] == "a.mp4"  # without v_
    with pytest.raises(ManifestError, match="caption = 'words': must be sentence or paragraph"):
        make("activitynet", *files, caption="words")


def test_youcook2_segments_are_clips_of_their_split(make: Make, tmp_path: Path) -> None:
    def entry(subset: str, *sentences: str) -> dict[str, Any]:
        annotations = [
            {"id": place, "segment": [10 * place, 10 * place + 5], "sentence": sentence}
            for place, sentence in enumerate(sentences)
        ]
        return {"subset": subset, "recipe_type": "113", "annotations": annotations}

    database = {
        "a": entry("training", "cut the onion", "fry it"),
        "b": entry("validation", "boil water"),
        "c": entry("testing"),
    }
    (tmp_path / "y.json").write_text(json.dumps({"version": 1, "database": database}))
    videos = ("raw/training/113/a.mkv", "raw/validation/113/b.mp4")
    clips = make("youcook2", "y.json", videos=videos)
    assert spans(clips) == {"a#0.0-5.0": (0, 5), "a#10.0-15.0": (10, 15), "b#0.0-5.0": (0, 5)}
    assert clips["a#10.0-15.0"]["captions"] == ["fry it"]
    assert {clip["split"] for clip in clips.values()} == {"train", "val"}
    assert {clip["video"] for clip in clips.values()} == set(videos)
    assert reasons(tmp_path) == ["c: it has no annotations"]
    assert list(make("youcook2", "y.json", split="val")) == ["b#0.0-5.0"]
    (clip,) = make("youcook2", "y.json", split="train", caption="paragraph").values()
    assert clip["captions"] == ["cut the onion fry it"]
    (tmp_path / "n.json").write_text('{"a": {"timestamps": [], "sentences": []}}')
    with pytest.raises(ManifestError, match="use --format activitynet"):
        make("youcook2", "n.json")


def vript_scene(clip_id: str, content: Any) -> dict[str, Any]:
    caption = {"shot_type": "Close-up", "camera_movement": "Static", "content": content}
    return {"video_id": "-v1", "clip_id": clip_id, "caption": caption, "voiceover": ["hi"]}


@pytest.mark.parametrize("form", ["json", "zip", "jsonl of videos", "jsonl of scenes", "list"])
def test_vript_scenes_are_clips(make: Make, tmp_path: Path, form: str) -> None:
    scenes = [vript_scene("-v1-Scene-001", "A cat."), vript_scene("-v1-Scene-002", "")]
    value = {
        "meta": {"video_id": "-v1", "video_title": "t", "num_clips": 2},
        "data": {scene["clip_id"]: scene for scene in scenes},
    }
    file = "captions.jsonl" if form.startswith("jsonl") else "captions.json"
    if form == "jsonl of scenes":
        parts = [{"meta": value["meta"], "data": scenes[0]}, scenes[1]]
        (tmp_path / file).write_text("".join(json.dumps(part) + "\n" for part in parts))
    elif form == "list":
        (tmp_path / file).write_text(json.dumps([value]))
    elif form == "zip":
        file = "captions.zip"
        with zipfile.ZipFile(tmp_path / file, "w") as archive:
            archive.writestr("captions/-v1_caption.json", json.dumps(value))
    else:
        (tmp_path / file).write_text(json.dumps(value))
    video = "clips_1_of_9/-v1/-v1-Scene-001.mp4"
    (clip,) = make("vript", file, videos=(video,)).values()
    assert (clip["clip_id"], clip["video_id"], clip["video"]) == ("-v1-Scene-001", "-v1", video)
    assert clip["captions"] == ["A cat."]
    assert clip["extras"]["shot_type"] == "Close-up"
    assert reasons(tmp_path) == ["-v1-Scene-002: caption is empty after cleaning"]


def video2dataset_output(folder: Path) -> None:
    """Two shards: one clip with its caption in the table, one in a text file, and two failures."""
    rows = [
        {"key": "000000000", "status": "success", "caption": "one", "url": "u0"},
        {"key": "000000001", "status": "failed_to_download", "caption": "two", "url": "u1"},
        {"key": "000000002", "status": "success", "caption": "", "url": "u2"},
    ]
    for row in rows:
        row["error_message"] = "HTTP Error 404" if row["status"] != "success" else None
    (folder / "00000").mkdir(parents=True)
    (folder / "00001").mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:2]), folder / "00000.parquet")
    pq.write_table(pa.Table.from_pylist(rows[2:]), folder / "00001.parquet")
    (folder / "00000_stats.json").write_text('{"count": 2}')
    for row, shard in zip(rows, ("00000", "00000", "00001"), strict=True):
        (folder / shard / f"{row['key']}.json").write_text(json.dumps(row))
        if row["status"] == "success":
            (folder / shard / f"{row['key']}.mp4").touch()
            (folder / shard / f"{row['key']}.txt").write_text(row["caption"] or "three &amp; four")


@pytest.mark.parametrize("given", ["folder", "tables", "json"])
def test_video2dataset_output_is_read_with_its_failures(
    make: Make, tmp_path: Path, given: str
) -> None:
    video2dataset_output(tmp_path / "v")
    files = {
        "folder": ["v"],
        "tables": ["v/00000.parquet", "v/00001.parquet"],
        "json": [f"v/{shard}.json" for shard in ("00000/000000000", "00000/000000001")],
    }[given]
    if given == "json":
        files.append("v/00001/000000002.json")
    clips = make("video2dataset", *files)
    assert {name: (clip["video"], clip["captions"]) for name, clip in clips.items()} == {
        "000000000": ("00000/000000000.mp4", ["one"]),
        "000000002": ("00001/000000002.mp4", ["three & four"]),
    }
    assert clips["000000000"]["extras"] == {"url": "u0"}
    assert reasons(tmp_path) == ["000000001: failed_to_download: HTTP Error 404"]


def test_a_text_beside_a_video_that_is_no_file_costs_its_row(make: Make, tmp_path: Path) -> None:
    video2dataset_output(tmp_path / "v")
    text = tmp_path / "v" / "00001" / "000000002.txt"
    text.unlink()
    os.mkfifo(text)
    assert list(make("video2dataset", "v")) == ["000000000"]
    assert any("it is a device or a pipe, not a file" in one for one in reasons(tmp_path))


def test_video2dataset_tars_are_left_to_their_own_format(make: Make, tmp_path: Path) -> None:
    (tmp_path / "00000.tar").touch()
    with pytest.raises(ManifestError, match="read it with --format webdataset"):
        make("video2dataset", "00000.tar", videos=("a.mp4",))


MP4, WEBM = b"\0\0\0\x20ftypisom" + bytes(40), b"\x1aE\xdf\xa3" + bytes(40)


@pytest.mark.parametrize("kind", ["parquet", "arrow file", "arrow stream"])
@pytest.mark.parametrize("form", ["struct", "plain"])
def test_videos_in_a_table_are_written_beside_the_manifest(
    make: Make, tmp_path: Path, kind: str, form: str
) -> None:
    data = [MP4, WEBM, MP4, b"", b"nothing said"]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = (
        pa.array(
            [{"bytes": one, "path": "b.WebM" if one == WEBM else None} for one in data], struct
        )
        if form == "struct"
        else pa.array(data, pa.binary())
    )
    table = pa.table({"clip": column, "text": ["one", "two", "again", "none", ""], "fps": [1] * 5})
    file = "t.parquet" if kind == "parquet" else "t.arrow"
    if kind == "parquet":
        pq.write_table(table, tmp_path / file)
    else:
        new = pa.ipc.new_file if kind == "arrow file" else pa.ipc.new_stream
        with new(str(tmp_path / file), table.schema) as writer:
            writer.write_table(table)
    columns = ("video=clip", "caption=text")
    clips = make("generic", file, columns=columns, videos=("any.mp4",))
    mp4, webm = (hashlib.sha256(one).hexdigest() for one in (MP4, WEBM))
    names = {f"{mp4}.mp4": MP4, f"{webm}.{'webm' if form == 'struct' else 'mkv'}": WEBM}
    assert set(clips) == set(names)
    assert clips[f"{mp4}.mp4"]["captions"] == ["one", "again"]
    for name, clip in clips.items():
        path = Path(clip["video_uri"])
        assert path == tmp_path / "m.videos" / name[:2] / name
        assert path.read_bytes() == names[name]
    # The rows without a video or a caption are rejected, and leave no file.
    assert len(reasons(tmp_path)) == 2
    written = sorted(path for path in (tmp_path / "m.videos").rglob("*") if path.is_file())
    assert [path.name for path in written] == sorted(names)
    times = [path.stat().st_mtime_ns for path in written]
    before = (tmp_path / "m.parquet").read_bytes()
    make("generic", file, columns=columns)
    assert (tmp_path / "m.parquet").read_bytes() == before
    assert [path.stat().st_mtime_ns for path in written] == times


def test_a_table_may_hold_paths_instead_of_bytes(make: Make, tmp_path: Path) -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [{"bytes": None, "path": "s/a.mp4"}, {"bytes": None, "path": None}, None]
    table = pa.table({"video": pa.array(values, struct), "caption": ["x", "y", "z"]})
    pq.write_table(table, tmp_path / "t.parquet")
    clips = make("generic", "t.parquet", videos=("s/a.mkv",))
    assert {name: clip["video"] for name, clip in clips.items()} == {"s/a.mp4": "s/a.mkv"}
    assert reasons(tmp_path) == ["video is missing or empty"] * 2
    assert not (tmp_path / "m.videos").exists()
