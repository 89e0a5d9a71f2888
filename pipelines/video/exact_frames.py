"""Decodes frames of a video by their exact index with PyAV.

First, all packets of the video stream are indexed without decoding. If the timestamps can be
trusted, each requested frame is decoded from the preceding key frame, skipping pictures that no
other picture refers to. Otherwise, or if that misses a frame, the file is decoded from the
beginning. Decoders stop at the first error. If one occurs while decoding from the beginning, the
file counts as damaged and is decoded once more, skipping the broken parts.

Legend: N displayed frames of a video, numbered from 0 in display order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream

TRUSTED = frozenset({"mov", "mp4", "matroska", "webm"})
"""Containers whose timestamps give the order of frames. AVI has no timestamps, and MPEG streams may
start anywhere."""
MP4 = frozenset({"mov", "mp4"})
WITHOUT_TIMES = frozenset({"avi"})
"""Containers without usable timestamps."""
PLAYLISTS = frozenset({"concat", "hls", "dash"})
"""Formats that are not videos but refer to other files, which must not be opened through them."""
CUT_SHORT_S, CUT_SHORT_SHARE = 1.0, 0.05
"""A file counts as cut short if more than this is missing at the end, in seconds and as a share of
the duration that the file declares."""
H264_IDR = 5
SKIPPING = frozenset({"h264", "hevc", "mpeg4"})
"""Codecs for which skipping unreferenced pictures was verified not to change other pictures."""
DEFAULT_FPS = 25.0

Convert = Callable[[av.VideoFrame], npt.NDArray[np.uint8]]


class NoVideoError(Exception):
    """The file has no decodable video stream; `has_stream` is whether it has one at all."""

    def __init__(self, message: str, has_stream: bool) -> None:
        super().__init__(message)
        self.has_stream = has_stream


@dataclass(frozen=True)
class VideoIndex:
    """What a container declares about its video stream."""

    width: int
    height: int
    fps: float
    codec: str
    num_frames: int
    """Number of displayed frames that the container lists."""
    broken_tail: bool
    """Whether the end of the file is missing."""
    containers: frozenset[str]
    pts: npt.NDArray[np.int64]
    """[N] timestamps of displayed frames, ascending; empty if they cannot be trusted."""
    shown_s: npt.NDArray[np.float64]
    """[N] display time of each frame, starting at 0 s; from the frame rate if timestamps are
    unusable."""
    clean_cuts: bool
    """Whether there is only one video stream, and no frame refers across a key frame."""
    key_pts: npt.NDArray[np.int64]
    """Timestamps of key frames, ascending; empty if they cannot be trusted."""

    @property
    def duration_s(self) -> float:
        """Total display time of the frames."""
        return round(float(self.shown_s[-1]) + 1 / self.fps, 6)

    def span(self, start_s: float | None, end_s: float | None) -> tuple[int, int]:
        """Return the first frame at or after start_s and the first at or after end_s."""
        tolerance = 0.25 / self.fps  # annotated times are rounded
        first, stop = 0, self.num_frames
        if start_s is not None:
            first = int(np.searchsorted(self.shown_s, start_s - tolerance))
        if end_s is not None:
            stop = int(np.searchsorted(self.shown_s, end_s - tolerance))
        return first, stop


@dataclass(frozen=True)
class Frames:
    """The requested frames that could be decoded."""

    taken: dict[int, npt.NDArray[np.uint8]]
    """Converted frames by frame index."""
    num_frames: int
    """Number of displayed frames of the video, as far as they were counted."""
    damaged: bool
    """Whether a packet was broken or a requested frame is missing."""


def open_video(path: str) -> InputContainer:
    """Open a video file, whatever the encoding of its metadata."""
    return av.open(path, metadata_errors="replace")


@contextmanager
def _opened(path: str, strict: bool = True) -> Iterator[tuple[InputContainer, VideoStream]]:
    with open_video(path) as container:
        if container.format.name in PLAYLISTS:
            raise NoVideoError("the file is a playlist", has_stream=False)
        stream = _stream(container)
        stream.codec_context.thread_count = 1
        if strict:
            stream.codec_context.options = {"err_detect": "explode"}
        yield container, stream


def _video_streams(container: InputContainer) -> list[VideoStream]:
    return [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]


def _stream(container: InputContainer) -> VideoStream:
    found = _video_streams(container)
    if not found:
        raise NoVideoError("the file has no video stream", has_stream=False)
    best = container.streams.best("video")
    stream = best if isinstance(best, VideoStream) and best in found else found[0]
    if stream.codec_context is None:
        raise NoVideoError("the video stream's codec is unknown", has_stream=True)
    return stream


@dataclass
class _Packets:
    """Properties collected while reading a file's packets."""

    pts: list[int | None] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    reordered: bool = False
    """Whether the display time of a packet differs from its decoding time."""
    clean_cuts: bool = True
    broken_tail: bool = False

    def add(self, packet: av.Packet, codec: str, nal_length: int | None) -> None:
        """Record a displayed packet."""
        self.pts.append(packet.pts)
        self.reordered = self.reordered or packet.pts != packet.dts
        if packet.pts is None:
            return
        if packet.is_keyframe:
            self.keys.append(packet.pts)
            if codec == "h264" and not _has_idr(bytes(packet), nal_length):
                self.clean_cuts = False
        elif self.keys and packet.pts < self.keys[-1]:
            self.clean_cuts = False


