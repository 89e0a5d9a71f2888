"""Code that runs in the decoder's child process: decodes the requested frames of one video file.

Does not import torch, Ray or the project's configs, so the child starts fast and stays small.

Legend: F decoded frames, H and W pixels of a stored frame.
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
"""Codecs for which decord is exact, given trusted timestamps and clean cuts."""
HASH_BYTES = 16
HASH_CHUNK_BYTES = 1024 * 1024
PAGE_BEGINNINGS = (b"<!doctype", b"<html", b"<?xml", b"<error")
LIST_BEGINNINGS = (b"ffconcat", b"#EXTM3U")
PR_SET_PDEATHSIG = 1

Decoder = Literal["auto", "decord", "pyav"]


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """What to decode and how. Holds only plain values, because it is sent to another process."""

    path: str
    start_s: float | None = None
    end_s: float | None = None
    num_frames: int
    frame_choice: FrameChoice
    seed: Sequence[int] = (0,)
    """Seed for random frame choice."""
    size: int
    resize: Literal["squash", "crop"]
    decoder: Decoder
    max_pixels: int
    max_bytes: int
    codec: Codec | None = None
    """Encoding of the returned frames; None returns an array."""
    jpeg_quality: int = 95
    hashed: bool = False
    """Whether to hash the file."""
    min_short_side: int | None = None
    min_duration_s: float | None = None
    max_duration_s: float | None = None


@dataclass(frozen=True)
class Facts:
    """Properties of the source video of a clip."""

    width: int
    height: int
    fps: float
    duration_s: float
    """Duration of the whole video."""
    num_source_frames: int
    codec: str
    decoder: str
    salvaged: bool
    """Whether the file is damaged, so that part of it cannot be decoded. A requested frame in that
    part is replaced by the nearest earlier frame."""
    size_bytes: int
    video_hash: str
    """Hexadecimal BLAKE2b hash of the file; empty unless requested."""


@dataclass(frozen=True)
class Decoded:
    """Frames of one clip, as an array or encoded."""

    frames: npt.NDArray[np.uint8]
    """[F, H, W, 3] uint8; F = 0 if the frames are encoded."""
    coded: list[bytes]
    """F encoded images; empty if the frames are an array."""
    frame_indices: list[int]
    """[F] index of each frame among the displayed frames of the file, counted from 0."""
    facts: Facts


@dataclass(frozen=True)
class Failure:
    """Why a clip could not be decoded or was filtered out."""

    reason: str
    message: str


class _TooLargeError(Exception):
    """The frame size increases within the file and exceeds the limit."""


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
    """Limit the memory of this process and make it die together with its parent.

    Args:
        memory_limit_bytes: address space that the process may allocate in addition.
    """
    # A hung decoder blocks the interpreter, so a Python signal handler would never run.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    av.logging.set_level(av.logging.PANIC)
    logging.getLogger("libav").setLevel(logging.CRITICAL)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    allowed = pages * resource.getpagesize() + memory_limit_bytes
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    # Writing a core dump would take disk space and time within the clip's deadline.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def decode_file(request: DecodeRequest) -> Decoded | Failure:
    """Decode one clip; return problems with the file as a `Failure` instead of raising them."""
    try:
        size_bytes = Path(request.path).stat().st_size
        with Path(request.path).open("rb") as file:
            beginning = file.read(64)
    except ValueError as error:
        return Failure("missing", f"{request.path!r} is not a valid path: {error}")
    except PermissionError as error:
        return Failure("forbidden", f"no permission to read {request.path}: {error.strerror}")
    except OSError as error:
        return Failure("missing", f"cannot open {request.path}: {error.strerror}")
    if size_bytes == 0:
        return Failure("empty", "the file is empty")
    if size_bytes > request.max_bytes:
        return Failure("too_large", f"the file has {size_bytes:,} bytes")
    if beginning.lstrip().lower().startswith(PAGE_BEGINNINGS):
        return Failure("not_a_video", "the file is an HTML or XML page, often a failed download")
    if beginning.startswith(LIST_BEGINNINGS):
        return Failure("not_a_video", "the file is a playlist")
    try:
        index = exact_frames.read_index(request.path)
        if index.width * index.height > request.max_pixels:
            return Failure("too_large", f"the frames have {index.width}x{index.height} pixels")
        first, stop = index.span(request.start_s, request.end_s)
        if first >= stop:
            return _empty_span(request, index)
        if failure := _filtered(request, index):
            return failure
        taken = _take(request, index, first, stop)
        gc.collect(1)  # frees the frame that `_is_mirrored` put into a reference cycle
        if isinstance(taken, Failure):
            return taken
        return _answer(request, index, taken, size_bytes)
    except NoVideoError as error:
        return Failure("undecodable" if error.has_stream else "no_video_stream", str(error))
    except _TooLargeError as error:
        return Failure("too_large", str(error))
    except MemoryError:
        return Failure("out_of_memory", "decoding exceeds the memory limit")
    except FFmpegError as error:
        return Failure("not_a_video", f"FFmpeg cannot open the file: {error.strerror}")
    except Exception as error:  # any decoder error on a malformed file must affect only that file
        return Failure("undecodable", f"{type(error).__name__}: {str(error)[:200]}")


def _empty_span(request: DecodeRequest, index: VideoIndex) -> Failure:
    end = "the end" if request.end_s is None else f"{request.end_s:g} s"
    return Failure(
        "empty_span",
        f"there is no frame from {request.start_s or 0:g} s to {end}; the video lasts "
        f"{index.duration_s:g} s",
    )


def _filtered(request: DecodeRequest, index: VideoIndex) -> Failure | None:
    """Return why a clip does not meet the requirements, or None if it does."""
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
    # A still image is a clip of one frame: store it once, not once per requested frame.
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
    """Return the width and height to scale to: the final square, or enough for a center crop."""
    if request.resize == "squash":
        return request.size, request.size
    scale = request.size / min(width, height)
    return max(request.size, round(width * scale)), max(request.size, round(height * scale))


def _center_crop(frames: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    top, left = (frames.shape[1] - size) // 2, (frames.shape[2] - size) // 2
    return np.ascontiguousarray(frames[:, top : top + size, left : left + size])


def _take_by_decord(
    request: DecodeRequest, index: VideoIndex, wanted: list[int]
) -> _Taken | Failure:
    import decord  # imported here so that children that only use PyAV do not load it

    decord.logging.set_level(decord.logging.QUIET)
    try:
        # Decode a frame to learn the size, because decord applies the rotation stored in the file.
        reader = decord.VideoReader(request.path, num_threads=1)
        if request.decoder == "auto" and len(reader) != index.num_frames:
            return Failure("undecodable", "decord and the container disagree on the frame count")
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
        frames=_center_crop(frames, request.size),
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
        # The file has fewer frames than the container lists, and all requested ones are past them.
        wanted = [min(number, found.num_frames - 1) for number in wanted]
        found = replace(exact_frames.frames_at(request.path, index, wanted, to_array), damaged=True)
    if not found.taken:
        return Failure("undecodable", f"none of {index.num_frames} packets could be decoded")
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
    """Return whether the file asks for a vertical flip of its frames before their rotation.

    Its display matrix (nine int32 values) then has a negative determinant.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32).astype(np.int64)[:5].tolist()
    return a * d - b * c < 0


class _ToArray:
    """Applies a frame's rotation and flip, then resizes and crops it to [size, size, 3] uint8."""

    def __init__(self, request: DecodeRequest) -> None:
        self._request = request
        self._reformatter = VideoReformatter()  # reuses its scaling tables for later frames
        self._mirrored: bool | None = None
        self.width = self.height = 0

    def __call__(self, frame: av.VideoFrame) -> npt.NDArray[np.uint8]:
        request = self._request
        if frame.width * frame.height > request.max_pixels:
            raise _TooLargeError(f"a frame has {frame.width}x{frame.height} pixels")
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
            # Read only once per file: in PyAV, side data and frame form a reference cycle that only
            # the garbage collector frees.
            self._mirrored = _is_mirrored(frame)
        if self._mirrored:
            image = image[::-1]
        turned = np.rot90(image.astype(np.uint8, copy=False), turns)
        return _center_crop(turned[None], request.size)[0]
