"""Frames by their number in files that lead decoders astray, beside a decode of the whole file."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.container import InputContainer

from pipelines.video import exact_frames
from pipelines.video.child import Decoded, DecodeRequest, Failure, decode_file

FRAMES, WIDTH, HEIGHT = 72, 96, 64
Make = Callable[[Path], Path]


def pictures(seed: int = 0) -> list[np.ndarray]:
    """Frames of which no two are alike, with something that moves."""
    generator = np.random.default_rng(seed)
    ground = generator.integers(0, 255, (HEIGHT, WIDTH + 2 * FRAMES, 3), dtype=np.uint8)
    ground = ground.repeat(4, axis=0)[:HEIGHT].repeat(4, axis=1)[:, : WIDTH + 2 * FRAMES]
    return [np.ascontiguousarray(ground[:, 2 * n : 2 * n + WIDTH]) for n in range(FRAMES)]


def encode(path: Path, codec: str, *streams: list[np.ndarray], **options: str) -> Path:
    with av.open(str(path), "w") as container:
        made = []
        for _ in streams:
            stream = container.add_stream(codec, rate=24)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            stream.options = options
            made.append(stream)
        for images in zip(*streams, strict=True):
            for stream, image in zip(made, images, strict=True):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for stream in made:
            container.mux(stream.encode(None))
    return path


def h264(folder: Path, name: str, parameters: str) -> Path:
    return encode(folder / name, "libx264", pictures(), **{"x264-params": parameters})


def mpeg4_with_copied_times(folder: Path) -> Path:
    """B-frames whose time stamps are those of decoding, as a copy out of an AVI leaves them."""
    plain = encode(folder / "plain.mp4", "mpeg4", pictures(), g="12", bf="2")
    copied = folder / "copied.mp4"
    with av.open(str(plain)) as source, av.open(str(copied), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                packet.dts = packet.pts = number * 512
                packet.stream = stream
                target.mux(packet)
    return copied


def cut(whole: Path, target: Path, first: int) -> Path:
    """Leave out the beginning of a transport stream, up to the packet of a frame."""
    with av.open(str(whole)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    assert positions[first] is not None
    data = whole.read_bytes()
    # The tables of the program come first, in three packets of 188 bytes.
    target.write_bytes(data[: 3 * 188] + data[positions[first] :])
    return target


FILES: dict[str, Make] = {
    "open GOP, mp4": lambda f: h264(f, "a.mp4", "open-gop=1:keyint=20:bframes=3:scenecut=0"),
    "open GOP, mkv": lambda f: h264(f, "a.mkv", "open-gop=1:keyint=20:bframes=3:scenecut=0"),
    "pyramid": lambda f: h264(f, "a.mp4", "keyint=50:bframes=7:b-pyramid=normal:ref=8"),
    "intra refresh": lambda f: h264(f, "a.mp4", "intra-refresh=1:keyint=20:bframes=0"),
    "MPEG-4, AVI": lambda f: encode(f / "a.avi", "mpeg4", pictures(), g="12", bf="2"),
    "MPEG-4, copied times": mpeg4_with_copied_times,
    "VP8 with hidden frames": lambda f: encode(
        f / "a.webm", "libvpx", pictures(), **{"auto-alt-ref": "1", "lag-in-frames": "16"}
    ),
    "transport stream": lambda f: h264(f, "a.ts", "keyint=30:bframes=3"),
    "transport stream, open GOP": lambda f: h264(
        f, "a.ts", "open-gop=1:keyint=20:bframes=3:scenecut=0"
    ),
    "transport stream, MPEG-2": lambda f: encode(
        f / "a.ts", "mpeg2video", pictures(), g="12", bf="2"
    ),
    "transport stream, started late": lambda f: cut(
        h264(f, "whole.ts", "keyint=30:bframes=3"), f / "a.ts", 24
    ),
    "Flash video": lambda f: h264(f, "a.flv", "keyint=30:bframes=3"),
    "two streams": lambda f: encode(f / "a.mp4", "libx264", pictures(0), pictures(1)),
}


def every_frame(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        assert stream is not None
        return [
            frame.reformat(64, 64, "rgb24", interpolation="BICUBIC").to_ndarray()
            for frame in container.decode(stream)
        ]


def decoded(path: Path, **changes: object) -> Decoded | Failure:
    values = {
        "path": str(path), "num_frames": 12, "frame_choice": "random", "size": 64,
        "resize": "squash", "decoder": "pyav", "max_pixels": 10**9, "max_bytes": 10**12,
    }  # fmt: skip
    return decode_file(DecodeRequest(**{**values, **changes}))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["pyav", "auto"])
@pytest.mark.parametrize("kind", FILES)
def test_a_frame_is_what_the_whole_file_shows_at_its_place(
    kind: str, decoder: str, tmp_path: Path
) -> None:
    path = FILES[kind](tmp_path)
    truth = every_frame(path)
    assert len(truth) == FRAMES or "started late" in kind
    for seed in range(4):
        found = decoded(path, seed=(seed,), decoder=decoder)
        assert isinstance(found, Decoded), found
        if "started late" not in kind:  # which frames can be decoded shows only at the end
            assert found.facts.num_source_frames == FRAMES
        for number, frame in zip(found.frame_indices, found.frames, strict=True):
            off = np.abs(frame.astype(int) - truth[number]).mean()
            nearest = int(np.argmin([np.abs(frame.astype(int) - other).mean() for other in truth]))
            assert nearest == number
            if found.facts.decoder == "pyav":  # decord scales a little differently
                assert off == 0
        if kind not in ("intra refresh", "transport stream, started late"):
            assert not found.facts.salvaged


def test_bit_errors_are_noticed(tmp_path: Path) -> None:
    path = h264(tmp_path, "a.mp4", "keyint=50:bframes=3")
    assert not decoded(path).facts.salvaged  # type: ignore[union-attr]
    data = bytearray(path.read_bytes())
    generator = np.random.default_rng(0)
    start = data.index(b"mdat") + len(data) // 3
    for place in range(start, start + 40):
        data[place] = int(generator.integers(0, 256))
    path.write_bytes(data)
    found = decoded(path)
    assert isinstance(found, Decoded)
    assert found.facts.salvaged


def test_auto_marks_a_damaged_key_frame_and_shows_what_pyav_shows(tmp_path: Path) -> None:
    """Decord conceals the damage, up to a hundred gray levels off, without a word."""
    path = h264(tmp_path, "a.mp4", "keyint=12:min-keyint=12:bframes=2:scenecut=0")
    with av.open(str(path)) as container:
        keys = [packet for packet in container.demux(video=0) if packet.is_keyframe and packet.size]
        places = [(packet.pos, packet.size) for packet in keys]
    data = bytearray(path.read_bytes())
    generator = np.random.default_rng(1)
    for position, size in places[2:4]:
        assert position is not None
        for place in range(position + size // 3, position + size // 3 + 60):
            data[place] = int(generator.integers(0, 256))
    path.write_bytes(data)
    wanted = {"start_s": 1.0, "end_s": 2.0, "frame_choice": "uniform"}
    right, found = decoded(path, **wanted), decoded(path, decoder="auto", **wanted)
    assert isinstance(right, Decoded)
    assert isinstance(found, Decoded)
    assert right.facts.salvaged
    assert found.facts == right.facts
    assert np.array_equal(found.frames, right.frames)


def test_a_file_cut_short_is_noticed(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.avi", "mpeg4", pictures(), g="12")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = decoded(path)
    assert isinstance(found, Decoded)
    assert found.facts.salvaged
    assert found.facts.num_source_frames < FRAMES


def test_a_mirrored_video_is_shown_mirrored(tmp_path: Path) -> None:
    path = h264(tmp_path, "a.mp4", "keyint=50")
    plain = decoded(path)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 36
    one = 1 << 16
    data[matrix : matrix + 36] = struct.pack(">9i", -one, 0, 0, 0, one, 0, WIDTH << 16, 0, 1 << 30)
    path.write_bytes(data)
    mirrored = decoded(path)
    assert isinstance(plain, Decoded)
    assert isinstance(mirrored, Decoded)
    assert np.abs(mirrored.frames[:, :, ::-1].astype(int) - plain.frames).mean() < 3
    assert np.abs(mirrored.frames.astype(int) - plain.frames).mean() > 20


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"ffconcat version 1.0\nfile other.mp4\n", "not_a_video"),
        (b"#EXTM3U\nother.ts\n", "not_a_video"),
        (b'<?xml version="1.0"?><Error/>', "not_a_video"),
    ],
)
def test_a_list_or_a_page_is_no_video(content: bytes, reason: str, tmp_path: Path) -> None:
    h264(tmp_path, "other.mp4", "keyint=50")
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    found = decoded(path)
    assert isinstance(found, Failure)
    assert found.reason == reason


def test_a_path_that_can_be_none_is_missing() -> None:
    found = decoded(Path("a\0b.mp4"))
    assert isinstance(found, Failure)
    assert found.reason == "missing"


class Watched:
    """An open container that counts how often it is sought in."""

    def __init__(self, container: InputContainer) -> None:
        self._container = container
        self.seeks = 0

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *error: object) -> None:
        self._container.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def seek(self, *args: Any, **settings: Any) -> None:
        self.seeks += 1
        self._container.seek(*args, **settings)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.flv"])
def test_most_files_are_reached_by_seeking(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = h264(tmp_path, name, "keyint=12:bframes=3:scenecut=0")
    index = exact_frames.read_index(str(path))
    assert len(index.key_pts) == FRAMES // 12
    assert index.clean_cuts
    open_video, opened = exact_frames.open_video, []

    def watched(path: str) -> Watched:
        opened.append(Watched(open_video(path)))
        return opened[-1]

    monkeypatch.setattr(exact_frames, "open_video", watched)
    found = exact_frames.frames_at(
        str(path), index, [5, 40, 70], lambda frame: np.zeros(1, dtype=np.uint8)
    )
    assert sorted(found.taken) == [5, 40, 70]
    # Three key frames, and no second pass from the beginning of the file.
    assert [one.seeks for one in opened] == [3]