def read_index(path: str) -> VideoIndex:
    """Index the video stream of a file without decoding it.

    Raises:
        NoVideoError: The file has no video stream, or the stream is empty or has no known codec.
        FFmpegError: FFmpeg cannot open the file.
    """
    with _opened(path) as (container, stream):
        context = stream.codec_context
        nal_length = _nal_length(context.extradata)
        packets = _Packets()
        try:
            for packet in container.demux(stream):
                if packet.size == 0 or packet.is_discard:
                    continue
                if not _is_hidden(packet, context.name):
                    packets.add(packet, context.name, nal_length)
        except FFmpegError:
            packets.broken_tail = True  # the packets before the error can still be decoded
        if not packets.pts:
            raise NoVideoError("the video stream is empty", has_stream=True)
        containers = frozenset(container.format.name.split(","))
        fps = float(stream.average_rate or stream.guessed_rate or 0) or DEFAULT_FPS
        known = sorted(pts for pts in packets.pts if pts is not None)
        complete = len(set(known)) == len(packets.pts)
        # Timestamps that were copied from decoding times do not give the order of B-frames.
        in_order = packets.reordered or not context.has_b_frames
        trusted = bool(containers & TRUSTED) and complete and in_order
        if complete and not containers & WITHOUT_TIMES:
            ticks = np.array(known, dtype=np.float64) - known[0]
            shown_s = ticks * float(stream.time_base or 0)
        else:
            shown_s = np.arange(len(packets.pts)) / fps
        return VideoIndex(
            width=context.width,
            height=context.height,
            fps=fps,
            codec=context.name,
            num_frames=len(packets.pts),
            broken_tail=packets.broken_tail
            or _is_cut_short(path, container, stream, float(shown_s[-1]) + 1 / fps),
            containers=containers,
            pts=np.array(known if trusted else [], dtype=np.int64),
            shown_s=shown_s,
            clean_cuts=packets.clean_cuts
            and len(_video_streams(container)) == 1
            and (not known or known[0] >= 0),
            key_pts=np.array(sorted(packets.keys) if trusted else [], dtype=np.int64),
        )


def _is_cut_short(path: str, container: InputContainer, stream: VideoStream, end_s: float) -> bool:
    """Return whether a file ends before the end that its headers declare."""
    if frozenset(container.format.name.split(",")) & MP4:
        size_bytes = Path(path).stat().st_size
        return any(entry.pos + entry.size > size_bytes for entry in stream.index_entries)
    claimed_s = 0.0
    if stream.duration is not None and stream.time_base is not None:
        claimed_s = float(stream.duration * stream.time_base)
    elif container.duration is not None and len(container.streams) == 1:
        claimed_s = container.duration / av.time_base
    return claimed_s - end_s > max(CUT_SHORT_S, CUT_SHORT_SHARE * claimed_s)


def _nal_length(extradata: bytes | None) -> int | None:
    """Return how many bytes hold an H.264 unit's length (ISO 14496-15); None for start codes."""
    return (
        (extradata[4] & 3) + 1 if extradata and len(extradata) > 4 and extradata[0] == 1 else None
    )


def _has_idr(data: bytes, nal_length: int | None) -> bool:
    """Return whether an H.264 packet contains an IDR picture, a point to start decoding from."""
    if nal_length is None:
        units = data.split(b"\x00\x00\x01")[1:]
        return any(unit[:1] and unit[0] & 0x1F == H264_IDR for unit in units)
    place = 0
    while place + nal_length < len(data):
        size = int.from_bytes(data[place : place + nal_length], "big")
        if data[place + nal_length] & 0x1F == H264_IDR:
            return True
        place += nal_length + size
    return False


def _is_hidden(packet: av.Packet, codec: str) -> bool:
    """Return whether a packet contains a picture that is only a reference and never displayed.

    VP8 marks such packets in bit 4 of the frame tag (RFC 6386, section 9.1).
    """
    return codec == "vp8" and not (bytes(packet)[0] >> 4) & 1


