"""Frames of a video by their number, exactly, with PyAV.

The container is indexed first: every packet of the video stream, nothing decoded. Where its time
stamps can be trusted, the frames asked for are reached from the key frame before them, and pictures
in between that no other picture refers to are not decoded at all. Elsewhere, and whenever that does
not give every frame, decoding goes from the beginning and skips broken packets.

Legend: N displayed frames of a video, numbered from 0 in the order in which they are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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
    seconds_per_tick: float
    key_pts: npt.NDArray[np.int64]
    """Time stamps of key frames, ascending."""

    @property
    def duration_s(self) -> float:
        """How long the frames are shown."""
        if len(self.pts) < 2:
            shown_s = self.num_frames / self.fps
        else:
            last_s = float(self.pts[-1] - self.pts[0]) * self.seconds_per_tick
            shown_s = last_s + 1 / self.fps
        return round(shown_s, 6)

    def span(self, start_s: float | None, end_s: float | None) -> tuple[int, int]:
        """First frame shown at or after start_s, and first at or after end_s; counted from 0 s."""
        if len(self.pts):
            shown_s = (self.pts - self.pts[0]) * self.seconds_per_tick
        else:
            shown_s = np.arange(self.num_frames) / self.fps
        tolerance = 0.25 / self.fps  # annotated times are rounded
        first = 0 if start_s is None else int(np.searchsorted(shown_s, start_s - tolerance))
        stop = self.num_frames
        if end_s is not None:
            stop = int(np.searchsorted(shown_s, end_s - tolerance))
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
def _opened(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    with open_video(path) as container:
        yield container, _stream(container)


def _stream(container: InputContainer) -> VideoStream:
    found = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not found:
        raise NoVideoError("the file holds no video stream", has_stream=False)
    best = container.streams.best("video")
    stream = best if isinstance(best, VideoStream) and best in found else found[0]
    if stream.codec_context is None:
        raise NoVideoError("the video stream's codec is unknown", has_stream=True)
    stream.codec_context.thread_count = 1
    return stream


def read_index(path: str) -> VideoIndex:
    """Index a file.

    Raises:
        NoVideoError: there is no stream, or nothing in it.
        FFmpegError: no demuxer opens the file.
    """
    with _opened(path) as (container, stream):
        context = stream.codec_context
        pts, keys, num_packets, broken_tail = [], [], 0, False
        try:
            for packet in container.demux(stream):
                num_packets += packet.size > 0
                if packet.size == 0 or packet.is_discard or _is_hidden(packet, context.name):
                    continue
                pts.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
        except FFmpegError:
            broken_tail = True  # what was counted before it can still be decoded
        if not pts:
            raise NoVideoError("the video stream holds no packets", has_stream=True)
        containers = frozenset(container.format.name.split(","))
        # A file that was cut short, with its table of frames still there.
        broken_tail = broken_tail or (bool(containers & MP4) and num_packets < stream.frames)
        trusted = bool(containers & TRUSTED) and None not in pts and len(set(pts)) == len(pts)
        return VideoIndex(
            width=context.width,
            height=context.height,
            fps=float(stream.average_rate or stream.guessed_rate or 0) or DEFAULT_FPS,
            codec=context.name,
            num_frames=len(pts),
            broken_tail=broken_tail,
            containers=containers,
            pts=np.array(sorted(pts) if trusted else [], dtype=np.int64),
            seconds_per_tick=float(stream.time_base or 0),
            key_pts=np.array(sorted(keys) if trusted else [], dtype=np.int64),
        )


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
    return _in_order(path, index, numbers, convert)


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
            try:
                container.seek(int(index.key_pts[key]), stream=stream)
                for frame in _until_fed(container, stream, needed, int(index.key_pts[key])):
                    if frame.pts in needed:
                        if frame.is_corrupt:
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


def _in_order(path: str, index: VideoIndex, numbers: list[int], convert: Convert) -> Frames:
    """Decode from the beginning and skip what is broken."""
    taken: dict[int, npt.NDArray[np.uint8]] = {}
    missing = set(numbers)
    counted, damaged = 0, index.broken_tail
    for frame in _every_frame(path):
        if frame is None:
            damaged = True
            continue
        number = _number(frame, index, counted)
        counted += 1
        damaged = damaged or frame.is_corrupt
        if number in missing:
            missing.discard(number)
            taken[number] = convert(frame)
        if number is not None and number >= numbers[-1]:
            break
    else:
        if not len(index.pts) and missing:
            return Frames(taken, max(counted, 1), damaged=True)
    return Frames(taken, index.num_frames, damaged=damaged or bool(missing))


def _number(frame: av.VideoFrame, index: VideoIndex, counted: int) -> int | None:
    """Which frame this is: by its time stamp where those can be trusted, else by counting."""
    if not len(index.pts):
        return counted
    if frame.pts is None:
        return None
    place = int(np.searchsorted(index.pts, frame.pts))
    return place if place < len(index.pts) and index.pts[place] == frame.pts else None


def _every_frame(path: str) -> Iterator[av.VideoFrame | None]:
    """Frames from the first on; None for each packet that is broken."""
    with _opened(path) as (container, stream):
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
