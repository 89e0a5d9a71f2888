"""What runs inside the decoder's child process: one video file -> the frames asked for.

decord decodes where it is exact, PyAV the rest. No torch, no Ray and no project config is imported
here, so that a child starts fast and stays small.

Legend: F frames taken, H and W pixels of a stored frame.
"""

from __future__ import annotations

import logging
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import av.logging
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.error import FFmpegError

from stgt.sampling import choose_frames

DECORD_CONTAINERS = frozenset({"mov", "mp4", "matroska", "webm"})
"""Containers in which decord gives the right frames, provided its frame count agrees."""


@dataclass(frozen=True)
class DecodeRequest:
    """What to decode and how; plain values, since it crosses a process boundary."""

    path: str
    start_s: float | None
    end_s: float | None
    num_frames: int
    frame_choice: Literal["uniform", "middle"]
    size: int
    resize: Literal["squash", "crop"]
    decoder: Literal["auto", "decord", "pyav"]
    max_pixels: int


@dataclass(frozen=True)
class Facts:
    """What is known of the source of a clip."""

    width: int
    height: int
    fps: float
    duration_s: float
    num_source_frames: int
    codec: str
    decoder: str
    salvaged: bool
    """The file is broken at its end, or some frames asked for could not be decoded: the nearest
    earlier one stands in for those."""


@dataclass(frozen=True)
class Decoded:
    """Frames of one clip."""

    frames: npt.NDArray[np.uint8]
    """[F, H, W, 3] uint8."""
    frame_indices: list[int]
    """[F] position of each in the displayed frames of the file, counted from 0."""
    facts: Facts


@dataclass(frozen=True)
class Failure:
    """Why a clip gives no frames."""

    reason: str
    message: str


@dataclass(frozen=True)
class _Probe:
    width: int
    height: int
    fps: float
    num_packets: int
    codec: str
    containers: frozenset[str]
    broken_tail: bool


def limit_memory(memory_limit_bytes: int) -> None:
    """Allow this process so much address space beyond what it has; quieten the decoders."""
    av.logging.set_level(av.logging.PANIC)
    logging.getLogger("libav").setLevel(logging.CRITICAL)
    os.environ["DECORD_LOG_LEVEL"] = "FATAL"
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    allowed = pages * resource.getpagesize() + memory_limit_bytes
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))


def decode_file(request: DecodeRequest) -> Decoded | Failure:
    """Decode one clip; what is wrong with the file is an answer, not an exception."""
    try:
        size_bytes = Path(request.path).stat().st_size
    except OSError as error:
        return Failure("missing", f"no file at {request.path}: {error.strerror}")
    if size_bytes == 0:
        return Failure("empty", "the file has no bytes")
    try:
        probe = _probe(request.path)
        if isinstance(probe, Failure):
            return probe
        if probe.width * probe.height > request.max_pixels:
            return Failure("too_large", f"frames of {probe.width}x{probe.height} pixels")
        return _decode(request, probe)
    except FFmpegError as error:
        return Failure("not_a_video", f"no demuxer opens it: {error.strerror}")
    except MemoryError:
        return Failure("out_of_memory", "decoding needs more memory than is allowed")
    except Exception as error:  # whatever a decoder makes of a strange file costs that file only
        return Failure("undecodable", f"{type(error).__name__}: {str(error)[:200]}")


def _open(path: str) -> InputContainer:
    # Titles and comments are not ours to read, whatever their encoding.
    return av.open(path, metadata_errors="replace")