def frames_at(path: str, index: VideoIndex, wanted: Sequence[int], convert: Convert) -> Frames:
    """Decode the frames with the given indices.

    Args:
        path: the file.
        index: its index.
        wanted: frame indices, each below index.num_frames.
        convert: converts a decoded frame to an array; called only for the requested frames.

    Returns:
        The frames that could be decoded, which are all of them unless the file is damaged.
    """
    numbers = sorted(set(wanted))
    if len(index.key_pts):
        taken = _by_seeking(path, index, numbers, convert)
        if taken is not None:
            return Frames(taken, index.num_frames, damaged=index.broken_tail)
    found = _in_order(path, index, numbers, convert, strict=True)
    if found is None:
        found = _in_order(path, index, numbers, convert, strict=False)
        assert found is not None
        return replace(found, damaged=True)
    return found


def _by_seeking(
    path: str, index: VideoIndex, numbers: list[int], convert: Convert
) -> dict[int, npt.NDArray[np.uint8]] | None:
    """Decode each frame from the preceding key frame; return None if one cannot be found."""
    number_of = {int(index.pts[number]): number for number in numbers}
    before = np.searchsorted(index.key_pts, index.pts[numbers], side="right") - 1
    if before[0] < 0:
        return None  # displayed before the first key frame
    taken: dict[int, npt.NDArray[np.uint8]] = {}
    with _opened(path) as (container, stream):
        for key in np.unique(before):
            needed = {int(pts) for pts in index.pts[numbers][before == key]}
            key_pts, begun = int(index.key_pts[key]), False
            try:
                container.seek(key_pts, stream=stream)
                for frame in _until_fed(container, stream, needed, key_pts):
                    # With intra refresh, a packet is marked as a key frame but its picture is not
                    # complete: the decoder returns it late and wrong.
                    begun = begun or (frame.pts == key_pts and bool(frame.key_frame))
                    if frame.pts in needed:
                        if frame.is_corrupt or not begun:
                            return None
                        needed.discard(frame.pts)
                        taken[number_of[frame.pts]] = convert(frame)
                    if not needed:
                        break
            except FFmpegError:
                return None
            if needed:
                return None
    return taken


def _until_fed(
    container: InputContainer, stream: VideoStream, needed: set[int], key_pts: int
) -> Iterator[av.VideoFrame]:
    """Iterate over frames from a key frame on, until all needed timestamps have been decoded.

    Yields nothing if seeking reached neither the key frame nor a packet before it.
    """
    context = stream.codec_context
    context.flush_buffers()
    skips = context.name in SKIPPING
    unfed, first = set(needed), True
    for packet in container.demux(stream):
        if first and (packet.pts is None or packet.pts > key_pts):
            return
        first = False
        if skips:
            wanted = packet.size == 0 or packet.pts in needed
            context.skip_frame = "DEFAULT" if wanted else "NONREF"
        yield from packet.decode()
        unfed.discard(packet.pts)
        if not unfed:
            # Flush the decoder, so that no later packets have to be decoded.
            yield from context.decode(None)
            return


def _in_order(
    path: str, index: VideoIndex, numbers: list[int], convert: Convert, strict: bool
) -> Frames | None:
    """Decode from the beginning; if strict, return None at the first error."""
    taken: dict[int, npt.NDArray[np.uint8]] = {}
    missing = set(numbers)
    counted = 0
    for frame in _every_frame(path, strict):
        if frame is None or frame.is_corrupt:
            if strict:
                return None
            if frame is None:
                continue
        number = _number(frame, index, counted)
        counted += 1
        if number in missing:
            missing.discard(number)
            taken[number] = convert(frame)
        if number is not None and number >= numbers[-1]:
            break
    else:
        if strict and missing:
            return None
        if not len(index.pts) and missing:
            return Frames(taken, max(counted, 1), damaged=True)
    return Frames(taken, index.num_frames, damaged=index.broken_tail)


def _number(frame: av.VideoFrame, index: VideoIndex, counted: int) -> int | None:
    """Return the index of a frame, from its timestamp if those can be trusted, else by counting."""
    if not len(index.pts):
        return counted
    if frame.pts is None:
        return None
    place = int(np.searchsorted(index.pts, frame.pts))
    return place if place < len(index.pts) and index.pts[place] == frame.pts else None


def _every_frame(path: str, strict: bool) -> Iterator[av.VideoFrame | None]:
    """Iterate over all frames from the first; None stands for a broken packet."""
    with _opened(path, strict) as (container, stream):
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except FFmpegError:
                yield None
                return  # the rest of the file is missing; earlier frames have been yielded
            try:
                frames = packet.decode()
            except MemoryError:
                raise
            except FFmpegError:
                yield None
                continue
            yield from frames
