"""Cutting the videos of a manifest on Ray, and clips of subtitles without it."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.artifacts.manifest import clip_hash
from pipelines.common import storage
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.cutting import facts, spans
from pipelines.manifest.cutting.config import CuttingConfig
from pipelines.manifest.cutting.facts import VideoFacts
from pipelines.manifest.cutting.spans import Span
from pipelines.manifest.cutting.worker import VideoExaminer
from pipelines.manifest.run import ManifestSummary, run_manifest
from pipelines.video.exact_frames import read_index
from stgt.errors import ManifestError, SettingError
from tests.helpers.archives import write_tar
from tests.helpers.data import PROJECT
from tests.helpers.faulty_s3 import FaultyS3
from tests.helpers.shots import variable_times, write_shots
from tests.helpers.waiting import wait_until

HOURS_S = 3 * 3600
FILM_STEP_S = 8
"""Time between two frames of the film, in seconds."""
GOOD = ("shots.mp4", "variable.mkv", "short.mp4", "film.mp4")
SUBTITLES = """1
00:00:00,500 --> 00:00:02,000
first

2
00:00:02,800 --> 00:00:04,000
second

3
00:00:05,000 --> 00:00:06,000
third
"""


def _table(path: Path, rows: Sequence[Sequence[str]]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("clip_id", "video", "start_s", "end_s", "caption"), *rows])
    return str(path)


def _config(folder: Path, output: str, **changes: Any) -> ManifestConfig:
    return ManifestConfig(
        annotations=(str(folder / "clips.csv"),),
        videos=(str(folder / "videos"),),
        output=str(folder / output),
        format="generic",
        cutting=CuttingConfig(**{"num_workers": 2, **changes}),
    )


def _clips(uri: str) -> dict[str, dict[str, Any]]:
    rows = storage.read_table(uri).to_pylist()
    assert [row["clip_hash"] for row in rows] == sorted(row["clip_hash"] for row in rows)
    return {row["clip_id"]: row for row in rows}


def _spans_of(clips: dict[str, dict[str, Any]], original: str) -> list[tuple[float, float]]:
    """The spans of the parts of a clip, in the order of their numbers."""
    parts = {
        how["number"]: (row["start_s"], row["end_s"])
        for row in clips.values()
        if (how := json.loads(row["extras"])["cut"])["clip_id"] == original
    }
    return [parts[number] for number in range(len(parts))]


def _rejected(uri: str | None) -> dict[str, str]:
    assert uri is not None
    return {Path(row["file"]).name: row["reason"] for row in storage.read_table(uri).to_pylist()}


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of clips, and their videos: good, short, long, of variable rate, and bad.

    The film comes after the other good videos in the order in which videos are examined, so that a
    test that interrupts this has time for it.
    """
    root = tmp_path_factory.mktemp("footage")

    def film_is_last(videos: Path) -> bool:
        *others, film = (clip_hash(str(videos / name)) for name in GOOD)
        return film > max(others)

    numbered = (root / str(number) / "videos" for number in itertools.count())
    videos = next(filter(film_is_last, numbered))
    videos.mkdir(parents=True)
    folder = videos.parent
    counts = (30, 40, 25, 40)
    write_shots(videos / "shots.mp4", counts)
    write_shots(videos / "variable.mkv", counts, variable_times(sum(counts)))
    write_shots(videos / "short.mp4", [20])
    frames = HOURS_S // FILM_STEP_S
    write_shots(videos / "film.mp4", [frames], [Fraction(FILM_STEP_S * n) for n in range(frames)])
    (videos / "shots.srt").write_text(SUBTITLES)
    (videos / "empty.mp4").touch()
    (videos / "page.mp4").write_text("<html><body>404</body></html>")
    _table(
        folder / "clips.csv",
        [
            ("shots", "shots.mp4", "", "", "a caption"),
            ("part", "shots.mp4", "1.0", "4.5", "of a part"),
            ("after", "shots.mp4", "60", "70", "after its end"),
            ("variable", "variable.mkv", "", "", "another"),
            ("short", "short.mp4", "", "", "short"),
            ("film", "film.mp4", "", "", "long"),
            ("empty", "empty.mp4", "", "", "empty"),
            ("page", "page.mp4", "", "", "page"),
            ("missing", "missing.mp4", "", "", "missing"),
        ],
    )
    return folder


