"""Speed of decoding eight frames of a clip, against direct use of decord, PyAV and torchcodec.

All use one thread to decode 20 s videos (596x336, H.264). They return one random frame from each of
eight equal parts of the video, scaled to 224x224.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
import multiprocessing
import os
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
import numpy.typing as npt

from pipelines.bench.harness import (
    Findings,
    Row,
    faster,
    median_seconds,
    returned_by_child,
    smaller,
    status_bytes,
)
from pipelines.bench.videos import make_videos
from pipelines.video.child import Decoded, DecodeRequest, decode_file
from pipelines.video.config import SamplingConfig
from pipelines.video.decoder import ClipDecoder, ClipSpan
from stgt.inputs.frame_choice import choose_frames

logger = logging.getLogger(__name__)

FRAMES, SIZE = 8, 224
SECONDS = 20.0
VIDEOS = 4
GOPS = (250, 30)
OF_FFMPEG = re.compile(r"(?P<name>lib(?:av|sw)[a-z]+)-[0-9a-f]+\.so\.(?P<major>\d+)[.\d]*")
"""Names of FFmpeg's libraries in PyAV's wheels."""
LIBRARY_PATH = "LD_LIBRARY_PATH"
EARLY_CLIPS, MANY_CLIPS = 200, 2000
LEAST_REPEATS = 5
"""Speed is the median of at least this many runs, because a clip takes a tenth of a second."""

SEED = (0,)
CALLS = itertools.count()

Frames = npt.NDArray[np.uint8]


def request(path: Path) -> DecodeRequest:
    """Return the request for our decoder."""
    return DecodeRequest(
        path=str(path),
        identity=str(next(CALLS)),  # so that the file is indexed for every clip
        num_frames=FRAMES,
        frame_choice="random",
        seed=SEED,
        size=SIZE,
        resize="squash",
        decoder="pyav",
        max_pixels=10**9,
        max_bytes=10**12,
    )


def wanted(num_frames: int) -> list[int]:
    """Return the indices of the frames that all decoders read."""
    return choose_frames(num_frames, FRAMES, "random", np.random.default_rng(SEED)).tolist()


def ours(path: Path) -> Frames:
    """Decode with our decoder, in this process."""
    decoded = decode_file(request(path))
    assert isinstance(decoded, Decoded), decoded
    return decoded.frames


def by_decord(path: Path) -> Frames:
    """Decode with decord, which scales while decoding."""
    import decord

    reader = decord.VideoReader(str(path), width=SIZE, height=SIZE, num_threads=1)
    return reader.get_batch(wanted(len(reader))).asnumpy()


def _scaled(frame: av.VideoFrame) -> Frames:
    image = frame.reformat(SIZE, SIZE, "rgb24", interpolation="BICUBIC").to_ndarray()
    return image.astype(np.uint8, copy=False)


def by_pyav_in_order(path: Path) -> Frames:
    """Decode with PyAV from the first frame to the last one needed."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        numbers = wanted(stream.frames)
        found = []
        for number, frame in enumerate(container.decode(stream)):
            if number in numbers:
                found.append(_scaled(frame))
            if number >= numbers[-1]:
                break
    return np.stack(found)


def by_pyav_seeking(path: Path) -> Frames:
    """Decode with PyAV, seeking to the key frame before each frame needed."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        rate, base = stream.average_rate, stream.time_base
        assert rate is not None
        assert base is not None
        found = []
        for number in wanted(stream.frames):
            pts = round(number / rate / base)
            container.seek(pts, stream=stream)
            for frame in container.decode(stream):
                if frame.pts is not None and frame.pts >= pts:
                    found.append(_scaled(frame))
                    break
    return np.stack(found)


def by_torchcodec(path: Path) -> Frames:
    """Decode with torchcodec in exact mode, and resize with torchvision's antialiasing."""
    import torch
    from torchvision.transforms import v2

    decoders = importlib.import_module("torchcodec.decoders")
    decoder = decoders.VideoDecoder(str(path), num_ffmpeg_threads=1, seek_mode="exact")
    frames = decoder.get_frames_at(wanted(len(decoder))).data
    with torch.no_grad():
        scaled = v2.functional.resize(frames, [SIZE, SIZE], antialias=True)
    return scaled.permute(0, 2, 3, 1).numpy()


def baselines() -> tuple[dict[str, Callable[[Path], Frames]], tuple[str, ...]]:
    """Return the baselines, and what is missing for the others, in sentences."""
    found: dict[str, Callable[[Path], Frames]] = {
        "decord": by_decord,
        "pyav in order": by_pyav_in_order,
        "pyav seeking": by_pyav_seeking,
    }
    if (missing := _torchcodec_is_missing()) is not None:
        return found, (f"decode was not compared with torchcodec: {missing}",)
    return {**found, "torchcodec": by_torchcodec}, ()


