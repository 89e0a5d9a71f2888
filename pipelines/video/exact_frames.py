"""Decodes frames of a video by their exact index with PyAV.

First, all packets of the video stream are indexed without decoding. If the timestamps can be
trusted, each requested frame is decoded from the preceding key frame, skipping pictures that no
other picture refers to. Otherwise, or if that misses a frame, the file is decoded from the
beginning. Decoders stop at the first error. If one occurs while decoding from the beginning, the
file counts as damaged and is decoded once more, skipping the broken parts.

Legend: N displayed frames of a video, numbered from 0 in display order; K key frames.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream

TRUSTED = frozenset({"mov", "mp4", "matroska", "webm"})
"""Containers whose timestamps give the order of frames. AVI has no timestamps."""
STREAMED = frozenset({"mpegts", "flv"})
"""Containers that may start or be joined anywhere and have no table of key frames. Their timestamps
are trusted only if the file starts with a key frame and decoding times ascend throughout. Key
frames are reached by their position in the file."""
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
MOST_FPS = 1000.0
"""A higher average rate is not one: FFmpeg gives 60,000 for raw DV, the ticks of its clock."""
ROUNDING_S = 0.001
"""Annotated times and the timestamps of some containers are rounded to milliseconds."""
STILL_ENDINGS = ("_pipe", "image2")
"""Endings of FFmpeg's names for formats of a single picture."""
ENCRYPTED_ENTRY = b"encv"
"""Type of the sample entry of an encrypted video track (ISO/IEC 23001-7)."""
SCANNED_BYTES = 8 * 1024**2
BEYOND_ANY_S = 1e7
"""A time after the end of any video, in seconds; seeking to it leads to the last key frame."""

FrameRules = Literal[1, 2]
"""Rules by which frames of a clip are found and cropped; see `SamplingConfig.frame_rules`."""
Convert = Callable[[av.VideoFrame], npt.NDArray[np.uint8]]


class NoVideoError(Exception):
    """The file has no decodable video stream; `has_stream` is whether it has one at all."""

    def __init__(self, message: str, has_stream: bool) -> None:
        super().__init__(message)
        self.has_stream = has_stream


class EncryptedError(Exception):
    """The video stream is encrypted."""


@dataclass(frozen=True)
class VideoIndex:
    """What a container declares about its video stream."""

    width: int
    height: int
    """Size of a frame as coded, in pixels, before rotation."""
    pixel_aspect: float
    """Width of a displayed pixel divided by its height."""
    average_fps: float
    """Frames per second on average, as FFmpeg declares it; wrong for raw DV."""
    guessed_fps: float
    """Frames per second as FFmpeg guesses it from all that it knows."""
    codec: str
    num_frames: int
    """Number of displayed frames that the container lists."""
    broken_tail: bool
    """Whether the end of the file is missing."""
    containers: frozenset[str]
    clean_cuts: bool
    """Whether there is only one video stream, and no frame refers across a key frame."""
    starts_s: float
    """Time from the start of the file until the first frame is shown, in seconds."""
    last_shown_s: float
    """How long the last frame is shown, in seconds, as far as the container declares it."""
    pts: npt.NDArray[np.int64]
    """[N] timestamps of displayed frames, ascending; empty if they cannot be trusted."""
    shown_s: npt.NDArray[np.float64]
    """[N] display time of each frame, starting at 0 s; from the frame rate if timestamps are
    unusable."""
    key_pts: npt.NDArray[np.int64]
    """[K] timestamps of key frames, ascending; empty if they cannot be trusted."""
    key_positions: npt.NDArray[np.int64]
    """[K] positions of the key frames in the file, in bytes; empty if the container has a table of
    key frames of its own."""

    @property
    def is_still(self) -> bool:
        """Whether the file is a single picture rather than a video."""
        named = any(name.endswith(STILL_ENDINGS) for name in self.containers)
        return named and self.num_frames == 1

    def fps(self, rules: FrameRules) -> float:
        """Return the frames per second; by rules 1, the average even if it is absurd."""
        absurd = self.average_fps > MOST_FPS and self.guessed_fps > 0
        return self.guessed_fps if rules == 2 and absurd else self.average_fps

    def duration_s(self, rules: FrameRules) -> float:
        """Return the time at which the last frame ends."""
        last_s, frame_s = float(self.shown_s[-1]), 1 / self.fps(rules)
        if rules == 1:
            return round(last_s + frame_s, 6)
        return round(self.starts_s + last_s + max(frame_s, self.last_shown_s), 6)

    def span(
        self, start_s: float | None, end_s: float | None, rules: FrameRules
    ) -> tuple[int, int]:
        """Return the first frame of a span and the first frame after it; equal if it has none.

        By rules 2, times count from the start of the file, and the span begins with the frame that
        is on display at start_s. By rules 1, times count from the first frame, and the span begins
        with the first frame that appears at or after start_s.
        """
        if rules == 1:
            return self._span_from_first_frame(start_s, end_s)
        rounding_s = min(ROUNDING_S, 0.25 / self.fps(2))
        first, stop = 0, self.num_frames
        if start_s is not None:
            if start_s > self.duration_s(2) - rounding_s:
                return stop, stop
            from_first_s = start_s - self.starts_s + rounding_s
            first = max(0, int(np.searchsorted(self.shown_s, from_first_s, side="right")) - 1)
        if end_s is not None:
            start_s = start_s or 0.0
            stop = int(np.searchsorted(self.shown_s, end_s - self.starts_s - rounding_s))
            # Even a span shorter than the rounding has the frame on display.
            if start_s < end_s and start_s - self.starts_s + rounding_s >= self.shown_s[first]:
                stop = max(stop, first + 1)
        return first, stop

    def _span_from_first_frame(self, start_s: float | None, end_s: float | None) -> tuple[int, int]:
        tolerance = 0.25 / self.fps(1)
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
        stream = video_stream(container)
        stream.codec_context.thread_count = 1
        if strict:
            stream.codec_context.options = {"err_detect": "explode"}
        yield container, stream


