"""What runs inside the decoder's child process: one video file -> the frames asked for.

No torch, no Ray and no project config is imported here, so that a child starts fast and stays
small.

Legend: F frames taken, H and W pixels of a stored frame.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import logging
import resource
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import av
import av.logging
import numpy as np
import numpy.typing as npt
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from pipelines.video import exact_frames
from pipelines.video.exact_frames import NoVideoError, VideoIndex
from pipelines.video.frame_codec import Codec, encode_frames
from stgt.inputs.frame_choice import FrameChoice, choose_frames

DECORD_CODECS = frozenset({"h264", "vp8", "vp9"})
"""Codecs in which decord is exact, given trusted time stamps and clean cuts."""
HASH_BYTES = 16
HASH_CHUNK_BYTES = 1024 * 1024
PAGE_BEGINNINGS = (b"<!doctype", b"<html", b"<?xml", b"<error")
LIST_BEGINNINGS = (b"ffconcat", b"#EXTM3U")
PR_SET_PDEATHSIG = 1

Decoder = Literal["auto", "decord", "pyav"]


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """What to decode and how; plain values, since it crosses a process boundary."""

    path: str
    start_s: float | None = None
    end_s: float | None = None
    num_frames: int
    frame_choice: FrameChoice
    seed: Sequence[int] = (0,)
    """Of the generator that a random choice of frames draws from."""
    size: int
    resize: Literal["squash", "crop"]
    decoder: Decoder
    max_pixels: int
    max_bytes: int
    codec: Codec | None = None
    """How frames are coded; None gives them as an array."""
    jpeg_quality: int = 95
    hashed: bool = False
    """Whether the file's bytes are hashed."""
    min_short_side: int | None = None
    min_duration_s: float | None = None
    max_duration_s: float | None = None


@dataclass(frozen=True)
class Facts:
    """What is known of the source of a clip."""

    width: int
    height: int
    fps: float
    duration_s: float
    """Of the whole video."""
    num_source_frames: int
    codec: str
    decoder: str
    salvaged: bool
    """The file is damaged: a part of it cannot be decoded. Where a frame that was asked for is in
    that part, the nearest earlier one stands in for it."""
    size_bytes: int
    video_hash: str
    """BLAKE2b of the file, in hex; empty unless it was asked for."""


@dataclass(frozen=True)
class Decoded:
    """Frames of one clip."""

    frames: npt.NDArray[np.uint8]
    """[F, H, W, 3] uint8; F = 0 when they are coded."""
    coded: list[bytes]
    """F coded images; none when they are an array."""
    frame_indices: list[int]
    """[F] number of each among the displayed frames of the file, counted from 0."""
    facts: Facts


@dataclass(frozen=True)
class Failure:
    """Why a clip gives no frames."""

    reason: str
    message: str


class _TooLargeError(Exception):
    """Frames grew beyond what is allowed in the middle of a file."""


@dataclass(frozen=True)
class _Taken:
    frames: npt.NDArray[np.uint8]
    indices: list[int]
    num_source: int
    decoder: str
    damaged: bool
    width: int
    height: int