def _duration_s(folder: Path, name: str) -> float:
    return read_index(str(folder / "videos" / name)).duration_s(2)


SHOTS: dict[str, Any] = {"cut": "shots", "max_shot_s": 600.0, "subtitles": True}
BAD = {"empty.mp4": "empty: empty:", "page.mp4": "page: not_a_video:", "missing.mp4": "missing: m"}


@pytest.mark.ray
def test_windows_are_those_of_the_arithmetic(ray_cluster: None, footage: Path) -> None:
    summary = run_manifest(_config(footage, "windows.parquet", cut="windows", window_s=2.0))
    clips = _clips(summary["manifest"])
    for original, name in (
        ("shots", "shots.mp4"),
        ("variable", "variable.mkv"),
        ("short", "short.mp4"),
        ("film", "film.mp4"),
    ):
        whole = Span(0.0, _duration_s(footage, name))
        found = _spans_of(clips, original)
        assert found == spans.windows(whole, 2.0, 0.0)
        index = read_index(str(footage / "videos" / name))
        frames = {frame for span in found for frame in range(*index.span(*span, 2))}
        assert frames == set(range(index.num_frames))
    assert _spans_of(clips, "part") == [(1.0, 3.0), (3.0, 4.5)]
    assert _spans_of(clips, "short") == [(0.0, 0.8)]
    assert _duration_s(footage, "film.mp4") == pytest.approx(HOURS_S, abs=FILM_STEP_S)
    assert len(_spans_of(clips, "film")) == 5400
    one = clips["shots_000001"]
    assert (one["captions"], one["video_id"], one["source"]) == (
        ["a caption"],
        "shots.mp4",
        "generic",
    )
    rejected = _rejected(summary["rejected_rows"])
    assert summary["rejected"] == 4
    assert rejected.pop("shots.mp4").startswith("after: empty_span: the clip begins at 60 s")
    assert rejected.keys() == BAD.keys()
    assert all(rejected[name].startswith(reason) for name, reason in BAD.items())
    assert not (footage / "windows.cuts").exists()


@pytest.fixture(scope="module")
def shots_manifest(ray_cluster: None, footage: Path) -> ManifestSummary:
    """A manifest of shots that was made without an accident."""
    return run_manifest(_config(footage, "shots.parquet", **SHOTS))


@pytest.mark.ray
def test_shots_begin_where_they_were_made(footage: Path, shots_manifest: ManifestSummary) -> None:
    clips = _clips(shots_manifest["manifest"])
    for original, name in (("shots", "shots.mp4"), ("variable", "variable.mkv")):
        index = read_index(str(footage / "videos" / name))
        frames = [index.span(*span, 2) for span in _spans_of(clips, original)]
        assert frames == [(0, 30), (30, 70), (70, 95), (95, 135)]
    assert _spans_of(clips, "shots") == [(0, 1.2), (1.2, 2.8), (2.8, 3.8), (3.8, 5.4)]
    assert _spans_of(clips, "part") == [(1.0, 2.8), (2.8, 3.8), (3.8, 4.5)]  # 0.2 s are joined
    times_s = [float(time_s) for time_s in variable_times(135)]
    assert [begin for begin, _ in _spans_of(clips, "variable")] == pytest.approx(
        [0, times_s[30], times_s[70], times_s[95]], abs=0.0011
    )
    assert len(_spans_of(clips, "short")) == 1
    assert [end - begin for begin, end in _spans_of(clips, "film")] == pytest.approx([600] * 18)
    assert [clips[f"shots_{number:06d}"]["captions"] for number in range(4)] == [
        [],
        ["first"],  # the larger part of it
        ["second"],
        [],
    ]
    assert clips["variable_000000"]["captions"] == ["another"]  # it has no subtitles