def _probe(path: str) -> _Probe | Failure:
    """Read the container's index: every packet of the video stream, nothing decoded."""
    with _open(path) as container:
        if not container.streams.video:
            return Failure("no_video_stream", "the file holds no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            return Failure("undecodable", "the video stream's codec is unknown")
        packets, broken_tail = 0, False
        try:
            for packet in container.demux(stream):
                packets += packet.size > 0 and not packet.is_discard
        except FFmpegError:
            broken_tail = True  # what was counted before it can still be decoded
        if packets == 0:
            return Failure("undecodable", "the video stream holds no packets")
        context = stream.codec_context
        return _Probe(
            width=context.width,
            height=context.height,
            fps=float(stream.average_rate or stream.guessed_rate or 0) or 25.0,
            num_packets=packets,
            codec=context.name,
            containers=frozenset(container.format.name.split(",")),
            broken_tail=broken_tail,
        )


def _decode(request: DecodeRequest, probe: _Probe) -> Decoded | Failure:
    if failure := _empty_span(request, probe, probe.num_packets):
        return failure
    if request.decoder == "pyav":
        return _decode_pyav(request, probe)
    if request.decoder == "decord" or probe.containers & DECORD_CONTAINERS:
        decoded = _decode_decord(request, probe)
        if isinstance(decoded, Decoded) or request.decoder == "decord":
            return decoded
    return _decode_pyav(request, probe)


def _empty_span(request: DecodeRequest, probe: _Probe, num_source: int) -> Failure | None:
    """A failure when no frame lies in [start_s, end_s)."""
    start, end = request.start_s or 0.0, request.end_s
    if start * probe.fps < num_source and (end is None or end > start):
        return None
    span = f"{start:g} s to {'the end' if end is None else f'{end:g} s'}"
    return Failure("empty_span", f"{span} holds no frame of {num_source / probe.fps:g} s of video")


def _wanted(request: DecodeRequest, probe: _Probe, num_source: int) -> list[int]:
    """Indices of the frames asked for, among those inside [start_s, end_s)."""
    first = min(num_source - 1, round((request.start_s or 0.0) * probe.fps))
    last = num_source if request.end_s is None else round(request.end_s * probe.fps)
    span = max(1, min(num_source, last) - first)
    return (first + choose_frames(span, request.num_frames, request.frame_choice)).tolist()


def _target_size(request: DecodeRequest, width: int, height: int) -> tuple[int, int]:
    """Width and height to scale to: the square itself, or the short side for a later crop."""
    if request.resize == "squash":
        return request.size, request.size
    scale = request.size / min(width, height)
    return max(request.size, round(width * scale)), max(request.size, round(height * scale))


def _centre(frames: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    top, left = (frames.shape[1] - size) // 2, (frames.shape[2] - size) // 2
    return np.ascontiguousarray(frames[:, top : top + size, left : left + size])


def _facts(probe: _Probe, num_source: int, decoder: str, salvaged: bool) -> Facts:
    return Facts(
        width=probe.width,
        height=probe.height,
        fps=probe.fps,
        duration_s=num_source / probe.fps,
        num_source_frames=num_source,
        codec=probe.codec,
        decoder=decoder,
        salvaged=salvaged or probe.broken_tail,
    )


def _decode_decord(request: DecodeRequest, probe: _Probe) -> Decoded | Failure:
    import decord  # here, not above: a child that only needs PyAV does not load it

    try:
        reader = decord.VideoReader(request.path, num_threads=1)
        if request.decoder == "auto" and len(reader) != probe.num_packets:
            return Failure("undecodable", "decord counts other frames than the packet index")
        height, width = reader[0].shape[:2]
        target_width, target_height = _target_size(request, width, height)
        reader = decord.VideoReader(
            request.path, width=target_width, height=target_height, num_threads=1
        )
        wanted = _wanted(request, probe, len(reader))
        frames = reader.get_batch(wanted).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        return Failure("undecodable", f"decord: {str(error).splitlines()[0][:200]}")
    return Decoded(
        frames=_centre(frames, request.size),
        frame_indices=wanted,
        facts=_facts(probe, len(reader), "decord", salvaged=False),
    )


def _decode_pyav(request: DecodeRequest, probe: _Probe) -> Decoded | Failure:
    """Decode in order, counting frames, and skip broken packets."""
    wanted = _wanted(request, probe, probe.num_packets)
    last_wanted, missing = wanted[-1], set(wanted)
    taken: dict[int, npt.NDArray[np.uint8]] = {}
    counted = 0
    for index, frame in enumerate(_frames_in_order(request.path)):
        counted = index + 1
        if index in missing:
            taken[index] = _to_array(frame, request)
        if index >= last_wanted:
            break
    if not taken:
        return Failure("undecodable", f"none of {probe.num_packets} packets gives a frame")
    salvaged = len(taken) < len(missing)
    num_source = counted if salvaged else probe.num_packets
    available = np.array(sorted(taken))
    places = np.maximum(np.searchsorted(available, wanted, side="right") - 1, 0)
    indices = available[places].tolist()
    return Decoded(
        frames=np.stack([taken[index] for index in indices]),
        frame_indices=indices,
        facts=_facts(probe, num_source, "pyav", salvaged),
    )


def _frames_in_order(path: str):  # noqa: ANN202 - a generator of av.VideoFrame
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except FFmpegError:
                return  # the file ends in the middle; what came before it was given
            try:
                frames = packet.decode()
            except FFmpegError:
                continue  # a broken packet costs its own frames only
            yield from frames


def _to_array(frame: av.VideoFrame, request: DecodeRequest) -> npt.NDArray[np.uint8]:
    """One frame, turned as the file says, scaled and cut: [size, size, 3] uint8."""
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    width, height = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
    target_width, target_height = _target_size(request, width, height)
    if turns % 2:
        target_width, target_height = target_height, target_width
    image = frame.reformat(
        width=target_width, height=target_height, format="rgb24", interpolation="BICUBIC"
    ).to_ndarray()
    turned = np.rot90(image.astype(np.uint8, copy=False), turns)
    return _centre(turned[None], request.size)[0]


def stall(seconds: float) -> None:
    """Do nothing for a while; lets tests see what a hanging decoder costs."""
    time.sleep(seconds)