def begin_child(memory_limit_bytes: int) -> None:
    """Prepare this process: it may use so much address space more, and dies with its parent."""
    # A decoder that hangs holds the interpreter, which could not run a handler of Python's.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    av.logging.set_level(av.logging.PANIC)
    logging.getLogger("libav").setLevel(logging.CRITICAL)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    allowed = pages * resource.getpagesize() + memory_limit_bytes
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    # A crash costs one clip; the image of its memory would cost disk, and time that counts.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def decode_file(request: DecodeRequest) -> Decoded | Failure:
    """Decode one clip; what is wrong with the file is an answer, not an exception."""
    try:
        size_bytes = Path(request.path).stat().st_size
        with Path(request.path).open("rb") as file:
            beginning = file.read(64)
    except ValueError as error:
        return Failure("missing", f"{request.path!r} can be no path: {error}")
    except PermissionError as error:
        return Failure("forbidden", f"{request.path} may not be read: {error.strerror}")
    except OSError as error:
        return Failure("missing", f"no file at {request.path}: {error.strerror}")
    if size_bytes == 0:
        return Failure("empty", "the file has no bytes")
    if size_bytes > request.max_bytes:
        return Failure("too_large", f"a file of {size_bytes:,} bytes")
    if beginning.lstrip().lower().startswith(PAGE_BEGINNINGS):
        return Failure("not_a_video", "an HTML or XML page, as a failed download leaves it")
    if beginning.startswith(LIST_BEGINNINGS):
        return Failure("not_a_video", "a list of other files")
    try:
        index = exact_frames.read_index(request.path)
        if index.width * index.height > request.max_pixels:
            return Failure("too_large", f"frames of {index.width}x{index.height} pixels")
        first, stop = index.span(request.start_s, request.end_s)
        if first >= stop:
            return _empty_span(request, index)
        if failure := _filtered(request, index):
            return failure
        taken = _take(request, index, first, stop)
        gc.collect(1)  # the frame whose side data was read
        if isinstance(taken, Failure):
            return taken
        return _answer(request, index, taken, size_bytes)
    except NoVideoError as error:
        return Failure("undecodable" if error.has_stream else "no_video_stream", str(error))
    except _TooLargeError as error:
        return Failure("too_large", str(error))
    except MemoryError:
        return Failure("out_of_memory", "decoding needs more memory than is allowed")
    except FFmpegError as error:
        return Failure("not_a_video", f"no demuxer opens it: {error.strerror}")
    except Exception as error:  # whatever a decoder makes of a strange file costs that file only
        return Failure("undecodable", f"{type(error).__name__}: {str(error)[:200]}")


def _empty_span(request: DecodeRequest, index: VideoIndex) -> Failure:
    end = "the end" if request.end_s is None else f"{request.end_s:g} s"
    return Failure(
        "empty_span",
        f"{request.start_s or 0:g} s to {end} holds no frame of {index.duration_s:g} s of video",
    )


def _filtered(request: DecodeRequest, index: VideoIndex) -> Failure | None:
    """Why a clip is left out on purpose."""
    least, short_side = request.min_short_side, min(index.width, index.height)
    if least is not None and short_side < least:
        return Failure("too_small", f"{index.width}x{index.height} pixels")
    start_s = request.start_s or 0.0
    end_s = index.duration_s if request.end_s is None else min(request.end_s, index.duration_s)
    if request.min_duration_s is not None and end_s - start_s < request.min_duration_s:
        return Failure("too_short", f"{end_s - start_s:.2f} s")
    if request.max_duration_s is not None and end_s - start_s > request.max_duration_s:
        return Failure("too_long", f"{end_s - start_s:.2f} s")
    return None


def _answer(
    request: DecodeRequest, index: VideoIndex, taken: _Taken, size_bytes: int
) -> Decoded | Failure:
    facts = Facts(
        width=taken.width,
        height=taken.height,
        fps=index.fps,
        duration_s=taken.num_source / index.fps
        if taken.num_source != index.num_frames
        else index.duration_s,
        num_source_frames=taken.num_source,
        codec=index.codec,
        decoder=taken.decoder,
        salvaged=taken.damaged,
        size_bytes=size_bytes,
        video_hash=_hash(request.path) if request.hashed else "",
    )
    if request.codec is None:
        return Decoded(taken.frames, [], taken.indices, facts)
    # An image, as a clip of one frame, is stored once and not as often as frames were asked for.
    kept = 1 if taken.num_source == 1 else len(taken.frames)
    coded = encode_frames(taken.frames[:kept], request.codec, request.jpeg_quality)
    return Decoded(taken.frames[:0], coded, taken.indices[:kept], facts)


def _hash(path: str) -> str:
    found = hashlib.blake2b(digest_size=HASH_BYTES)
    with Path(path).open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


def _take(request: DecodeRequest, index: VideoIndex, first: int, stop: int) -> _Taken | Failure:
    generator = np.random.default_rng(tuple(request.seed))
    chosen = choose_frames(stop - first, request.num_frames, request.frame_choice, generator)
    wanted = (first + chosen).tolist()
    exact = index.codec in DECORD_CODECS and index.clean_cuts and len(index.key_pts) > 0
    may_use_decord = request.decoder == "auto" and exact and not index.broken_tail
    if request.decoder == "decord" or may_use_decord:
        taken = _take_by_decord(request, index, wanted)
        if isinstance(taken, _Taken) or request.decoder == "decord":
            return taken
    return _take_by_pyav(request, index, wanted)


