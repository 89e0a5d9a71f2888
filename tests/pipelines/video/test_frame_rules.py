"""Which frames a span has, how they are cropped, and what is said about files that are no video."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pipelines.video.child import Decoded, DecodeRequest, Failure, decode_file
from tests.helpers.videos import encode_video, moving_pictures


def decoded(path: Path, **changes: object) -> Decoded | Failure:
    values = {
        "path": str(path), "num_frames": 200, "frame_choice": "uniform", "size": 32,
        "resize": "squash", "decoder": "pyav", "max_pixels": 10**9, "max_bytes": 10**12,
    }  # fmt: skip
    return decode_file(DecodeRequest(**{**values, **changes}))  # type: ignore[arg-type]


def frames_of(path: Path, start_s: float | None, end_s: float | None, rules: int = 2) -> list[int]:
    """The different frames of a span, in order; none if it is empty."""
    found = decoded(path, start_s=start_s, end_s=end_s, frame_rules=rules)
    if isinstance(found, Failure):
        assert found.reason == "empty_span", found
        return []
    return sorted(set(found.frame_indices))


@pytest.mark.parametrize("name", ["slides.mp4", "slides.mkv"])
@pytest.mark.parametrize(
    ("start_s", "end_s", "right", "earlier"),
    [
        (3, 8, [0], []),
        (12, 18, [1], []),
        (0, 5, [0], [0]),
        (9.9, 10.1, [0, 1], []),
        (10, 20, [1], [1]),
        (31, 33, [3], [3]),
        (35, 40, [3], []),
        (200, 210, [], []),
    ],
)
def test_the_picture_on_display_belongs_to_the_span(
    name: str, start_s: float, end_s: float, right: list[int], earlier: list[int], cases_dir: Path
) -> None:
    """Pictures at 0, 10, 20 and 30 s."""
    path = cases_dir / "15_vfr_span_empty" / name
    assert frames_of(path, start_s, end_s) == right
    assert frames_of(path, start_s, end_s, rules=1) == earlier


@pytest.mark.parametrize(
    ("start_s", "end_s", "right"),
    [
        (1.0, 1.01, [25]),
        (1.03, 1.035, [25]),
        (1.0, 1.00001, [25]),
        (3.99, 5.0, [99]),
        (4.0, 5.0, []),
        (1.0, 1.0, []),
        (1.5, 1.0, []),
        (0.9996, 1.08, [25, 26]),  # rounded to milliseconds
        (0.98, 1.0404, [24, 25]),
        (None, 0.001, [0]),
        (3.92, None, [98, 99]),
    ],
)
def test_spans_at_25_frames_per_second(
    start_s: float | None, end_s: float | None, right: list[int], cases_dir: Path
) -> None:
    assert frames_of(cases_dir / "15_vfr_span_empty" / "base.mp4", start_s, end_s) == right


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv"])
@pytest.mark.parametrize(
    ("start_s", "end_s", "right", "earlier"),
    [
        (3, 5, range(50), range(75, 100)),
        (5, 7, range(50, 100), ()),
        (0, 5, range(50), range(100)),
        (0, 2, (), range(50)),
        (7, 8, (), ()),
        (None, None, range(100), range(100)),
    ],
)
def test_times_count_from_the_start_of_the_file(
    name: str,
    start_s: float | None,
    end_s: float | None,
    right: range,
    earlier: range,
    cases_dir: Path,
) -> None:
    """The audio of these files begins at 0 s, and the video at 3 s."""
    path = cases_dir / "16_video_starts_late" / name
    assert frames_of(path, start_s, end_s) == list(right)
    assert frames_of(path, start_s, end_s, rules=1) == list(earlier)


def test_a_file_that_starts_at_another_time_counts_from_its_start(videos_dir: Path) -> None:
    path = videos_dir / "good" / "torchcodec_test_non_zero_start.mp4"
    with av.open(str(path)) as container:
        assert container.start_time > 0
    assert frames_of(path, 0, 0.05)[0] == 0


@pytest.mark.slow
def test_cropping_keeps_the_center_of_what_is_displayed(cases_dir: Path) -> None:
    """320x360 pixels that are twice as wide as high are displayed as 640x360."""
    path = cases_dir / "18_sar_crop" / "sar2.mp4"
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0)).reformat(64, 36, "rgb24", interpolation="BICUBIC")
    wide = frame.to_ndarray().astype(int)
    for decoder in ("pyav", "decord", "auto"):
        found = decoded(path, resize="crop", size=36, num_frames=1, decoder=decoder)
        assert isinstance(found, Decoded)
        assert (found.facts.width, found.facts.height) == (640, 360)
        assert np.abs(found.frames[0] - wide[:, 14:50]).mean() < 3
    earlier = decoded(path, resize="crop", size=36, num_frames=1, frame_rules=1)
    assert isinstance(earlier, Decoded)
    assert (earlier.facts.width, earlier.facts.height) == (320, 360)
    assert np.abs(earlier.frames[0] - wide[:, 14:50]).mean() > 10


def test_the_short_side_is_that_of_the_display(cases_dir: Path) -> None:
    path = cases_dir / "18_sar_crop" / "sar2.mp4"
    assert isinstance(decoded(path, min_short_side=350), Decoded)
    assert decoded(path, min_short_side=350, frame_rules=1) == Failure(
        "too_small", "320x360 pixels"
    )


def test_side_data_of_an_unknown_kind_is_ignored(cases_dir: Path) -> None:
    found = decoded(cases_dir / "14_mvhevc_side_data" / "multiview.mp4")
    assert isinstance(found, Decoded), found
    assert found.facts.num_source_frames == 11
    assert len({frame.tobytes() for frame in found.frames}) == 11


def test_an_animated_webp_is_decoded(cases_dir: Path) -> None:
    path = cases_dir / "21_animated_webp" / "anim.webp"
    found = decoded(path, num_frames=20)
    assert isinstance(found, Decoded), found
    assert (found.facts.num_source_frames, found.facts.duration_s) == (20, 2.0)
    with Image.open(path) as image:
        for number, frame in enumerate(found.frames):
            image.seek(number)
            right = np.asarray(image.convert("RGB").resize((32, 32))).astype(int)
            assert np.abs(right - frame).mean() < 6
    assert frames_of(path, 0.55, 0.75) == [5, 6, 7]


TEXTS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n": "Git LFS pointer",
    b'{"error": {"code": 404}}': "JSON text",
    b'[\n  {"message": "slow down"}\n]\n': "JSON text",
    b"\xef\xbb\xbf<?xml version='1.0'?><Error/>": "HTML or XML page",
    b"\n <!DOCTYPE html><html></html>": "HTML or XML page",
}


@pytest.mark.parametrize("text", TEXTS)
def test_texts_saved_as_videos_are_named(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(text)
    found = decoded(path)
    assert isinstance(found, Failure)
    assert found.reason == "not_a_video"
    assert TEXTS[text] in found.message


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


KINDS: dict[str, Callable[[Path], object]] = {
    "a named pipe (FIFO)": os.mkfifo,
    "a socket": a_socket,
    "a directory": Path.mkdir,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_named_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    KINDS[kind](path)
    assert decoded(path) == Failure("not_a_video", f"{path} is {kind}, not a video file")


def test_an_encrypted_video_is_named(tmp_path: Path) -> None:
    options = {
        "encryption_scheme": "cenc-aes-ctr",
        "encryption_key": 32 * "7",
        "encryption_kid": 32 * "a",
    }
    path = encode_video(tmp_path / "a.mp4", "libx264", moving_pictures(12), container=options)
    found = decoded(path)
    assert isinstance(found, Failure)
    assert found.reason == "encrypted"


def test_a_sample_entry_that_says_encrypted_is_named(tmp_path: Path) -> None:
    path = encode_video(tmp_path / "a.mp4", "libx264", moving_pictures(12))
    path.write_bytes(path.read_bytes().replace(b"avc1\0", b"encv\0"))
    found = decoded(path)
    assert isinstance(found, Failure)
    assert found.reason == "encrypted"


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "still picture (mjpeg)"), ("a.jpg", "mjpeg"), ("a", "still picture (mjpeg)")],
)
def test_a_still_picture_that_is_named_as_a_video_is_marked(
    name: str, codec: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    Image.new("RGB", (64, 48), (200, 10, 10)).save(path, format="JPEG")
    found = decoded(path)
    assert isinstance(found, Decoded), found
    assert found.facts.codec == codec


@pytest.mark.parametrize(
    ("pixels", "rate", "size"),
    [("yuv420p", Fraction(25), (720, 576)), ("yuv411p", Fraction(30000, 1001), (720, 480))],
)
def test_raw_dv_has_the_rate_of_its_system(
    pixels: str, rate: Fraction, size: tuple[int, int], tmp_path: Path
) -> None:
    coder = av.CodecContext.create("dvvideo", "w")
    coder.width, coder.height = size
    coder.pix_fmt, coder.time_base, coder.framerate = pixels, 1 / rate, rate
    data = b""
    for number in range(6):
        image = np.full((size[1], size[0], 3), 40 * number, dtype=np.uint8)
        frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixels)
        frame.pts = number
        data += b"".join(bytes(packet) for packet in coder.encode(frame))
    path = tmp_path / "a.dv"
    path.write_bytes(data)
    found = decoded(path)
    assert isinstance(found, Decoded), found
    assert found.facts.fps == pytest.approx(float(rate))
    assert found.facts.duration_s == pytest.approx(6 / float(rate), abs=1e-5)
    assert frames_of(path, 2.5 / float(rate), 4.5 / float(rate)) == [2, 3, 4]