def _video_streams(container: InputContainer) -> list[VideoStream]:
    return [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]


def video_stream(container: InputContainer) -> VideoStream:
    """Return the video stream of a file that is decoded: the best one, and no cover picture.

    Raises:
        NoVideoError: There is none, or its codec is unknown.
        EncryptedError: It is encrypted.
    """
    found = _video_streams(container)
    if not found:
        raise NoVideoError("the file has no video stream", has_stream=False)
    best = container.streams.best("video")
    stream = best if isinstance(best, VideoStream) and best in found else found[0]
    if stream.codec_context is None:
        if _declares_encryption(container.name):
            raise EncryptedError
        raise NoVideoError("the video stream's codec is unknown", has_stream=True)
    return stream


def _declares_encryption(path: str) -> bool:
    """Return whether the beginning or the end of a file, where MP4 has its headers, declares it."""
    with Path(path).open("rb") as file:
        if ENCRYPTED_ENTRY in file.read(SCANNED_BYTES):
            return True
        file.seek(max(0, file.seek(0, os.SEEK_END) - SCANNED_BYTES))
        return ENCRYPTED_ENTRY in file.read()


@dataclass
class _Packets:
    """Properties collected while reading a file's packets."""

    pts: list[int | None] = field(default_factory=list)
    keys: list[tuple[int, int]] = field(default_factory=list)
    """Timestamp and position in the file of each key frame; -1 if the position is unknown."""
    reordered: bool = False
    """Whether the display time of a packet differs from its decoding time."""
    ascending: bool = True
    """Whether the first packet is a key frame, all are whole, and decoding times ascend."""
    clean_cuts: bool = True
    broken_tail: bool = False
    last_duration: int = 0
    """Duration of the packet that is displayed last."""
    _last_pts: int | None = None
    _last_dts: int | None = None

    def add(self, packet: av.Packet, codec: str, nal_length: int | None) -> None:
        """Record a displayed packet."""
        pts, dts = packet.pts, packet.dts
        self.ascending = (
            self.ascending
            and dts is not None
            and not packet.is_corrupt
            and (packet.is_keyframe if self._last_dts is None else dts > self._last_dts)
        )
        self._last_dts = dts
        self.pts.append(pts)
        self.reordered = self.reordered or pts != dts
        if pts is None:
            return
        if self._last_pts is None or pts > self._last_pts:
            self._last_pts, self.last_duration = pts, packet.duration or 0
        if packet.is_keyframe:
            position = packet.pos
            self.keys.append((pts, -1 if position is None else position))
            if codec == "h264" and not _has_idr(bytes(packet), nal_length):
                self.clean_cuts = False
        elif self.keys and pts < self.keys[-1][0]:
            self.clean_cuts = False