@pytest.mark.soak
@pytest.mark.ray
def test_videos_subtitles_and_manifest_on_s3(
    ray_cluster: None, s3: FaultyS3, footage: Path, tmp_path: Path
) -> None:
    prefix = "s3://bucket/to cut"
    for name in ("shots.mp4", "shots.srt", "empty.mp4"):
        storage.put_file(footage / "videos" / name, f"{prefix}/footage/{name}")
    config = ManifestConfig(
        format="folder",
        videos=(f"{prefix}/footage",),
        output=f"{prefix}/cut.parquet",
        cutting=CuttingConfig(
            cut="shots", subtitles=True, num_workers=1, cache_dir=str(tmp_path / "cache")
        ),
    )
    summary = run_manifest(config)
    clips = _clips(summary["manifest"])
    assert _spans_of(clips, "shots") == [(0, 1.2), (1.2, 2.8), (2.8, 3.8), (3.8, 5.4)]
    assert clips["shots_000001"]["captions"] == ["first"]
    assert _rejected(summary["rejected_rows"]).keys() == {"empty.mp4"}
    assert list((tmp_path / "cache").glob("*.video"))  # it was fetched through the cache
    assert not storage.list_names(f"{prefix}/cut.cuts")


def _good_parts(kept: Path) -> list[Path]:
    """The finished parts, of one video each, whose video could be examined."""
    written = kept.glob("*/parts/0*.json")
    return [path for path in written if json.loads(path.read_text())[0]["reason"] is None]


