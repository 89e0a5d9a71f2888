"""Durations of whole videos, and where their shots change."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.video.child import Failure
from pipelines.video.config import SamplingConfig
from pipelines.video.decoder import ClipDecoder
from pipelines.video.exact_frames import end_of_last_packets, read_index
from pipelines.video.examine import (
    Examined,
    ExamineRequest,
    ShotDetector,
    ShotRules,
    examine_file,
)
from stgt.errors import VideoDecodeError
from tests.helpers.archives import write_tar
from tests.helpers.decoder_children import hang_on_examination
from tests.helpers.shots import constant_times, variable_times, write_shots
from tests.helpers.videos import encode_video, moving_pictures

COUNTS = (30, 20, 30, 25, 3, 30)
CONSTANT, VARIABLE = constant_times(sum(COUNTS)), variable_times(sum(COUNTS))
KINDS = {
    "b_frames.mp4": ("libx264", CONSTANT, {"bf": "2", "g": "25"}),
    "variable.mp4": ("libx264", VARIABLE, {"bf": "2", "g": "25"}),
    "variable.mkv": ("libx264", VARIABLE, {"bf": "2"}),
    "variable.webm": ("libvpx", VARIABLE, {"deadline": "realtime", "b": "2M"}),
    "variable.ts": ("libx264", VARIABLE, {"bf": "2", "g": "25"}),
    "constant.flv": ("libx264", CONSTANT, {"bf": "2"}),
    # These have no timestamps, so their frames are counted.
    "b_frames.avi": ("mpeg4", CONSTANT, {"bf": "2", "b": "8M"}),
    "raw.h264": ("libx264", CONSTANT, {"bf": "2"}),
}
ALL_CHANGES = ShotRules(detector="adaptive", threshold=None, min_shot_s=0.0)


def _examined(path: Path, shots: ShotRules | None = None, **changes: int) -> Examined:
    limits = {"max_pixels": 10**8, "max_bytes": 10**9, **changes}
    found = examine_file(ExamineRequest(path=str(path), shots=shots, **limits))
    assert isinstance(found, Examined), found
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_changes_of_shot_are_found_at_their_presentation_times(tmp_path: Path, name: str) -> None:
    codec, times_s, options = KINDS[name]
    cuts_s = write_shots(tmp_path / name, COUNTS, times_s, codec, **options)
    found = _examined(tmp_path / name, ALL_CHANGES)
    assert found.cuts_s == pytest.approx(cuts_s, abs=0.0011)  # containers count milliseconds
    assert found.num_decoded == sum(COUNTS)
    assert found.duration_s == read_index(str(tmp_path / name)).duration_s(2)


@pytest.mark.parametrize("detector", ["adaptive", "content", "hash", "histogram"])
def test_every_detector_finds_the_changes(tmp_path: Path, detector: ShotDetector) -> None:
    cuts_s = write_shots(tmp_path / "a.mp4", COUNTS)
    rules = ShotRules(detector=detector, threshold=None, min_shot_s=0.0)
    found = set(_examined(tmp_path / "a.mp4", rules).cuts_s)
    assert found >= set(cuts_s) if detector in ("hash", "histogram") else found == set(cuts_s)


def test_a_high_threshold_finds_no_change(tmp_path: Path) -> None:
    write_shots(tmp_path / "a.mp4", COUNTS)
    rules = ShotRules(detector="content", threshold=250.0, min_shot_s=0.0)
    assert _examined(tmp_path / "a.mp4", rules).cuts_s == ()


def test_a_video_of_one_shot_has_no_changes(tmp_path: Path) -> None:
    write_shots(tmp_path / "a.mp4", [50])
    assert _examined(tmp_path / "a.mp4", ALL_CHANGES).cuts_s == ()


def test_the_stream_that_is_decoded_is_examined(tmp_path: Path) -> None:
    cuts_s = write_shots(tmp_path / "a.mkv", COUNTS)
    with av.open(str(tmp_path / "a.mkv")) as source, av.open(str(tmp_path / "b.mkv"), "w") as both:
        cover = both.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        stream = both.add_stream_from_template(source.streams.video[0])
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        both.mux(cover.encode(picture))
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                both.mux(packet)
        both.mux(cover.encode(None))
    found = _examined(tmp_path / "b.mkv", ALL_CHANGES)
    assert found.cuts_s == pytest.approx(cuts_s, abs=0.0011)
    assert found.num_decoded == sum(COUNTS)


def test_a_video_that_is_mostly_broken_has_no_shots(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_shots(path, COUNTS, g="5", bf="0")
    data = bytearray(path.read_bytes())
    first = data.index(b"mdat") + 2000
    data[first : data.index(b"moov")] = bytes(data.index(b"moov") - first)
    path.write_bytes(data)
    request = ExamineRequest(path=str(path), shots=ALL_CHANGES, max_pixels=10**8, max_bytes=10**9)
    found = examine_file(request)
    assert isinstance(found, Failure)
    assert found.reason == "undecodable"
    assert "too few to find shots" in found.message


def _containers(folder: Path) -> Sequence[Path]:
    pictures = moving_pictures(60)
    made = [
        encode_video(folder / "long_groups.mp4", "libx264", pictures, g="250", bf="3"),
        encode_video(folder / "short_groups.mov", "libx264", pictures, g="5"),
        encode_video(folder / "a.mkv", "libx264", pictures, g="10", bf="2"),
        encode_video(folder / "live.webm", "libvpx", pictures, container={"live": "1"}),
        encode_video(folder / "a.ts", "libx264", pictures),
        encode_video(folder / "a.avi", "mpeg4", pictures),
    ]
    write_shots(folder / "variable.mp4", (20, 20), variable_times(40))
    cut_short = folder / "cut_short.mkv"
    data = (folder / "a.mkv").read_bytes()
    cut_short.write_bytes(data[: len(data) * 2 // 3])
    return [*made, folder / "variable.mp4", cut_short]


@pytest.mark.slow
def test_the_duration_is_that_of_the_index_whatever_the_container_says(tmp_path: Path) -> None:
    for path in _containers(tmp_path):
        indexed = read_index(str(path)).duration_s(2)
        assert end_of_last_packets(str(path)) in (indexed, None), path.name
        found = _examined(path)
        assert (found.duration_s, found.num_decoded) == (indexed, 0), path.name


def test_real_videos_are_as_long_as_their_index_says(videos_dir: Path) -> None:
    quick = 0
    for path in sorted(videos_dir.rglob("*")):
        found = examine_file(ExamineRequest(path=str(path), max_pixels=10**8, max_bytes=10**9))
        if isinstance(found, Examined):
            assert found.duration_s == read_index(str(path)).duration_s(2), path.name
            quick += end_of_last_packets(str(path)) is not None
    assert quick > 20


def test_a_file_that_declares_another_duration_is_measured_by_its_packets(tmp_path: Path) -> None:
    path = encode_video(tmp_path / "a.mp4", "libx264", moving_pictures(50))
    data = bytearray(path.read_bytes())
    place = data.index(b"mvhd") + 4 + 16  # version, flags, two times and the time scale
    assert int.from_bytes(data[place : place + 4], "big") == 2000  # in milliseconds
    data[place : place + 4] = (60_000).to_bytes(4, "big")
    path.write_bytes(data)
    assert _examined(path).duration_s == 2.0


def test_bad_files_are_failures_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "page.mp4").write_text("<html><body>403</body></html>")
    (tmp_path / "empty.mp4").write_bytes(b"")
    write_shots(tmp_path / "large.mp4", [5])
    expected = {
        "page.mp4": "not_a_video",
        "empty.mp4": "empty",
        "none.mp4": "missing",
        "large.mp4": "too_large",
    }
    for name, reason in expected.items():
        request = ExamineRequest(
            path=str(tmp_path / name), shots=ALL_CHANGES, max_pixels=100, max_bytes=10**9
        )
        found = examine_file(request)
        assert isinstance(found, Failure)
        assert found.reason == reason


@pytest.mark.slow
def test_an_examination_that_hangs_is_ended_at_its_deadline_and_others_go_on(
    tmp_path: Path,
) -> None:
    write_shots(tmp_path / "a.mp4", [25, 25])

    def ask(path: str, identity: str) -> ExamineRequest:
        return ExamineRequest(path=path, identity=identity, max_pixels=10**8, max_bytes=10**9)

    uri = str(tmp_path / "a.mp4")
    with ClipDecoder(SamplingConfig()) as decoder:
        assert decoder.examine(uri, examine_file, ask, 30.0) == Examined(duration_s=2.0)
        begun = time.monotonic()
        with pytest.raises(VideoDecodeError) as error:
            decoder.examine(uri, hang_on_examination, ask, 1.0)
        assert error.value.reason == "timeout"
        assert time.monotonic() - begun < 10
        assert decoder.examine(uri, examine_file, ask, 30.0) == Examined(duration_s=2.0)
        # A member of an archive is examined like a file.
        member = write_tar(tmp_path / "a.tar", {"b.mp4": (tmp_path / "a.mp4").read_bytes()})
        uri = f"{member}#b.mp4"
        assert decoder.examine(uri, examine_file, ask, 30.0) == Examined(duration_s=2.0)
        with pytest.raises(VideoDecodeError, match="missing"):
            decoder.examine(f"{member}#none.mp4", examine_file, ask, 30.0)
