"""Frames of real clips, and what files that are none cost."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import psutil
import pytest
from pebble import ProcessFuture, ProcessPool

from pipelines.video import decoder as decoder_module
from pipelines.video.config import DecodeLimits, SamplingConfig
from pipelines.video.decoder import ClipDecoder, ClipSpan
from pipelines.video.synthetic import dataset, render, scenes
from stgt.errors import VideoDecodeError
from tests.helpers.decoder_children import SLOW_START_S, begin_slowly, decord_for_auto, hang
from tests.helpers.waiting import has_open, wait_until

pytestmark = pytest.mark.slow

THUMBNAIL_TOLERANCE = 4.0


def decoder(**changes: object) -> ClipDecoder:
    sampling = SamplingConfig(num_frames=6, size=224, **changes)  # type: ignore[arg-type]
    return ClipDecoder(sampling, limits=DecodeLimits(deadline_s=20, max_pixels=10**8))


@pytest.fixture(scope="module")
def auto() -> Iterator[ClipDecoder]:
    with decoder() as made:
        yield made


def thumbnails(frames: np.ndarray) -> np.ndarray:
    """[F, 224, 224, 3] uint8 -> [F, 16, 16] grey, averaged over areas."""
    grey = frames.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    return grey.reshape(len(frames), 16, 14, 16, 14).mean(axis=(2, 4))


CHOICES = [("uniform", 0), ("random", 0)]
MORE_CHOICES = [("middle", 0), ("head_tail", 1), *(("random", seed) for seed in range(1, 6))]


@pytest.mark.parametrize(
    "choices", [CHOICES, pytest.param(MORE_CHOICES, marks=pytest.mark.soak)], ids=["some", "more"]
)
@pytest.mark.parametrize("name", ["pyav", "auto"])
def test_frames_of_good_clips_are_the_right_ones(
    name: str, choices: list[tuple[str, int]], videos_dir: Path
) -> None:
    """At uniform and at random indices, by the thumbnails of one decode of the whole file."""
    golden = np.load(videos_dir / "golden_thumbnails.npz")
    known = json.loads((videos_dir / "golden.json").read_text())
    wrong, compared = {}, 0
    for choice, seed in choices:
        with decoder(decoder=name, frame_choice=choice) as one:
            for path in sorted((videos_dir / "good").iterdir()):
                decoded = one.decode(ClipSpan(path.name, str(path), seed=(seed,)))
                facts, about = decoded.facts, known[path.name]
                with av.open(str(path)) as container:  # sizes in golden.json are those of pixels
                    aspect = container.streams.video[0].sample_aspect_ratio or 1
                wanted = golden[path.name][decoded.frame_indices].astype(np.float64)
                off = np.abs(thumbnails(decoded.frames) - wanted).mean(axis=(1, 2)).max()
                compared += len(wanted)
                if (
                    off > THUMBNAIL_TOLERANCE
                    or facts.salvaged
                    or facts.num_source_frames != about["num_frames"]
                    or (facts.height, facts.width)
                    != (about["height"], round(about["width"] * aspect))
                ):
                    wrong[path.name, choice, seed] = (round(float(off), 1), facts)
    assert wrong == {}
    assert compared == 6 * len(known) * len(choices)


def test_random_choices_depend_on_the_seed_alone(videos_dir: Path) -> None:
    path = str(videos_dir / "good" / "mmaction_demo.mp4")
    with decoder(frame_choice="random") as one:
        indices = [
            one.decode(ClipSpan("a", path, seed=(seed,))).frame_indices for seed in (1, 1, 2)
        ]
    assert indices[0] == indices[1] != indices[2]


def test_short_clips_repeat_their_last_frame(auto: ClipDecoder, videos_dir: Path) -> None:
    path = str(videos_dir / "good" / "made_three_frames.mp4")
    decoded = auto.decode(ClipSpan("a", path))
    assert decoded.frame_indices == [0, 1, 2, 2, 2, 2]
    assert np.array_equal(decoded.frames[2], decoded.frames[5])


BAD = {
    "zero.mp4": "empty",
    "html403.mp4": "not_a_video",
    "trunc_nomoov.mp4": "not_a_video",
    "mp4parse_chunk_out_of_range.mp4": "not_a_video",
    "mp4parse_opus_audioinit.mp4": "no_video_stream",
}


def test_files_without_frames_get_their_reason(auto: ClipDecoder, videos_dir: Path) -> None:
    found = {}
    for path in sorted((videos_dir / "bad").iterdir()):
        with pytest.raises(VideoDecodeError) as caught:
            auto.decode(ClipSpan(path.name, str(path)))
        found[path.name] = caught.value.reason
    assert found == BAD


def test_a_missing_file_is_missing(auto: ClipDecoder) -> None:
    with pytest.raises(VideoDecodeError, match="clip x: missing: cannot open /nowhere/x.mp4"):
        auto.decode(ClipSpan("x", "/nowhere/x.mp4"))


@pytest.mark.parametrize("name", ["pyav", "auto"])
def test_damaged_clips_are_salvaged_and_marked(name: str, videos_dir: Path) -> None:
    with decoder(decoder=name) as one:
        for path in sorted((videos_dir / "damaged").iterdir()):
            decoded = one.decode(ClipSpan(path.name, str(path)))
            assert decoded.frames.shape == (6, 224, 224, 3), path.name
            assert decoded.facts.salvaged, path.name
            assert len({frame.tobytes() for frame in decoded.frames}) > 1, path.name


def test_a_decoder_that_hangs_costs_less_than_the_deadline(videos_dir: Path) -> None:
    """On this file decord spins for ever, holding the interpreter; only a kill ends it."""
    good = ClipSpan("good", str(videos_dir / "good" / "mmaction_demo.mp4"))
    sampling = SamplingConfig(num_frames=4, size=32, decoder="decord")
    bad = ClipSpan("midgop", str(videos_dir / "damaged" / "midgop.ts"))
    late = "timeout: decoding did not finish within 4 s"
    took_s = []
    with ClipDecoder(sampling, limits=DecodeLimits(deadline_s=4)) as one:
        # On a busy machine a kill may come a second late, but not each of four.
        for _ in range(4):
            one.decode(good)
            started = time.monotonic()
            with pytest.raises(VideoDecodeError, match=late):
                one.decode(bad)
            took_s.append(time.monotonic() - started)
            if took_s[-1] < 4:
                break
        assert min(took_s) < 4
        assert max(took_s) < 4 + 5
        assert one.decode(good).frames.shape == (4, 32, 32, 3)


@pytest.fixture
def busy() -> Iterator[None]:
    """Processes that take the processor from the decoder."""
    others = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(2 * (os.cpu_count() or 1))
    ]
    yield
    for other in others:
        other.kill()
        other.wait()


@pytest.mark.parametrize("name", ["decord", "auto"])
def test_the_deadline_is_kept_on_a_busy_machine(
    name: Literal["decord", "auto"],
    videos_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    busy: None,
) -> None:
    """Also by the first clip, whose decoder process has yet to start."""
    monkeypatch.setattr(decoder_module, "decode_file", hang)
    sampling = SamplingConfig(num_frames=4, size=32, decoder=name)
    clip = ClipSpan("any", str(videos_dir / "good" / "mmaction_demo.mp4"))
    with ClipDecoder(sampling, limits=DecodeLimits(deadline_s=2)) as one:
        started = time.monotonic()
        with pytest.raises(VideoDecodeError, match="timeout"):
            one.decode(clip)
        assert time.monotonic() - started < 2 + 5


def test_the_start_of_the_decoder_process_counts(mp4: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine it took half a minute, which came on top of the deadline."""
    monkeypatch.setattr(decoder_module, "begin_child", begin_slowly)
    with ClipDecoder(
        SamplingConfig(num_frames=2, size=32), limits=DecodeLimits(deadline_s=2)
    ) as one:
        started = time.monotonic()
        with pytest.raises(VideoDecodeError, match="timeout"):
            one.decode(ClipSpan("first", mp4))
        assert time.monotonic() - started < min(2 + 5, SLOW_START_S)
        assert one.decode(ClipSpan("second", mp4)).frames.shape == (2, 32, 32, 3)


