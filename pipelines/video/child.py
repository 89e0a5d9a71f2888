"""Code that runs in the decoder's child process: decodes the requested frames of one video file.

Does not import torch, Ray or the project's configs, so the child starts fast and stays small.

Legend: F decoded frames, H and W pixels of a stored frame.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import hashlib
import logging
import resource
import signal
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import av
import av.logging
import numpy as np
import numpy.typing as npt
from av.error import FFmpegError
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import VideoReformatter

from pipelines.video import animated_webp, exact_frames
from pipelines.video.exact_frames import EncryptedError, FrameRules, NoVideoError, VideoIndex
from pipelines.video.frame_codec import Codec, encode_frames
from pipelines.video.frame_hash import hash_frames
from pipelines.video.index_cache import IndexCache
from stgt.inputs.frame_choice import FrameChoice, choose_frames

DECORD_CODECS = frozenset({"h264", "vp8", "vp9"})
"""Codecs for which decord is exact, given trusted timestamps and clean cuts."""
DECORD_TOLERANCE = 6.0
"""Mean difference of a frame, in gray levels, up to which decord and PyAV show the same: they scale
differently. Different frames of a video are mostly further apart."""
HASH_BYTES = 16
HASH_CHUNK_BYTES = 1024 * 1024
HASHES_IN_MEMORY = 256
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NOT_VIDEOS: dict[bytes, str] = {
    b"ffconcat": "a playlist",
    b"#extm3u": "a playlist",
    b"version https://git-lfs": "a Git LFS pointer, not the video itself; fetch it with git lfs "
    "pull",
    b"<!doctype": "an HTML or XML page, often a failed download",
    b"<html": "an HTML or XML page, often a failed download",
    b"<head": "an HTML or XML page, often a failed download",
    b"<?xml": "an HTML or XML page, often a failed download",
    b"<error": "an HTML or XML page, often a failed download",
}
"""What a file is that begins with some text, ignoring case."""
JSON_BEGINNINGS = (b'{"', b"[{", b'["', b"{}", b"[]")
PICTURE_ENDINGS = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".jfif", ".jpe", ".jpeg", ".jpg", ".jxl", ".png", ".ppm"}
    | {".tif", ".tiff", ".webp"}
)
NOT_FILES = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
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
    frame_rules: FrameRules = 2
    name: str = ""
    """Name of the video, if `path` is a copy under another name."""
    identity: str = ""
    """Text that changes whenever the contents of the file change; empty takes it from the file
    system."""
    index_folder: str = ""
    """Folder in which processes of this node share the indexes of long videos; empty for none."""
    min_short_side: int | None = None
    min_duration_s: float | None = None
    max_duration_s: float | None = None


@dataclass(frozen=True)
class Facts:
    """Properties of the source video of a clip."""

    width: int
    height: int
    """Size of a frame as displayed, in pixels. By frame rules 1, pixels count as square."""
    fps: float
    duration_s: float
    """Duration of the whole video. By frame rules 2, it counts from the start of the file."""
    num_source_frames: int
    codec: str
    """Name of the codec. Of a single picture whose file is not named as one, it is given as
    `still picture (NAME)`."""
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
    hashes: list[int] = field(default_factory=list)
    """F perceptual hashes of encoded frames; empty if the frames are an array."""


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


class FileRequest(Protocol):
    """What a request of any kind says about its file."""

    @property
    def path(self) -> str:
        """The file."""
        ...

    @property
    def identity(self) -> str:
        """Text that changes whenever the contents of the file change; may be empty."""
        ...

    @property
    def max_bytes(self) -> int:
        """Largest file to open, in bytes."""
        ...


@dataclass(frozen=True)
class OpenedFile:
    """A file that may be a video: it can be read, is not empty, and does not hold text."""

    identity: str
    """Text that changes whenever the contents of the file change."""
    size_bytes: int
    beginning: bytes
    """The first bytes of the file."""


Request = TypeVar("Request", bound=FileRequest)
Answer = TypeVar("Answer")


def decode_file(request: DecodeRequest) -> Decoded | Failure:
    """Decode one clip; return problems with the file as a `Failure` instead of raising them."""
    return on_file(request, _decode)


def on_file(
    request: Request, work: Callable[[Request, OpenedFile], Answer | Failure]
) -> Answer | Failure:
    """Work on one video; return problems with the file as a `Failure` instead of raising them.

    Args:
        request: Names the file.
        work: Called if the file may be a video.
    """
    try:
        status = Path(request.path).stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
            kind = NOT_FILES.get(stat.S_IFMT(status.st_mode), "no regular file")
            return Failure("not_a_video", f"{request.path} is {kind}, not a video file")
        with Path(request.path).open("rb") as file:
            beginning = file.read(64)
    except ValueError as error:
        return Failure("missing", f"{request.path!r} is not a valid path: {error}")
    except PermissionError as error:
        return Failure("forbidden", f"no permission to read {request.path}: {error.strerror}")
    except OSError as error:
        return Failure("missing", f"cannot open {request.path}: {error.strerror}")
    if status.st_size == 0:
        return Failure("empty", "the file is empty")
    if status.st_size > request.max_bytes:
        return Failure("too_large", f"the file has {status.st_size:,} bytes")
    if kind := _text_kind(beginning):
        return Failure("not_a_video", f"the file is {kind}")
    identity = request.identity or (
        f"{request.path}|{status.st_ino}|{status.st_size}|{status.st_mtime_ns}"
    )
    try:
        return work(request, OpenedFile(identity, status.st_size, beginning))
    except EncryptedError:
        return Failure("encrypted", "the video is encrypted; its key is needed to decode it")
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


def _text_kind(beginning: bytes) -> str | None:
    """Return what a text file that was saved as a video is, from its beginning."""
    text = beginning.removeprefix(BYTE_ORDER_MARK).lstrip().lower()
    for known, kind in NOT_VIDEOS.items():
        if text.startswith(known):
            return kind
    compact = b"".join(text.split())
    if compact.startswith(JSON_BEGINNINGS) and compact.isascii():
        return "JSON text, often the error message of a server"
    return None


def _decode(request: DecodeRequest, file: OpenedFile) -> Decoded | Failure:
    animated = animated_webp.matches(file.beginning)
    read = animated_webp.read_index if animated else exact_frames.read_index
    index = indexes_in(request.index_folder).get(
        file.identity, functools.partial(read, request.path)
    )
    if index.width * index.height > request.max_pixels:
        return Failure("too_large", f"the frames have {index.width}x{index.height} pixels")
    first, stop = index.span(request.start_s, request.end_s, request.frame_rules)
    if first >= stop:
        return _empty_span(request, index)
    if failure := _filtered(request, index):
        return failure
    taken = _take(request, index, first, stop, animated)
    gc.collect(1)  # frees the frame that `_is_mirrored` put into a reference cycle
    if isinstance(taken, Failure):
        return taken
    return _answer(request, index, taken, file.size_bytes, file.identity)


@functools.cache
def indexes_in(folder: str) -> IndexCache:
    """Return the indexes of videos in a folder, which this process keeps in memory as well."""
    return IndexCache(folder)


def _empty_span(request: DecodeRequest, index: VideoIndex) -> Failure:
    end = "the end" if request.end_s is None else f"{request.end_s:g} s"
    begins = f" begins at {index.starts_s:g} s and" if index.starts_s else ""
    return Failure(
        "empty_span",
        f"there is no frame from {request.start_s or 0:g} s to {end}; the video{begins} "
        f"{'ends at' if begins else 'lasts'} {index.duration_s(request.frame_rules):g} s",
    )


def _aspect(request: DecodeRequest, index: VideoIndex) -> float:
    """Return the width of a displayed pixel divided by its height; 1 by frame rules 1."""
    return 1.0 if request.frame_rules == 1 else index.pixel_aspect


def _filtered(request: DecodeRequest, index: VideoIndex) -> Failure | None:
    """Return why a clip does not meet the requirements, or None if it does."""
    width, height = round(index.width * _aspect(request, index)), index.height
    least, short_side = request.min_short_side, min(width, height)
    if least is not None and short_side < least:
        return Failure("too_small", f"{width}x{height} pixels")
    duration_s = index.duration_s(request.frame_rules)
    start_s = request.start_s or 0.0
    end_s = duration_s if request.end_s is None else min(request.end_s, duration_s)
    if request.min_duration_s is not None and end_s - start_s < request.min_duration_s:
        return Failure("too_short", f"{end_s - start_s:.2f} s")
    if request.max_duration_s is not None and end_s - start_s > request.max_duration_s:
        return Failure("too_long", f"{end_s - start_s:.2f} s")
    return None


def _answer(
    request: DecodeRequest, index: VideoIndex, taken: _Taken, size_bytes: int, identity: str
) -> Decoded | Failure:
    fps = index.fps(request.frame_rules)
    facts = Facts(
        width=taken.width,
        height=taken.height,
        fps=fps,
        duration_s=taken.num_source / fps
        if taken.num_source != index.num_frames
        else index.duration_s(request.frame_rules),
        num_source_frames=taken.num_source,
        codec=_codec_name(request, index),
        decoder=taken.decoder,
        salvaged=taken.damaged,
        size_bytes=size_bytes,
        video_hash=_hash(request.path, identity) if request.hashed else "",
    )
    if request.codec is None:
        return Decoded(taken.frames, [], taken.indices, facts)
    # A still image is a clip of one frame: store it once, not once per requested frame.
    kept = 1 if taken.num_source == 1 else len(taken.frames)
    coded = encode_frames(taken.frames[:kept], request.codec, request.jpeg_quality)
    hashes = hash_frames(taken.frames[:kept]).tolist()
    return Decoded(taken.frames[:0], coded, taken.indices[:kept], facts, hashes)


def _codec_name(request: DecodeRequest, index: VideoIndex) -> str:
    ending = Path(request.name or request.path).suffix.lower()
    if request.frame_rules == 1 or not index.is_still or ending in PICTURE_ENDINGS:
        return index.codec
    return f"still picture ({index.codec})"


@functools.lru_cache(HASHES_IN_MEMORY)
def _hash(path: str, identity: str) -> str:
    """Hash a file. Clips of one video mostly follow each other, so recent hashes are kept."""
    del identity  # part of the key of the cache
    found = hashlib.blake2b(digest_size=HASH_BYTES)
    with Path(path).open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


def _take(
    request: DecodeRequest, index: VideoIndex, first: int, stop: int, animated: bool
) -> _Taken | Failure:
    generator = np.random.default_rng(tuple(request.seed))
    chosen = choose_frames(stop - first, request.num_frames, request.frame_choice, generator)
    wanted = (first + chosen).tolist()
    if animated:
        return _take_by_pillow(request, index, wanted)
    if request.decoder == "decord":
        return _take_by_decord(request, index, wanted)
    exact = index.codec in DECORD_CODECS and index.clean_cuts and len(index.key_pts) > 0
    listed = index.containers & exact_frames.TRUSTED
    if request.decoder == "pyav" or not exact or not listed or index.broken_tail:
        return _take_by_pyav(request, index, wanted)
    if request.frame_rules == 1:
        taken = _take_by_decord(request, index, wanted)
        return taken if isinstance(taken, _Taken) else _take_by_pyav(request, index, wanted)
    # Decord ignores flips and some rotations, and conceals errors in the stream, so its frames are
    # used only if they show what the exact frames show.
    found = _take_by_pyav(request, index, wanted)
    if isinstance(found, Failure) or found.damaged:
        return found
    taken = _take_by_decord(request, index, wanted)
    return taken if isinstance(taken, _Taken) and _show_the_same(taken, found) else found


def _show_the_same(one: _Taken, other: _Taken) -> bool:
    if one.indices != other.indices or (one.width, one.height) != (other.width, other.height):
        return False
    differences = np.abs(one.frames.astype(np.int16) - other.frames)
    return float(differences.mean(axis=(1, 2, 3)).max()) < DECORD_TOLERANCE


def _target_size(request: DecodeRequest, width: int, height: int) -> tuple[int, int]:
    """Return the width and height to scale to: the final square, or enough for a center crop."""
    if request.resize == "squash":
        return request.size, request.size
    scale = request.size / min(width, height)
    return max(request.size, round(width * scale)), max(request.size, round(height * scale))


def _display_size(width: int, height: int, aspect: float, sideways: bool) -> tuple[int, int]:
    """Return the display size of a frame, in square pixels.

    Args:
        width: width of the frame after its rotation.
        height: height of the frame after its rotation.
        aspect: width of a pixel divided by its height, before the rotation.
        sideways: whether the rotation exchanges width and height.
    """
    if sideways:
        return width, max(1, round(height * aspect))
    return max(1, round(width * aspect)), height


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
        sideways = (height, width) == (index.width, index.height) != (width, height)
        width, height = _display_size(width, height, _aspect(request, index), sideways)
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
    to_array = _ToArray(request, _aspect(request, index))
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


def _take_by_pillow(request: DecodeRequest, index: VideoIndex, wanted: list[int]) -> _Taken:
    to_array = _ToArray(request, _aspect(request, index))
    taken = animated_webp.frames_at(request.path, wanted, to_array)
    return _Taken(
        frames=np.stack([taken[number] for number in wanted]),
        indices=wanted,
        num_source=index.num_frames,
        decoder="pillow",
        damaged=False,
        width=to_array.width,
        height=to_array.height,
    )


def _unknown_side_data(kinds: type[SideDataType], value: object) -> SideDataType:
    """Return a member for a kind of side data that this version of PyAV does not list.

    Without it, PyAV refuses all side data of a frame, including the display matrix.
    """
    member = object.__new__(kinds)
    member._name_, member._value_ = f"UNKNOWN_{value}", value
    return member


SideDataType._missing_ = classmethod(_unknown_side_data)  # type: ignore[assignment]


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

    def __init__(self, request: DecodeRequest, aspect: float) -> None:
        self._request = request
        self._aspect = aspect
        self._reformatter = VideoReformatter()  # reuses its scaling tables for later frames
        self._mirrored: bool | None = None
        self.width = self.height = 0

    def __call__(self, frame: av.VideoFrame) -> npt.NDArray[np.uint8]:
        request = self._request
        if frame.width * frame.height > request.max_pixels:
            raise _TooLargeError(f"a frame has {frame.width}x{frame.height} pixels")
        turns = round(getattr(frame, "rotation", 0) / 90) % 4
        sideways = turns % 2 == 1
        turned = (frame.height, frame.width) if sideways else (frame.width, frame.height)
        self.width, self.height = _display_size(*turned, self._aspect, sideways)
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
        upright = np.rot90(image.astype(np.uint8, copy=False), turns)
        return _center_crop(upright[None], request.size)[0]