def _target_size(request: DecodeRequest, width: int, height: int) -> tuple[int, int]:
    """Width and height to scale to: the square itself, or the short side for a later crop."""
    if request.resize == "squash":
        return request.size, request.size
    scale = request.size / min(width, height)
    return max(request.size, round(width * scale)), max(request.size, round(height * scale))


def _centre(frames: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    top, left = (frames.shape[1] - size) // 2, (frames.shape[2] - size) // 2
    return np.ascontiguousarray(frames[:, top : top + size, left : left + size])


def _take_by_decord(
    request: DecodeRequest, index: VideoIndex, wanted: list[int]
) -> _Taken | Failure:
    import decord  # here, not above: a child that only needs PyAV does not load it

    decord.logging.set_level(decord.logging.QUIET)
    try:
        # The size is known once a frame is decoded, since decord turns frames as the file says.
        reader = decord.VideoReader(request.path, num_threads=1)
        if request.decoder == "auto" and len(reader) != index.num_frames:
            return Failure("undecodable", "decord counts other frames than the container lists")
        height, width = reader[0].shape[:2]
        target_width, target_height = _target_size(request, width, height)
        reader = decord.VideoReader(
            request.path, width=target_width, height=target_height, num_threads=1
        )
        indices = [min(number, len(reader) - 1) for number in wanted]
        frames = reader.get_batch(indices).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        return Failure("undecodable", f"decord: {str(error).splitlines()[0][:200]}")
    return _Taken(
        frames=_centre(frames, request.size),
        indices=indices,
        num_source=len(reader),
        decoder="decord",
        damaged=index.broken_tail,
        width=width,
        height=height,
    )


def _take_by_pyav(request: DecodeRequest, index: VideoIndex, wanted: list[int]) -> _Taken | Failure:
    to_array = _ToArray(request)
    found = exact_frames.frames_at(request.path, index, wanted, to_array)
    if not found.taken and found.num_frames < index.num_frames and not len(index.pts):
        # Fewer frames than the container lists, and all that were asked for lie behind them.
        wanted = [min(number, found.num_frames - 1) for number in wanted]
        found = replace(exact_frames.frames_at(request.path, index, wanted, to_array), damaged=True)
    if not found.taken:
        return Failure("undecodable", f"none of {index.num_frames} packets gives a frame")
    available = np.array(sorted(found.taken))
    places = np.maximum(np.searchsorted(available, wanted, side="right") - 1, 0)
    indices = available[places].tolist()
    return _Taken(
        frames=np.stack([found.taken[number] for number in indices]),
        indices=indices,
        num_source=found.num_frames,
        decoder="pyav",
        damaged=found.damaged,
        width=to_array.width,
        height=to_array.height,
    )


def _is_mirrored(frame: av.VideoFrame) -> bool:
    """Whether the file has frames mirrored, upside down before they are turned.

    Its display matrix, nine int32, then has a negative determinant.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32).astype(np.int64)[:5].tolist()
    return a * d - b * c < 0


class _ToArray:
    """Turns a frame as the file says, scales and cuts it: [size, size, 3] uint8."""

    def __init__(self, request: DecodeRequest) -> None:
        self._request = request
        self._reformatter = VideoReformatter()  # keeps its tables from frame to frame
        self._mirrored: bool | None = None
        self.width = self.height = 0

    def __call__(self, frame: av.VideoFrame) -> npt.NDArray[np.uint8]:
        request = self._request
        if frame.width * frame.height > request.max_pixels:
            raise _TooLargeError(f"frames of {frame.width}x{frame.height} pixels")
        turns = round(getattr(frame, "rotation", 0) / 90) % 4
        sideways = turns % 2 == 1
        self.width, self.height = (
            (frame.height, frame.width) if sideways else (frame.width, frame.height)
        )
        width, height = _target_size(request, self.width, self.height)
        image = self._reformatter.reformat(
            frame,
            width=height if sideways else width,
            height=width if sideways else height,
            format="rgb24",
            interpolation="BICUBIC",
        ).to_ndarray()
        if self._mirrored is None:
            # Once a file: PyAV ties side data to its frame in a circle, which only the collector
            # undoes.
            self._mirrored = _is_mirrored(frame)
        if self._mirrored:
            image = image[::-1]
        turned = np.rot90(image.astype(np.uint8, copy=False), turns)
        return _centre(turned[None], request.size)[0]
