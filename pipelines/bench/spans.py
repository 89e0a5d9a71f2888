"""Speed of decoding many spans of one long video, against PyAV's bare seek-and-decode.

Both decode 16 frames of each of 30 spans of 6 s from a one-hour video in this process, with one
thread. Ours starts without an index of the file and makes it on the way.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np
import numpy.typing as npt

from pipelines.bench.harness import Row, median_seconds, smaller
from pipelines.bench.videos import make_video
from pipelines.video.child import Decoded, DecodeRequest, decode_file

logger = logging.getLogger(__name__)

HOUR_S = 3600.0
PART_S = 20.0
"""Duration of the video that is repeated, in seconds."""
GOP = 250
SPANS, SPAN_S = 30, 6.0
FRAMES, SIZE = 16, 224

Frames = npt.NDArray[np.uint8]


def repeat_video(part: Path, target: Path, seconds: float) -> Path:
    """Write a video that shows another one again and again, without encoding it again.

    Args:
        part: The .mp4 file to repeat; it begins with a key frame that nothing refers across.
        target: The file to write.
        seconds: Minimum duration, in seconds.
    """
    with av.open(str(part)) as source, av.open(str(target), "w") as container:
        template = source.streams.video[0]
        assert template.time_base is not None
        stream = container.add_stream_from_template(template)
        packets = [packet for packet in source.demux(template) if packet.size]
        times = [(packet.pts, packet.dts) for packet in packets]
        ticks = sum(packet.duration or 0 for packet in packets)
        for number in itertools.count():
            if number * ticks * template.time_base >= Fraction(seconds):
                break
            for packet, (pts, dts) in zip(packets, times, strict=True):
                assert pts is not None
                assert dts is not None
                packet.pts, packet.dts = pts + number * ticks, dts + number * ticks
                packet.time_base, packet.stream = template.time_base, stream
                container.mux(packet)
                packet.stream = template
    return target


def request(path: Path, start_s: float, index_folder: str) -> DecodeRequest:
    """Return the request for our decoder."""
    return DecodeRequest(
        path=str(path),
        start_s=start_s,
        end_s=start_s + SPAN_S,
        num_frames=FRAMES,
        frame_choice="uniform",
        size=SIZE,
        resize="squash",
        decoder="pyav",
        max_pixels=10**9,
        max_bytes=10**12,
        index_folder=index_folder,
    )


def ours(path: Path, starts_s: list[float], index_folder: str) -> list[Frames]:
    """Decode the spans with our decoder, in this process."""
    found = []
    for start_s in starts_s:
        decoded = decode_file(request(path, start_s, index_folder))
        assert isinstance(decoded, Decoded), decoded
        found.append(decoded.frames)
    return found


def by_pyav(path: Path, starts_s: list[float]) -> list[Frames]:
    """Decode the spans with PyAV: seek to the start, and decode up to the last frame needed."""
    found = []
    for start_s in starts_s:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            rate, base = stream.average_rate, stream.time_base
            assert rate is not None
            assert base is not None
            first = round(start_s * rate)
            count = round(SPAN_S * rate)
            steps = np.arange(FRAMES) * count // FRAMES
            wanted = {round((first + int(step)) / rate / base) for step in steps}
            container.seek(min(wanted), stream=stream)
            images = []
            for frame in container.decode(stream):
                if frame.pts in wanted:
                    image = frame.reformat(SIZE, SIZE, "rgb24", interpolation="BICUBIC")
                    images.append(image.to_ndarray().astype(np.uint8, copy=False))
                if len(images) == FRAMES:
                    break
            found.append(np.stack(images))
    return found


def measure(device: str, repeats: int) -> list[Row]:
    """Measure the time for all spans, with a new index of the video each time."""
    del device
    with TemporaryDirectory() as folder:
        logger.info("writing a video of one hour")
        part = make_video(Path(folder) / "part.mp4", PART_S, GOP, seed=0)
        path = repeat_video(part, Path(folder) / "hour.mp4", HOUR_S)
        starts_s = np.linspace(0, HOUR_S - SPAN_S - PART_S, SPANS).round().tolist()
        number = itertools.count()

        def anew() -> list[Frames]:
            return ours(path, starts_s, str(Path(folder) / f"indexes{next(number)}"))

        for mine, other in zip(anew(), by_pyav(path, starts_s), strict=True):
            assert np.array_equal(mine, other), "the decoders return different frames"
        works: dict[str, Callable[[], list[Frames]]] = {
            "ours": anew,
            "pyav": lambda: by_pyav(path, starts_s),
        }
        seconds = median_seconds(works, "cpu", repeats, warm=True)
    return [smaller("spans", "s", seconds["ours"], seconds["pyav"])]