def test_what_hangs_decord_gets_a_try_with_pyav(
    videos_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_module, "decode_file", decord_for_auto)
    source = ClipSpan("midgop", str(videos_dir / "damaged" / "midgop.ts"))
    with ClipDecoder(
        SamplingConfig(num_frames=4, size=32, decoder="auto"), limits=DecodeLimits(deadline_s=20)
    ) as one:
        started = time.monotonic()
        assert one.decode(source).facts.decoder == "pyav"
        assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("number", "position"),
    [
        (signal.SIGSEGV, 0),
        (signal.SIGKILL, 2),
        *(
            pytest.param(number, position, marks=pytest.mark.soak)
            for number, position in (
                (signal.SIGSEGV, 1),
                (signal.SIGSEGV, 2),
                (signal.SIGKILL, 0),
                (signal.SIGKILL, 1),
            )
        ),
    ],
)
def test_a_decoder_that_dies_costs_one_clip_of_many(
    number: int, position: int, videos_dir: Path
) -> None:
    """Clips under way at a time may overtake each other, so the one that hangs comes anywhere."""
    good = str(videos_dir / "good" / "mmaction_demo.mp4")
    hanging = str(videos_dir / "damaged" / "midgop.ts")
    clips = [ClipSpan(str(n), hanging if n == position else good) for n in range(5)]
    sampling = SamplingConfig(num_frames=4, size=32, decoder="decord")
    others = set(multiprocessing.active_children())

    def at_work_on_it() -> list[psutil.Process]:
        children = set(multiprocessing.active_children()) - others
        return [one for child in children if has_open(one := psutil.Process(child.pid), hanging)]

    with (
        ClipDecoder(sampling, limits=DecodeLimits(deadline_s=60)) as one,
        ThreadPoolExecutor(1) as thread,
    ):
        outcomes = thread.submit(lambda: list(one.decode_all(clips)))
        wait_until(at_work_on_it, 55)
        time.sleep(2)  # and the pool knows what its child is at
        (child,) = at_work_on_it()
        child.send_signal(number)
        reasons = [getattr(outcome, "reason", "fine") for outcome in outcomes.result()]
    assert reasons == ["crashed" if n == position else "fine" for n in range(5)]