def _torchcodec_is_missing() -> str | None:
    """Return what to install for torchcodec; None if it loads."""
    if importlib.util.find_spec("torchcodec") is None:
        return "it is not installed; run `pip install torchcodec` (the extra `bench`)"
    try:
        importlib.import_module("torchcodec.decoders")
    except (ImportError, OSError, RuntimeError) as error:
        return (
            "it cannot load FFmpeg's libraries, neither those of PyAV nor of the system; install "
            f"them, for example with `apt-get install ffmpeg` ({str(error).splitlines()[0][:120]})"
        )
    return None


def link_ffmpeg(folder: Path) -> None:
    """Make links to the FFmpeg libraries that PyAV brings along, under the names that others seek.

    PyAV's wheels contain FFmpeg, with names that only PyAV knows, such as
    `libavcodec-5e6b81c2.so.62.28.102`; torchcodec needs `libavcodec.so.62`. Both then decode with
    the same FFmpeg, and no other has to be installed.
    """
    libraries = Path(av.__file__).resolve().parent.parent / "av.libs"
    for library in sorted(libraries.iterdir()) if libraries.is_dir() else ():
        if match := OF_FFMPEG.fullmatch(library.name):
            (folder / f"{match['name']}.so.{match['major']}").symlink_to(library)


def measure(device: str, repeats: int) -> Findings:
    """Measure seconds per clip for each kind of video, and memory growth over many clips.

    It runs in a process of its own, which finds PyAV's FFmpeg libraries by their usual names.
    """
    del device
    with TemporaryDirectory() as folder:
        link_ffmpeg(Path(folder))
        path = os.pathsep.join(filter(None, (folder, os.environ.get(LIBRARY_PATH))))
        return returned_by_child(_measure, (repeats,), {LIBRARY_PATH: path})


def _measure(repeats: int) -> Findings:
    import torch

    # The new process has no logging configuration yet.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    theirs, notes = baselines()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    with TemporaryDirectory() as folder:
        for gop in GOPS:
            logger.info("writing %d videos with a key frame every %d frames", VIDEOS, gop)
            videos = make_videos(Path(folder) / str(gop), VIDEOS, SECONDS, gop)
            rows += _speed(gop, videos, theirs, max(repeats, LEAST_REPEATS))
        rows += _memory(make_videos(Path(folder) / "short", VIDEOS, seconds=2.0, gop=250))
    torch.set_num_threads(threads)
    return Findings(rows, notes)


def _speed(
    gop: int, videos: list[Path], theirs: dict[str, Callable[[Path], Frames]], repeats: int
) -> list[Row]:
    for name, decode in theirs.items():
        difference = np.abs(ours(videos[0]).astype(int) - decode(videos[0])).mean()
        assert difference < 4, f"{name} returns other frames: {difference:.1f} gray levels apart"

    def all_of(decode: Callable[[Path], Frames]) -> Callable[[], None]:
        def work() -> None:
            for video in videos:
                decode(video)

        return work

    works = {"ours": all_of(ours), **{name: all_of(decode) for name, decode in theirs.items()}}
    seconds = median_seconds(works, "cpu", repeats)
    per_clip = {name: taken.per(len(videos)) for name, taken in seconds.items()}
    ours_s = per_clip.pop("ours")
    fastest = min(per_clip, key=per_clip.__getitem__)
    logger.info("the fastest baseline with a key frame every %d frames is %s", gop, fastest)
    return [
        faster(f"decode/gop{gop}", ours_s, per_clip[fastest]),
        *(faster(f"decode/gop{gop}/{name}", ours_s, taken) for name, taken in per_clip.items()),
    ]


def _memory(videos: list[Path]) -> list[Row]:
    """Compare the resident memory of the decoder process after many clips and after a few."""
    early = late = 0
    sampling = SamplingConfig(num_frames=FRAMES, size=SIZE)
    with ClipDecoder(sampling, codec="jpeg") as decoder:
        clips = (
            ClipSpan(str(number), str(videos[number % len(videos)])) for number in range(MANY_CLIPS)
        )
        for number, decoded in enumerate(decoder.decode_all(clips), start=1):
            assert isinstance(decoded, Decoded), decoded
            if number == EARLY_CLIPS:
                early = _children_bytes()
            if number % EARLY_CLIPS == 0:
                logger.info("%d of %d clips decoded", number, MANY_CLIPS)
        late = _children_bytes()
    return [smaller("decode/memory", "bytes", late, early)]


def _children_bytes() -> int:
    return sum(
        status_bytes("VmRSS", child.pid) for child in multiprocessing.active_children() if child.pid
    )
