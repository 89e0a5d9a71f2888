"""Frames of a video by their number, exactly, with PyAV.

The container is indexed first: every packet of the video stream, nothing decoded. Where its time
stamps can be trusted, the frames asked for are reached from the key frame before them, and pictures
in between that no other picture refers to are not decoded at all. Elsewhere, and whenever that does
not give every frame, decoding goes from the beginning. Decoders are told to give up at the first
error; only when that happens on the way from the beginning is the file taken for damaged, and
decoded once more, past what is broken.

Legend: N displayed frames of a video, numbered from 0 in the order in which they are shown.
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
"""Containers whose time stamps tell the order of frames. AVI has none, MPEG streams begin anywhere.
"""
MP4 = frozenset({"mov", "mp4"})
WITHOUT_TIMES = frozenset({"avi"})
"""Containers in whose time stamps nothing can be read at all."""
PLAYLISTS = frozenset({"concat", "hls", "dash"})
"""Not videos: they name other files, which must not be read on their behalf."""
CUT_SHORT_S, CUT_SHORT_SHARE = 1.0, 0.05
"""Missing at the end, by the duration that the file claims, before it counts as cut short."""
H264_IDR = 5
SKIPPING = frozenset({"h264", "hevc", "mpeg4"})
"""Codecs in which leaving out unreferenced pictures was shown to change no other one."""
DEFAULT_FPS = 25.0

Convert = Callable[[av.VideoFrame], npt.NDArray[np.uint8]]


class NoVideoError(Exception):
    """The file has no video stream that could be decoded; says whether it has one at all."""

    def __init__(self, message: str, has_stream: bool) -> None:
        super().__init__(message)
        self.has_stream = has_stream


@dataclass(frozen=True)
class VideoIndex:
    """What a container says of its video stream."""

    width: int
    height: int
    fps: float
    codec: str
    num_frames: int
    """Displayed frames that the container lists."""
    broken_tail: bool
    """The file ends in the middle."""
    containers: frozenset[str]
    pts: npt.NDArray[np.int64]
    """[N] time stamps of displayed frames, ascending; empty where they cannot be trusted."""
    shown_s: npt.NDArray[np.float64]
    """[N] when frames are shown, from 0 s on; by the frame rate where nothing better is known."""
    clean_cuts: bool
    """There is one video stream, and no frame refers to anything before the last key frame."""
    key_pts: npt.NDArray[np.int64]
    """Time stamps of key frames, ascending."""

    @property
    def duration_s(self) -> float:
        """How long the frames are shown."""
        return round(float(self.shown_s[-1]) + 1 / self.fps, 6)

    def span(self, start_s: float | None, end_s: float | None) -> tuple[int, int]:
        """First frame shown at or after start_s, and first at or after end_s."""
        tolerance = 0.25 / self.fps  # annotated times are rounded
        first, stop = 0, self.num_frames
        if start_s is not None:
            first = int(np.searchsorted(self.shown_s, start_s - tolerance))
        if end_s is not None:
            stop = int(np.searchsorted(self.shown_s, end_s - tolerance))
        return first, stop


@dataclass(frozen=True)
class Frames:
    """The frames that could be had."""

    taken: dict[int, npt.NDArray[np.uint8]]
    """By number."""
    num_frames: int
    """Displayed frames of the video, as far as they were counted."""
    damaged: bool
    """Some packet was broken, or a frame that was asked for is not there."""


def open_video(path: str) -> InputContainer:
    """Open a file. Titles and comments are not ours to read, whatever their encoding."""
    return av.open(path, metadata_errors="replace")


@contextmanager
def _opened(path: str, strict: bool = True) -> Iterator[tuple[InputContainer, VideoStream]]:
    with open_video(path) as container:
        if container.format.name in PLAYLISTS:
            raise NoVideoError("the file is a list of other files", has_stream=False)
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
        raise NoVideoError("the file holds no video stream", has_stream=False)
    best = container.streams.best("video")
    stream = best if isinstance(best, VideoStream) and best in found else found[0]
    if stream.codec_context is None:
        raise NoVideoError("the video stream's codec is unknown", has_stream=True)
    return stream


@dataclass
class _Packets:
    """What is gathered while a file's packets go by."""

    pts: list[int | None] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    reordered: bool = False
    """Some packet is shown at another time than it is decoded."""
    clean_cuts: bool = True
    broken_tail: bool = False

    def add(self, packet: av.Packet, codec: str, nal_length: int | None) -> None:
        """Take note of a packet that is shown."""
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
    """Index a file.

    Raises:
        NoVideoError: there is no stream, or nothing in it.
        FFmpegError: no demuxer opens the file.
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
            packets.broken_tail = True  # what was counted before it can still be decoded
        if not packets.pts:
            raise NoVideoError("the video stream holds no packets", has_stream=True)
        containers = frozenset(container.format.name.split(","))
        fps = float(stream.average_rate or stream.guessed_rate or 0) or DEFAULT_FPS
        known = sorted(pts for pts in packets.pts if pts is not None)
        complete = len(set(known)) == len(packets.pts)
        # Time stamps that were copied from decoding times do not tell the order of B-frames.
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
    """Whether a file ends before what it says it holds."""
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
    """Bytes of the length before each H.264 unit (ISO 14496-15); None where start codes are."""
    return (
        (extradata[4] & 3) + 1 if extradata and len(extradata) > 4 and extradata[0] == 1 else None
    )


def _has_idr(data: bytes, nal_length: int | None) -> bool:
    """Whether an H.264 packet begins anew: nothing after it refers to anything before it."""
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
    """Whether a packet holds a picture that is only referred to, never shown.

    VP8 has such in packets of their own: bit 4 of the frame tag (RFC 6386, section 9.1).
    """
    return codec == "vp8" and not (bytes(packet)[0] >> 4) & 1


def frames_at(path: str, index: VideoIndex, wanted: Sequence[int], convert: Convert) -> Frames:
    """The frames of the given numbers.

    Args:
        path: the file.
        index: its index.
        wanted: numbers of frames, each below index.num_frames.
        convert: what becomes of a frame; called for those alone.

    Returns:
        Those that could be decoded; all of them unless the file is damaged.
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
    """Every frame, each from the key frame before it; None when one was not found that way."""
    number_of = {int(index.pts[number]): number for number in numbers}
    before = np.searchsorted(index.key_pts, index.pts[numbers], side="right") - 1
    if before[0] < 0:
        return None  # shown before the first key frame
    taken: dict[int, npt.NDArray[np.uint8]] = {}
    with _opened(path) as (container, stream):
        for key in np.unique(before):
            needed = {int(pts) for pts in index.pts[numbers][before == key]}
            key_pts, begun = int(index.key_pts[key]), False
            try:
                container.seek(key_pts, stream=stream)
                for frame in _until_fed(container, stream, needed, key_pts):
                    # A picture that is refreshed bit by bit is no key frame, whatever its packet
                    # says: it comes out late, and wrong.
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
    """Frames from a key frame on, until those of the needed time stamps must have come out.

    Nothing comes when the container did not go to the key frame, or to one before it.
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
            # What is still inside comes out without anything after it being decoded.
            yield from context.decode(None)
            return


def _in_order(
    path: str, index: VideoIndex, numbers: list[int], convert: Convert, strict: bool
) -> Frames | None:
    """Decode from the beginning; a strict decoder gives None at the first error."""
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
    """Which frame this is: by its time stamp where those can be trusted, else by counting."""
    if not len(index.pts):
        return counted
    if frame.pts is None:
        return None
    place = int(np.searchsorted(index.pts, frame.pts))
    return place if place < len(index.pts) and index.pts[place] == frame.pts else None


def _every_frame(path: str, strict: bool) -> Iterator[av.VideoFrame | None]:
    """Frames from the first on; None for each packet that is broken."""
    with _opened(path, strict) as (container, stream):
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except FFmpegError:
                yield None
                return  # the file ends in the middle; what came before it was given
            try:
                frames = packet.decode()
            except MemoryError:
                raise
            except FFmpegError:
                yield None
                continue
            yield from frames