def test_an_idle_decoder_that_dies_costs_no_clip(videos_dir: Path) -> None:
    good = str(videos_dir / "good" / "mmaction_demo.mp4")
    sampling = SamplingConfig(num_frames=4, size=32)
    others = set(multiprocessing.active_children())
    with ClipDecoder(sampling, limits=DecodeLimits(deadline_s=30)) as one:
        for number in range(3):
            clips = [ClipSpan(f"{number}.{n}", good) for n in range(4)]
            assert [getattr(found, "reason", "fine") for found in one.decode_all(clips)] == [
                "fine"
            ] * 4
            (child,) = set(multiprocessing.active_children()) - others
            assert not has_open(psutil.Process(child.pid), good)
            child.kill()
            time.sleep(0.5)  # the pool may notice before the next clip comes, or after


def test_a_clip_that_a_breaking_pool_forgets_is_given_to_another(
    mp4: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ProcessPool] = []

    class Forgetful(ProcessPool):
        def schedule(self, *args: Any, **settings: Any) -> ProcessFuture:
            asked.append(self)
            if len(asked) != 2:
                return super().schedule(*args, **settings)
            self.stop()
            return ProcessFuture()

    monkeypatch.setattr(decoder_module, "ProcessPool", Forgetful)
    with ClipDecoder(
        SamplingConfig(num_frames=2, size=32), limits=DecodeLimits(deadline_s=60)
    ) as one:
        first = one.decode(ClipSpan("a", mp4))
        assert np.array_equal(one.decode(ClipSpan("b", mp4)).frames, first.frames)
    assert asked[0] is asked[1]
    assert asked[1] is not asked[2]


