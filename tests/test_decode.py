"""Frames of real clips, and what files that are none cost."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipelines import synthetic
from pipelines.config import SamplingConfig
from pipelines.decode import REASONS, ClipDecoder, ClipSource
from pipelines.decode_child import stall
from stgt.errors import VideoDecodeError

pytestmark = pytest.mark.slow

GIB = 1024**3
THUMBNAIL_TOLERANCE = 4.0


def decoder(**changes: object) -> ClipDecoder:
    sampling = SamplingConfig(num_frames=6, size=224, **changes)  # type: ignore[arg-type]
    return ClipDecoder(sampling, deadline_s=20, max_pixels=10**8, memory_limit_bytes=4 * GIB)


@pytest.fixture(scope="module")
def auto() -> Iterator[ClipDecoder]:
    with decoder() as made:
        yield made


def thumbnails(frames: np.ndarray) -> np.ndarray:
    """[F, 224, 224, 3] uint8 -> [F, 16, 16] grey, averaged over areas."""
    grey = frames.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    return grey.reshape(len(frames), 16, 14, 16, 14).mean(axis=(2, 4))


def test_frames_of_good_clips_are_the_right_ones(auto: ClipDecoder, videos_dir: Path) -> None:
    golden = np.load(videos_dir / "golden_thumbnails.npz")
    wrong = {}
    for path in sorted((videos_dir / "good").iterdir()):
        decoded = auto.decode(ClipSource(path.name, str(path)))
        wanted = golden[path.name][decoded.frame_indices].astype(np.float64)
        off = np.abs(thumbnails(decoded.frames) - wanted).mean(axis=(1, 2)).max()
        if off > THUMBNAIL_TOLERANCE:
            wrong[path.name] = round(float(off), 1)
    assert wrong == {}


def test_files_without_frames_get_a_reason(auto: ClipDecoder, videos_dir: Path) -> None:
    found = {}
    for path in sorted((videos_dir / "bad").iterdir()):
        with pytest.raises(VideoDecodeError) as caught:
            auto.decode(ClipSource(path.name, str(path)))
        found[path.name] = caught.value.reason
    assert found["zero.mp4"] == "empty"
    assert found["html403.mp4"] == "not_a_video"
    assert found["trunc_nomoov.mp4"] == "not_a_video"
    assert set(found.values()) <= set(REASONS)


def test_a_missing_file_is_missing(auto: ClipDecoder) -> None:
    with pytest.raises(VideoDecodeError, match="clip x: missing: no file at /nowhere/x.mp4"):
        auto.decode(ClipSource("x", "/nowhere/x.mp4"))


def test_damaged_clips_are_salvaged(auto: ClipDecoder, videos_dir: Path) -> None:
    for name in ("corrupt_mid20.mp4", "trunc_faststart50.mp4"):
        path = videos_dir / "damaged" / name
        assert auto.decode(ClipSource(name, str(path))).frames.shape == (6, 224, 224, 3)


@pytest.fixture
def mp4(tmp_path: Path) -> str:
    path = tmp_path / "a.mp4"
    frames = synthetic.render(synthetic.all_scenes()[0], np.random.default_rng(0))
    path.write_bytes(synthetic.encode_h264(frames))
    return str(path)


def test_a_span_of_a_video_gives_frames_of_that_span(auto: ClipDecoder, mp4: str) -> None:
    decoded = auto.decode(ClipSource("a", mp4, 0.5, 1.0))
    assert decoded.frame_indices == [6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("name", ["decord", "pyav"])
def test_both_decoders_give_the_same_frames(name: str, auto: ClipDecoder, mp4: str) -> None:
    with decoder(decoder=name) as one:
        frames = one.decode(ClipSource("a", mp4))
    assert frames.facts.decoder == name
    other = auto.decode(ClipSource("a", mp4)).frames.astype(int)
    assert np.abs(frames.frames - other).mean() < 2


def test_a_crop_keeps_the_aspect_ratio(videos_dir: Path) -> None:
    path = videos_dir / "good" / "made_webvid_like_596x336_gop250.mp4"
    with decoder(resize="crop") as cropping, decoder() as squashing:
        cropped = cropping.decode(ClipSource("a", str(path))).frames
        squashed = squashing.decode(ClipSource("a", str(path))).frames
    assert cropped.shape == squashed.shape
    assert np.abs(cropped.astype(int) - squashed).mean() > 1


def test_a_hanging_decoder_costs_its_deadline_and_no_more(mp4: str) -> None:
    sampling = SamplingConfig(num_frames=6)
    with ClipDecoder(sampling, deadline_s=2, max_pixels=10**8, memory_limit_bytes=4 * GIB) as one:
        one.decode(ClipSource("a", mp4))
        # The same pool, with a call that never ends in place of one that decodes.
        started = time.monotonic()
        future = one._pool.schedule(stall, args=[60], timeout=2)  # noqa: SLF001
        with pytest.raises(TimeoutError):
            future.result()
        assert time.monotonic() - started < 8
        assert one.decode(ClipSource("a", mp4)).frames.shape[0] == 6


def test_a_decoder_that_dies_costs_one_clip(mp4: str) -> None:
    with decoder() as one:
        one.decode(ClipSource("a", mp4))
        child = one._pool.schedule(os.getpid).result()  # noqa: SLF001
        dying = one._pool.schedule(stall, args=[60])  # noqa: SLF001
        time.sleep(0.5)
        os.kill(child, signal.SIGKILL)
        with pytest.raises(Exception, match="(?i)abnormal|expired|unexpected"):
            dying.result()
        assert one.decode(ClipSource("a", mp4)).frames.shape[0] == 6


def test_a_video_with_too_many_pixels_is_not_decoded(mp4: str) -> None:
    sampling = SamplingConfig(num_frames=6)
    small = ClipDecoder(sampling, max_pixels=96 * 95)
    with small, pytest.raises(VideoDecodeError, match="too_large: frames of 96x96"):
        small.decode(ClipSource("a", mp4))


def test_golden_counts_are_those_of_the_decoder(auto: ClipDecoder, videos_dir: Path) -> None:
    golden = json.loads((videos_dir / "golden.json").read_text())
    wanted = {
        path.name: golden[path.name]["num_frames"] for path in (videos_dir / "good").iterdir()
    }
    found = {
        name: auto.decode(ClipSource(name, str(videos_dir / "good" / name))).facts.num_source_frames
        for name in wanted
    }
    assert found == wanted


def test_a_title_in_another_encoding_does_not_matter(auto: ClipDecoder, tmp_path: Path) -> None:
    (scene,) = synthetic.plan_videos(num_train=1, num_val=1, seed=0)["train"]
    synthetic.write_videos({"id": np.array([0])}, str(tmp_path), [scene])
    (path,) = tmp_path.rglob("*.mp4")
    title = b"\xe4\xf6\xfc latin-1"
    data = b"".join([(len(title) + 16).to_bytes(4, "big"), b"data", bytes([0, 0, 0, 1]), bytes(4)])
    name = _box(b"\xa9nam", data + title)
    handler = _box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    meta = _box(b"meta", bytes(4) + handler + _box(b"ilst", name))
    titled = tmp_path / "titled.mp4"
    titled.write_bytes(_with_user_data(path.read_bytes(), _box(b"udta", meta)))
    plain = auto.decode(ClipSource("plain", str(path)))
    assert np.array_equal(auto.decode(ClipSource("titled", str(titled))).frames, plain.frames)


def _box(kind: bytes, payload: bytes) -> bytes:
    return (len(payload) + 8).to_bytes(4, "big") + kind + payload


def _with_user_data(mp4: bytes, user_data: bytes) -> bytes:
    """The same file with a box at the end of its `moov`, which must be the last box."""
    at = mp4.rindex(b"moov") - 4
    size = int.from_bytes(mp4[at : at + 4], "big")
    assert at + size == len(mp4)
    return mp4[:at] + (size + len(user_data)).to_bytes(4, "big") + mp4[at + 4 :] + user_data


def test_strange_requests_get_a_reason(auto: ClipDecoder, videos_dir: Path) -> None:
    good = str(sorted((videos_dir / "good").glob("*.mp4"))[0])
    asked = {
        "missing": ("/" + 300 * "x" + ".mp4", None, None),
        "empty_span": (good, 10_000.0, 10_010.0),
    }
    for reason, (path, start, end) in asked.items():
        with pytest.raises(VideoDecodeError) as caught:
            auto.decode(ClipSource("x", path, start, end))
        assert caught.value.reason == reason
    with pytest.raises(VideoDecodeError, match="1.5 s to 1 s holds no frame"):
        auto.decode(ClipSource("x", good, 1.5, 1.0))
