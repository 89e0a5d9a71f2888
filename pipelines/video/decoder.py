"""Exact frames of one clip, decoded in a child process that can be killed.

Decoders hang, crash and eat memory on real files. Each decoding worker therefore keeps one child
process (a `pebble` pool of one): a clip that outlives its deadline or kills the child is given up
with a reason, and the next clip finds a new child. While one clip is decoded, the next ones are
fetched.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as DeadlineExceeded
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import numpy as np
import numpy.typing as npt
import tenacity
from pebble import ProcessExpired, ProcessFuture, ProcessPool

from pipelines.common import storage
from pipelines.video.child import Decoded, DecodeRequest, Failure, begin_child, decode_file
from pipelines.video.config import ClipRequirements, DecodeLimits, DecodeReason, SamplingConfig
from pipelines.video.frame_codec import Codec
from stgt.errors import VideoDecodeError

REASONS: dict[DecodeReason, str] = {
    "missing": "there is no file",
    "forbidden": "the file may not be read",
    "unreachable": "the file could not be fetched",
    "empty": "the file has no bytes",
    "not_a_video": "no demuxer opens the file",
    "no_video_stream": "the file has no video stream",
    "undecodable": "no frame can be decoded",
    "empty_span": "no frame lies between the clip's start and end",
    "too_large": "the file has more bytes, or its frames have more pixels, than allowed",
    "out_of_memory": "decoding needs more memory than allowed",
    "timeout": "decoding took longer than the deadline",
    "crashed": "the decoder process died",
}
"""Why a clip gives no frames; `pipelines.filters` has the reasons of those left out on purpose."""

AHEAD = 3
"""Clips that are fetched or wait for the decoder at a time."""
POOLS_A_CLIP = 3
"""How often a clip is given to another pool when its child dies with no clip begun."""
LOOK_S = 1.0
"""Time between two looks at the pool that a clip is waited for from."""
KILL_S = 0.5
"""Part of the deadline that is kept for killing a decoder that hangs."""


@dataclass(frozen=True)
class ClipSpan:
    """Where a clip is to be found."""

    clip_id: str
    video_uri: str
    start_s: float | None = None
    end_s: float | None = None
    seed: tuple[int, ...] = (0,)
    """Of a random choice of frames."""


def read_clip(path: str | Path, num_frames: int, size: int) -> npt.NDArray[np.uint8]:
    """Evenly spaced frames of one video file, for a notebook; data sets go through `jobs.ingest`.

    Args:
        path: the video, local or s3://.
        num_frames: F.
        size: edge of a frame in pixels; the aspect ratio is not kept, as in the published
            evaluation.

    Returns:
        [F, size, size, 3] uint8.

    Raises:
        VideoDecodeError: the file gives no frames; it says why.
    """
    with ClipDecoder(SamplingConfig(num_frames=num_frames, size=size)) as decoder:
        return decoder.decode(ClipSpan(str(path), str(path))).frames


class ClipDecoder:
    """Decodes clips one after another; to be closed after use."""

    def __init__(
        self,
        sampling: SamplingConfig,
        *,
        limits: DecodeLimits = DecodeLimits(),  # noqa: B008 - frozen
        codec: Codec | None = None,
        requirements: ClipRequirements = ClipRequirements(),  # noqa: B008 - frozen
        hash_files: bool = False,
    ) -> None:
        """Start the child process.

        Args:
            sampling: which frames, and how they are scaled.
            limits: time, memory and sizes beyond which a clip is given up.
            codec: how frames are encoded; None returns them as an array.
            requirements: clips that do not meet them are refused with the filter's reason.
            hash_files: also compute a digest of each file's bytes.
        """
        self._deadline_s = limits.deadline_s
        self._request = DecodeRequest(
            path="",
            num_frames=sampling.num_frames,
            frame_choice=sampling.frame_choice,
            size=sampling.size,
            resize=sampling.resize,
            decoder=sampling.decoder,
            max_pixels=limits.max_pixels,
            max_bytes=limits.max_bytes,
            codec=codec,
            jpeg_quality=sampling.jpeg_quality,
            hashed=hash_files,
            min_short_side=requirements.min_short_side,
            min_duration_s=requirements.min_duration_s,
            max_duration_s=requirements.max_duration_s,
        )
        self._memory_limit_bytes = limits.memory_limit_bytes
        self._pool = self._new_pool()
        self._renewing = threading.Lock()
        self._closed = False
        self._threads = ThreadPoolExecutor(AHEAD, thread_name_prefix="fetch")

    def __enter__(self) -> ClipDecoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _new_pool(self) -> ProcessPool:
        # spawn: a fork of a process with threads and an open Ray connection is not safe.
        return ProcessPool(
            max_workers=1,
            context=multiprocessing.get_context("spawn"),
            initializer=begin_child,
            initargs=(self._memory_limit_bytes,),
        )

    def close(self) -> None:
        """End the child process."""
        with self._renewing:
            self._closed = True
            self._pool.stop()
            self._pool.join()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def decode_all(self, clips: Iterable[ClipSpan]) -> Iterator[Decoded | VideoDecodeError]:
        """The frames of many clips, in their order; an error in place of those that have none."""
        return self._threads.map(self._attempt, clips)

    def _attempt(self, clip: ClipSpan) -> Decoded | VideoDecodeError:
        try:
            return self.decode(clip)
        except VideoDecodeError as error:
            return error

    def decode(self, clip: ClipSpan) -> Decoded:
        """The frames of a clip.

        Raises:
            VideoDecodeError: with one of REASONS.
        """
        uri = clip.video_uri
        if not storage.is_remote(uri):
            return self._decode_local(clip, storage.resolve(uri))
        with TemporaryDirectory() as folder:
            local = Path(folder) / "video"  # a key may be no file name
            if failure := self._fetch(uri, local):
                raise VideoDecodeError(clip.clip_id, failure.reason, failure.message)
            try:
                return self._decode_local(clip, str(local))
            except VideoDecodeError as error:
                # The temporary name differs from run to run, and says nothing.
                message = error.message.replace(str(local), uri)
                raise VideoDecodeError(clip.clip_id, error.reason, message) from error

    def _fetch(self, uri: str, local: Path) -> Failure | None:
        """Copy a remote file to a local one, unless there is a reason not to."""
        try:
            size_bytes = storage.size_bytes(uri)
            if size_bytes > self._request.max_bytes:
                return Failure("too_large", f"a file of {size_bytes:,} bytes")
            storage.fetch_file(uri, local)
        except FileNotFoundError:
            return Failure("missing", f"no object {uri}")
        except PermissionError as error:
            return Failure("forbidden", f"{uri} may not be read: {error}")
        except (OSError, ValueError, ImportError) as error:
            # Given up after many attempts, a name that S3 refuses, or a scheme that nobody knows.
            return Failure("unreachable", f"{uri}: {str(error)[:300]}")
        return None

    def _decode_local(self, clip: ClipSpan, path: str) -> Decoded:
        request = replace(
            self._request, path=path, start_s=clip.start_s, end_s=clip.end_s, seed=clip.seed
        )
        left_s = max(self._deadline_s - KILL_S, 0.5 * self._deadline_s)
        if request.decoder == "auto":
            # decord first, where it is exact; what hangs or kills it gets a try with PyAV.
            try:
                return self._run(clip, request, left_s / 2)
            except VideoDecodeError as error:
                if error.reason not in ("timeout", "crashed", "out_of_memory"):
                    raise
            left_s /= 2
            request = replace(request, decoder="pyav")
        return self._run(clip, request, left_s)

    def _run(self, clip: ClipSpan, request: DecodeRequest, timeout_s: float) -> Decoded:
        try:
            outcome = self._in_child(request, timeout_s)
        except DeadlineExceeded as error:
            message = f"gave up after {self._deadline_s:g} s"
            raise VideoDecodeError(clip.clip_id, "timeout", message) from error
        except ProcessExpired as error:
            message = f"the decoder died with code {error.exitcode}"
            raise VideoDecodeError(clip.clip_id, "crashed", message) from error
        except BrokenProcessPool as error:
            message = f"the decoder died {POOLS_A_CLIP} times before it began"
            raise VideoDecodeError(clip.clip_id, "crashed", message) from error
        except MemoryError as error:
            message = "decoding needs more memory than is allowed"
            raise VideoDecodeError(clip.clip_id, "out_of_memory", message) from error
        if isinstance(outcome, Failure):
            raise VideoDecodeError(clip.clip_id, outcome.reason, outcome.message)
        return outcome

    def _in_child(self, request: DecodeRequest, timeout_s: float) -> Decoded | Failure:
        """What the child answers; a pool that cannot be used any more is replaced.

        A child that dies with no clip begun, as one that the kernel kills for want of memory may,
        leaves its pool broken for all clips to come.
        """
        patience = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(BrokenProcessPool),
            stop=tenacity.stop_after_attempt(POOLS_A_CLIP),
            reraise=True,
        )
        return patience(self._in_one_child, request, timeout_s)

    def _in_one_child(self, request: DecodeRequest, timeout_s: float) -> Decoded | Failure:
        pool = self._pool
        try:
            return _answer(pool, self._schedule(pool, request, timeout_s))
        except BrokenProcessPool:
            with self._renewing:  # the other clips under way have met the same
                if self._pool is pool and not self._closed:
                    pool.stop()
                    pool.join()
                    self._pool = self._new_pool()
            raise

    def _schedule(
        self, pool: ProcessPool, request: DecodeRequest, timeout_s: float
    ) -> ProcessFuture[Decoded | Failure]:
        try:
            return pool.schedule(decode_file, args=[request], timeout=timeout_s)
        except RuntimeError as error:  # pebble's word for a pool that is closed, or broke earlier
            if self._closed:
                raise
            raise BrokenProcessPool(str(error)) from error


def _answer(pool: ProcessPool, future: ProcessFuture[Decoded | Failure]) -> Decoded | Failure:
    """What a pool's child answers; a pool never answers a clip that it is given as it breaks."""
    while not wait([future], LOOK_S).done:
        if not pool.active and not wait([future], LOOK_S).done:
            raise BrokenProcessPool("the pool broke as it was given a clip")
    return future.result()