def test_memory_beyond_the_limit_costs_one_clip(tmp_path: Path, mp4: str) -> None:
    large = tmp_path / "large.mp4"
    with av.open(str(large), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 4096, 2160, "yuv420p"
        image = np.zeros((2160, 4096, 3), dtype=np.uint8)
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    sampling = SamplingConfig(num_frames=2, size=32)
    with ClipDecoder(sampling, limits=DecodeLimits(memory_limit_bytes=24 * 1024**2)) as one:
        assert one.decode(ClipSpan("a", mp4)).frames.shape == (2, 32, 32, 3)
        with pytest.raises(VideoDecodeError) as caught:
            one.decode(ClipSpan("large", str(large)))
        assert caught.value.reason in ("out_of_memory", "crashed")
        assert one.decode(ClipSpan("a", mp4)).frames.shape == (2, 32, 32, 3)
    with ClipDecoder(sampling) as one:
        assert one.decode(ClipSpan("large", str(large))).frames.shape == (2, 32, 32, 3)


def test_a_file_with_too_many_bytes_is_not_decoded(mp4: str) -> None:
    with (
        ClipDecoder(SamplingConfig(num_frames=6), limits=DecodeLimits(max_bytes=100)) as small,
        pytest.raises(VideoDecodeError, match="too_large: the file has"),
    ):
        small.decode(ClipSpan("a", mp4))


@pytest.fixture
def mp4(tmp_path: Path) -> str:
    path = tmp_path / "a.mp4"
    frames = render.render(scenes.all_scenes()[0], np.random.default_rng(0))
    path.write_bytes(render.encode_h264(frames))
    return str(path)


def test_a_span_of_a_video_gives_frames_of_that_span(auto: ClipDecoder, mp4: str) -> None:
    decoded = auto.decode(ClipSpan("a", mp4, 0.5, 1.0))
    assert decoded.frame_indices == [6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("name", ["decord", "pyav"])
def test_both_decoders_give_the_same_frames(name: str, auto: ClipDecoder, mp4: str) -> None:
    with decoder(decoder=name) as one:
        frames = one.decode(ClipSpan("a", mp4))
    assert frames.facts.decoder == name
    other = auto.decode(ClipSpan("a", mp4)).frames.astype(int)
    assert np.abs(frames.frames - other).mean() < 2


def test_a_crop_keeps_the_aspect_ratio(videos_dir: Path) -> None:
    path = videos_dir / "good" / "made_webvid_like_596x336_gop250.mp4"
    with decoder(resize="crop") as cropping, decoder() as squashing:
        cropped = cropping.decode(ClipSpan("a", str(path))).frames
        squashed = squashing.decode(ClipSpan("a", str(path))).frames
    assert cropped.shape == squashed.shape
    assert np.abs(cropped.astype(int) - squashed).mean() > 1


def test_a_video_with_too_many_pixels_is_not_decoded(mp4: str) -> None:
    sampling = SamplingConfig(num_frames=6)
    small = ClipDecoder(sampling, limits=DecodeLimits(max_pixels=96 * 95))
    with small, pytest.raises(VideoDecodeError, match="too_large: the frames have 96x96"):
        small.decode(ClipSpan("a", mp4))


def test_a_title_in_another_encoding_does_not_matter(auto: ClipDecoder, tmp_path: Path) -> None:
    (scene,) = dataset.plan_videos(num_train=1, num_val=1, seed=0)["train"]
    dataset.write_videos({"id": np.array([0])}, str(tmp_path), [scene])
    (path,) = tmp_path.rglob("*.mp4")
    title = b"\xe4\xf6\xfc latin-1"
    data = b"".join([(len(title) + 16).to_bytes(4, "big"), b"data", bytes([0, 0, 0, 1]), bytes(4)])
    name = _box(b"\xa9nam", data + title)
    handler = _box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    meta = _box(b"meta", bytes(4) + handler + _box(b"ilst", name))
    titled = tmp_path / "titled.mp4"
    titled.write_bytes(_with_user_data(path.read_bytes(), _box(b"udta", meta)))
    plain = auto.decode(ClipSpan("plain", str(path)))
    assert np.array_equal(auto.decode(ClipSpan("titled", str(titled))).frames, plain.frames)


def _box(kind: bytes, payload: bytes) -> bytes:
    return (len(payload) + 8).to_bytes(4, "big") + kind + payload


def _with_user_data(mp4: bytes, user_data: bytes) -> bytes:
    """The same file with a box at the end of its `moov`, which must be the last box."""
    at = mp4.rindex(b"moov") - 4
    size = int.from_bytes(mp4[at : at + 4], "big")
    assert at + size == len(mp4)
    return mp4[:at] + (size + len(user_data)).to_bytes(4, "big") + mp4[at + 4 :] + user_data


def test_a_span_follows_the_time_stamps_of_a_variable_rate(
    auto: ClipDecoder, videos_dir: Path
) -> None:
    path = str(videos_dir / "good" / "made_vfr_320x240.mp4")
    with av.open(path) as container:
        times = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
    shown = np.array(times) - times[0]
    by_rate = shown * len(shown) / shown[-1]
    first = int(np.abs(by_rate - np.arange(len(shown))).argmax())
    assert abs(by_rate[first] - first) > 3, "the rate alone gives other frames here"
    found = auto.decode(ClipSpan("a", path, shown[first], shown[first] + 1.0)).frame_indices
    last = int(np.searchsorted(shown, shown[first] + 1.0)) - 1
    assert found[0] == first
    assert first < found[-1] <= last


def test_strange_requests_get_a_reason(auto: ClipDecoder, videos_dir: Path) -> None:
    good = str(sorted((videos_dir / "good").glob("*.mp4"))[0])
    asked = {
        "missing": ("/" + 300 * "x" + ".mp4", None, None),
        "empty_span": (good, 10_000.0, 10_010.0),
    }
    for reason, (path, start, end) in asked.items():
        with pytest.raises(VideoDecodeError) as caught:
            auto.decode(ClipSpan("x", path, start, end))
        assert caught.value.reason == reason
    with pytest.raises(VideoDecodeError, match="there is no frame from 1.5 s to 1 s"):
        auto.decode(ClipSpan("x", good, 1.5, 1.0))


ENDINGS = {".avi", ".flv", ".mkv", ".mov", ".mp4", ".mpg", ".ts", ".webm", ".webp"}


def test_auto_shows_the_frames_of_pyav_or_leaves_decord(videos_dir: Path, cases_dir: Path) -> None:
    """On every file there is; decord scales differently by up to five gray levels."""
    paths = [
        path
        for folder in (videos_dir, cases_dir)
        for path in sorted(folder.rglob("*"))
        if path.suffix in ENDINGS
    ]
    assert len(paths) > 50
    different, decoders = {}, set()
    with decoder(decoder="auto") as auto, decoder(decoder="pyav") as exact:
        outcomes = zip(
            auto.decode_all(ClipSpan("x", str(path)) for path in paths),
            exact.decode_all(ClipSpan("x", str(path)) for path in paths),
            paths,
            strict=True,
        )
        for found, right, path in outcomes:
            if isinstance(found, VideoDecodeError) or isinstance(right, VideoDecodeError):
                if str(found) != str(right):
                    different[path] = (found, right)
                continue
            decoders.add(found.facts.decoder)
            off = np.abs(found.frames.astype(int) - right.frames).mean(axis=(1, 2, 3)).max()
            facts = replace(found.facts, decoder=right.facts.decoder)
            if off >= 6 or facts != right.facts or found.frame_indices != right.frame_indices:
                different[path] = (off, found.facts, right.facts)
    assert different == {}
    assert decoders == {"decord", "pyav", "pillow"}