@pytest.mark.slow
@pytest.mark.parametrize("after_parts", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_a_killed_cutting_ends_like_an_undisturbed_one(
    shots_manifest: ManifestSummary,
    joining: dict[str, str],
    footage: Path,
    after_parts: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = f"killed{after_parts}"
    command = [sys.executable, "-m", "jobs.manifest", "--format=generic", "--num-workers=1"]
    command += [f"--annotations={footage}/clips.csv", f"--videos={footage}/videos"]
    command += ["--cut=shots", "--max-shot-s=600", "--subtitles"]
    command += [f"--output={footage}/{name}.parquet"]
    job = subprocess.Popen(command, cwd=PROJECT, env=joining, start_new_session=True)
    kept = footage / f"{name}.cuts"
    try:
        wait_until(lambda: len(_good_parts(kept)) >= after_parts or job.poll() is not None)
        assert job.poll() is None
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    assert not (footage / f"{name}.parquet").exists()
    finished = len(_good_parts(kept))
    assert after_parts <= finished < len(GOOD)
    caplog.set_level(logging.INFO)
    summary = run_manifest(_config(footage, f"{name}.parquet", **SHOTS))
    (resumed,) = re.findall(r"cutting resumes: (\d) of 7 parts are finished", caplog.text)
    assert int(resumed) >= finished  # its worker may have gone on for a moment
    assert not kept.exists()
    assert summary["rejected"] == shots_manifest["rejected"]
    assert storage.read_bytes(summary["manifest"]) == storage.read_bytes(shots_manifest["manifest"])


@pytest.mark.ray
def test_a_video_that_has_changed_is_examined_again(ray_cluster: None, tmp_path: Path) -> None:
    video = tmp_path / "videos" / "a.mp4"
    video.parent.mkdir()
    write_shots(video, [20])
    _table(tmp_path / "clips.csv", [("a", "a.mp4", "1.0", "", "after the end")])
    config = _config(tmp_path, "a.parquet", cut="windows", window_s=1.0, num_workers=1)
    with pytest.raises(ManifestError, match="a: empty_span: .* its video ends at 0.8 s"):
        run_manifest(config)
    assert list((tmp_path / "a.cuts").glob("*/parts/*.json"))  # kept, as after a kill
    write_shots(video, [75])
    clips = _clips(run_manifest(config)["manifest"])
    assert _spans_of(clips, "a") == [(1.0, 2.0), (2.0, 3.0)]


def _examined(
    config: CuttingConfig, folder: Path, num_videos: int, is_finished: bool
) -> list[VideoFacts]:
    """The facts of the only part, after a new worker has examined it."""
    worker = VideoExaminer(config, str(folder), num_videos, progress=None)
    try:
        worker({"part": np.array([0]), "is_finished": np.array([is_finished])})
    finally:
        worker.close()
    found = facts.read_part(str(folder), 0)
    assert found is not None
    return found


@pytest.mark.slow
def test_only_videos_that_have_changed_are_examined_again(tmp_path: Path) -> None:
    videos = [tmp_path / f"{name}.mp4" for name in ("same", "longer", "said", "gone")]
    for video in videos:
        write_shots(video, [20])
    listed = pa.table({"video_uri": [str(video) for video in videos]})
    storage.write_table(str(tmp_path / facts.VIDEOS), listed)
    config = CuttingConfig(cut="windows", subtitles=True)
    before = _examined(config, tmp_path, len(videos), is_finished=False)
    assert [one["duration_s"] for one in before] == pytest.approx([0.8] * 4)
    marked = [VideoFacts(**{**one, "num_decoded": 77}) for one in before]  # known again
    storage.write_json(facts.part_uri(str(tmp_path), 0), marked)
    write_shots(videos[1], [75])
    videos[2].with_suffix(".srt").write_text(SUBTITLES)
    videos[3].unlink()
    same, longer, said, gone = _examined(config, tmp_path, len(videos), is_finished=True)
    assert same == marked[0]
    assert (longer["duration_s"], longer["num_decoded"]) == (pytest.approx(3.0), 0)
    assert said["cues"] is not None
    assert [text for *_, text in said["cues"]] == ["first", "second", "third"]
    assert gone["reason"] == "missing"


@pytest.mark.slow
def test_each_subtitle_becomes_a_clip_without_cutting(footage: Path) -> None:
    summary = run_manifest(_config(footage, "subtitles.parquet", subtitles=True))
    clips = _clips(summary["manifest"])
    assert [clips[f"shots_{n:06d}"]["captions"] for n in range(3)] == [
        ["first"],
        ["second"],
        ["third"],
    ]
    assert clips["part_000000"]["captions"] == ["first"]
    assert (clips["part_000001"]["start_s"], clips["part_000001"]["end_s"]) == (2.8, 4.0)
    assert clips["film"]["captions"] == ["long"]  # it has no subtitles
    assert clips["film"]["start_s"] is clips["film"]["end_s"] is None
    assert set(_rejected(summary["rejected_rows"])) == {"shots.mp4"}


def test_subtitles_in_an_archive_are_those_beside_a_file(tmp_path: Path) -> None:
    video = bytes.fromhex("00000018667479706d703432")
    french = SUBTITLES.replace("first", "d\u00e9but").encode("cp1252")
    files = {"a.mp4": video, "a.srt": SUBTITLES.encode(), "b.mp4": video, "b.txt": b"a caption"}
    files |= {"c.mp4": video, "c.en.vtt": b"WEBVTT\n\n00:01.000 --> 00:02.000\nhello\n"}
    files |= {"bad.mp4": video, "bad.srt": french}
    for name, data in files.items():
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_bytes(data)
    write_tar(tmp_path / "shard.tar", files)
    kept = ("clip_id", "captions", "start_s", "end_s")
    found = []
    for form, place in (("folder", "files"), ("webdataset", "shard.tar")):
        summary = run_manifest(
            ManifestConfig(
                format=form,
                videos=(str(tmp_path / place),),
                output=str(tmp_path / f"{form}.parquet"),
                cutting=CuttingConfig(subtitles=True),
            )
        )
        clips = _clips(summary["manifest"])
        found.append([[row[name] for name in kept] for row in clips.values()])
        reasons = storage.read_table(str(summary["rejected_rows"]))["reason"].to_pylist()
        assert len(reasons) == 1
        assert "is not UTF-8 text" in reasons[0]
    assert found[0] == found[1]
    assert len(found[0]) == 5
    assert clips["a_000001"]["video_uri"] == f"{tmp_path}/shard.tar#a.mp4"


def test_subtitles_replace_generated_captions_as_well(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    generated = {"captions": ["of the whole video"], "model": {}, "settings": {}}
    for name, value in (("a", generated), ("b", generated), ("c", "a column of its own")):
        (videos / f"{name}.mp4").write_bytes(bytes.fromhex("00000018667479706d703432"))
        described = {"caption": "x", "url": "y", "generated": value}
        (videos / f"{name}.json").write_text(json.dumps(described))
    for name in ("a", "c"):
        (videos / f"{name}.srt").write_text(SUBTITLES)
    config = ManifestConfig(
        format="folder",
        videos=(str(videos),),
        output=str(tmp_path / "a.parquet"),
        cutting=CuttingConfig(subtitles=True),
    )
    clips = _clips(run_manifest(config)["manifest"])
    extras = {name: json.loads(row["extras"]) for name, row in clips.items()}
    assert len(clips) == 7
    for number in range(3):
        assert extras[f"a_{number:06d}"].keys() == {"url", "cut"}
        assert extras[f"c_{number:06d}"]["generated"] == "a column of its own"
    assert extras["b"]["generated"] == generated  # it has no subtitles


def test_bad_subtitles_reject_their_video_alone(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for name in ("a", "b"):
        (tmp_path / "videos" / f"{name}.mp4").write_bytes(b"0")
    (tmp_path / "videos" / "a.srt").write_text(SUBTITLES)
    (tmp_path / "videos" / "b.srt").write_bytes(
        SUBTITLES.replace("third", "caf\u00e9").encode("cp1252")
    )
    _table(tmp_path / "clips.csv", [("a", "a.mp4", "", "", "x"), ("b", "b.mp4", "", "", "x")])
    summary = run_manifest(_config(tmp_path, "a.parquet", subtitles=True))
    assert set(_clips(summary["manifest"])) == {"a_000000", "a_000001", "a_000002"}
    reason = _rejected(summary["rejected_rows"])["b.mp4"]
    assert "b.srt is not UTF-8 text" in reason
    assert "convert it to UTF-8" in reason
    summary = run_manifest(
        _config(tmp_path, "b.parquet", subtitles=True, subtitle_encoding="cp1252")
    )
    assert summary["rejected"] == 0
    assert _clips(summary["manifest"])["b_000002"]["captions"] == ["caf\u00e9"]


def test_a_clip_with_the_id_of_another_ones_subtitle_is_rejected(tmp_path: Path) -> None:
    names = ("a", "a_000000", "a_000003", "a_000001", "b_000000", "c", "c_000000")
    (tmp_path / "videos").mkdir()
    for name in names:
        (tmp_path / "videos" / f"{name}.mp4").write_bytes(b"0")
    for name in ("a", "a_000001"):
        (tmp_path / "videos" / f"{name}.srt").write_text(SUBTITLES)
    _table(tmp_path / "clips.csv", [(name, f"{name}.mp4", "", "", "x") for name in names])
    summary = run_manifest(_config(tmp_path, "a.parquet", subtitles=True))
    clips = _clips(summary["manifest"])
    assert set(clips) == {
        *(f"a_{number:06d}" for number in range(3)),
        *(f"a_000001_{number:06d}" for number in range(3)),
        *("a_000003", "b_000000", "c", "c_000000"),
    }
    assert clips["a_000000"]["captions"] == ["first"]
    assert clips["c_000000"]["captions"] == ["x"]
    assert _rejected(summary["rejected_rows"]) == {
        "a_000000.mp4": "a_000000: a subtitle of the clip a becomes a clip with this id; give one "
        "of the two videos another name, or one of the two rows another id"
    }


def test_nothing_is_written_when_no_clip_is_left(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"0")
    (tmp_path / "videos" / "a.srt").write_bytes(b"\xff\xff\xff")
    _table(tmp_path / "clips.csv", [("a", "a.mp4", "", "", "x")])
    with pytest.raises(ManifestError, match="none of the videos could be cut.*a.srt is not UTF-8"):
        run_manifest(_config(tmp_path, "a.parquet", subtitles=True))
    assert not (tmp_path / "a.parquet").exists()


def test_addresses_on_the_web_are_not_cut(tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text("https://videos.example/a.mp4\n")
    config = ManifestConfig(
        annotations=(str(tmp_path / "urls.txt"),),
        format="urls",
        output=str(tmp_path / "a.parquet"),
        cutting=CuttingConfig(cut="windows"),
    )
    with pytest.raises(ManifestError, match="fetch the videos with jobs.fetch"):
        run_manifest(config)


@pytest.mark.slow
def test_without_cutting_a_manifest_needs_no_ray(footage: Path) -> None:
    program = (
        "import sys; from jobs.entry import main; from jobs.manifest import JOB\n"
        "try:\n    main(JOB)\nfinally:\n    print('ray' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, "--format=generic", "--subtitles"]
    command += [f"--annotations={footage}/clips.csv", f"--videos={footage}/videos"]
    command += [f"--output={footage}/no_ray.parquet"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "False", done.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cut": "windows", "overlap_s": 10.0}, "overlap_s = 10.0: .*less than window_s = 10"),
        (
            {"cut": "windows", "overlap_s": 9.9999},
            "overlap_s = 9.9999: .*less than window_s = 10 by at least 0.1",
        ),
        ({"cut": "windows", "overlap_s": -1.0}, "overlap_s = -1.0: must not be negative"),
        ({"cut": "windows", "window_s": float("inf")}, "window_s = inf: must be finite"),
        ({"cut": "windows", "overlap_s": float("nan")}, "overlap_s = nan: must be finite"),
        ({"cut": "shots", "shot_threshold": float("nan")}, "shot_threshold = nan: must be finite"),
        ({"cut": "shots", "min_shot_s": float("inf")}, "min_shot_s = inf: must be finite"),
        ({"cut": "shots", "max_shot_s": float("inf")}, "max_shot_s = inf: must be finite"),
        ({"cut": "shots", "deadline_s": float("inf")}, "deadline_s = inf: must be finite"),
        ({"cut": "shots", "cache_gb": float("inf")}, "cache_gb = inf: must be finite"),
        ({"cut": "windows", "window_s": 0.01}, "window_s = 0.01: must be at least 0.1"),
        ({"cut": "shots", "window_s": 5.0}, "window_s = 5.0: .* only with --cut windows"),
        ({"max_shot_s": 5.0}, "max_shot_s = 5.0: .* only with --cut shots"),
        ({"cut": "shots", "max_shot_s": 1.0}, "max_shot_s = 1.0: .*twice min_shot_s = 0.6"),
        ({"subtitle_language": "en"}, "subtitle_language = 'en': .* only with --subtitles"),
        ({"subtitles": True, "subtitle_encoding": "no_such"}, "is not the name of an encoding"),
        ({"subtitles": True, "subtitle_encoding": "rot13"}, "is not the name of an encoding"),
        ({"subtitles": True, "subtitle_encoding": "undefined"}, "is not the name of an encoding"),
    ],
)
def test_settings_without_an_effect_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        CuttingConfig(**settings)


def test_windows_may_begin_a_tenth_of_a_second_apart() -> None:
    assert CuttingConfig(cut="windows", window_s=10.0, overlap_s=9.9).overlap_s == 9.9


@pytest.mark.parametrize("encoding", ["utf-16", "utf-7", "cp037"])
def test_encodings_of_text_are_accepted(encoding: str) -> None:
    config = CuttingConfig(subtitles=True, subtitle_encoding=encoding)
    assert config.subtitle_encoding == encoding