def read_index(path: str) -> VideoIndex:
    """Index the video stream of a file without decoding it.

    Raises:
        NoVideoError: The file has no video stream, or the stream is empty or has no known codec.
        EncryptedError: The video stream is encrypted.
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
                if packet.has_sidedata("encryption_info"):
                    raise EncryptedError
                if not _is_hidden(packet, context.name):
                    packets.add(packet, context.name, nal_length)
        except FFmpegError:
            packets.broken_tail = True  # the packets before the error can still be decoded
        if not packets.pts:
            raise NoVideoError("the video stream is empty", has_stream=True)
        return _index_of(path, container, stream, packets)


def end_of_last_packets(path: str) -> float | None:
    """Return the duration of a video from its last packets alone; None if it needs an index.

    Only the headers and the packets after the last key frame are read, so this takes milliseconds
    for a file of any length. The result is that of `VideoIndex.duration_s` by rules 2. What the
    headers declare as the duration is not used, since it is often missing or wrong.

    Raises:
        NoVideoError: The file has no video stream, or no known codec.
        EncryptedError: The video stream is encrypted.
        FFmpegError: FFmpeg cannot open the file.
    """
    with _opened(path) as (container, stream):
        tick_s = float(stream.time_base or 0)
        if not set(container.format.name.split(",")) & TRUSTED or not tick_s:
            return None
        packets = _Packets()
        codec = stream.codec_context.name
        try:
            container.seek(round(BEYOND_ANY_S / tick_s), stream=stream)
            for packet in container.demux(stream):
                if packet.size == 0 or packet.is_discard or _is_hidden(packet, codec):
                    continue
                if packet.has_sidedata("encryption_info"):
                    raise EncryptedError
                if packet.pts is None:
                    return None
                packets.add(packet, "", None)  # nothing here depends on the codec
        except FFmpegError:
            return None
        if not packets.pts:
            return None
        fps = float(stream.average_rate or stream.guessed_rate or 0) or DEFAULT_FPS
        if fps > MOST_FPS and stream.guessed_rate:
            fps = float(stream.guessed_rate)
        last_s = max(pts for pts in packets.pts if pts is not None) * tick_s
        starts_s = (container.start_time or 0) / av.time_base
        return round(last_s - starts_s + max(1 / fps, packets.last_duration * tick_s), 6)


def _index_of(
    path: str, container: InputContainer, stream: VideoStream, packets: _Packets
) -> VideoIndex:
    context, tick_s = stream.codec_context, float(stream.time_base or 0)
    containers = frozenset(container.format.name.split(","))
    fps = float(stream.average_rate or stream.guessed_rate or 0) or DEFAULT_FPS
    known = sorted(pts for pts in packets.pts if pts is not None)
    complete = len(set(known)) == len(packets.pts)
    # Timestamps that were copied from decoding times do not give the order of B-frames.
    in_order = packets.reordered or not context.has_b_frames
    streamed = bool(containers & STREAMED)
    reachable = (
        streamed
        and packets.ascending
        and all(place >= 0 for _, place in packets.keys)
        # Pictures displayed before the first key frame refer to one that is missing.
        and known[:1] == [pts for pts, _ in packets.keys[:1]]
    )
    trusted = (bool(containers & TRUSTED) or reachable) and complete and in_order
    timed = complete and not containers & WITHOUT_TIMES
    if timed:
        shown_s = (np.array(known, dtype=np.float64) - known[0]) * tick_s
    else:
        shown_s = np.arange(len(packets.pts)) / fps
    starts_s = 0.0
    if timed and container.start_time is not None:
        starts_s = known[0] * tick_s - container.start_time / av.time_base
    keys = sorted(packets.keys) if trusted else []
    return VideoIndex(
        width=context.width,
        height=context.height,
        pixel_aspect=float(stream.sample_aspect_ratio or 1),
        average_fps=fps,
        guessed_fps=float(stream.guessed_rate or 0),
        codec=context.name,
        num_frames=len(packets.pts),
        broken_tail=packets.broken_tail
        or _is_cut_short(path, container, stream, float(shown_s[-1]) + 1 / fps),
        containers=containers,
        clean_cuts=packets.clean_cuts
        and len(_video_streams(container)) == 1
        and (not known or known[0] >= 0),
        starts_s=max(0.0, round(starts_s, 6)),
        last_shown_s=packets.last_duration * tick_s if timed else 0.0,
        pts=np.array(known if trusted else [], dtype=np.int64),
        shown_s=shown_s,
        key_pts=np.array([pts for pts, _ in keys], dtype=np.int64),
        key_positions=np.array([place for _, place in keys] if streamed else [], dtype=np.int64),
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
            position = int(index.key_positions[key]) if len(index.key_positions) else None
            try:
                if position is None:
                    container.seek(key_pts, stream=stream)
                else:
                    container.seek(position, unsupported_byte_offset=True)
                for frame in _until_fed(container, stream, needed, key_pts, position):
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
    container: InputContainer,
    stream: VideoStream,
    needed: set[int],
    key_pts: int,
    position: int | None,
) -> Iterator[av.VideoFrame]:
    """Iterate over frames from a key frame on, until all needed timestamps have been decoded.

    Yields nothing if seeking reached neither the key frame nor a packet before it or, if its
    position in the file is given, not exactly the key frame.
    """
    context = stream.codec_context
    context.flush_buffers()
    skips = context.name in SKIPPING
    unfed, first = set(needed), True
    for packet in container.demux(stream):
        if first and (packet.pts is None or packet.pts > key_pts):
            return
        if first and position is not None and packet.pts != key_pts:
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
