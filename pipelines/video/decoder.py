"""Decodes exact frames of clips in a child process that can be killed.

Decoders hang, crash and exhaust memory on real-world files. Each worker therefore keeps one child
process (a `pebble` pool of size 1). A clip that exceeds its deadline or kills the child is rejected
with a reason, and a new child decodes the next clip. While one clip is decoded, the next ones are
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
    "missing": "the file does not exist",
    "forbidden": "permission to read the file was denied",
    "unreachable": "the file could not be fetched",
    "empty": "the file is empty",
    "not_a_video": "the file is not a video in any supported format",
    "no_video_stream": "the file has no video stream",
    "undecodable": "no frame can be decoded",
    "empty_span": "there is no frame between the clip's start and end",
    "too_large": "the file or its frames exceed the size limit",
    "out_of_memory": "decoding exceeds the memory limit",
    "timeout": "decoding exceeded the time limit",
    "crashed": "the decoder process died",
}
"""Why a clip could not be decoded; for clips rejected by filters see `pipelines.ingest.filters`."""

AHEAD = 3
"""Number of clips that are fetched or wait for the decoder at the same time."""
POOLS_A_CLIP = 3
"""Number of pools to try for a clip whose child process dies before it starts decoding."""
LOOK_S = 1.0
"""Interval for checking that the pool is still alive while waiting for a clip, in seconds."""
KILL_S = 0.5
"""Part of the deadline that is reserved for killing a hung decoder, in seconds."""


@dataclass(frozen=True)
class ClipSpan:
    """A time span of a video file."""

    clip_id: str
    video_uri: str
    start_s: float | None = None
    end_s: float | None = None
    seed: tuple[int, ...] = (0,)
    """Seed for random frame choice."""


def read_clip(path: str | Path, num_frames: int, size: int) -> npt.NDArray[np.uint8]:
    """Decode evenly spaced frames of one video, e.g. in a notebook; use `jobs.ingest` for datasets.

    Args:
        path: local path or s3:// URI of the video.
        num_frames: F.
        size: edge length of a frame in pixels; the aspect ratio is ignored, as in the published
            evaluation.

    Returns:
        [F, size, size, 3] uint8.

    Raises:
        VideoDecodeError: The file could not be decoded.
    """
    with ClipDecoder(SamplingConfig(num_frames=num_frames, size=size)) as decoder:
        return decoder.decode(ClipSpan(str(path), str(path))).frames


class ClipDecoder:
    """Decodes clips one at a time in a child process; close it after use."""

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
            sampling: which frames to decode and how to resize them.
            limits: limits on time, memory and size; a clip that exceeds one is rejected.
            codec: encoding of the returned frames; None returns an array.
            requirements: clips that do not meet these are rejected with the filter's reason.
            hash_files: whether to also hash each file.
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
        # spawn, because forking a process with threads and an open Ray connection is not safe.
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
        """Decode clips in order; a clip that fails yields an error instead of frames."""
        return self._threads.map(self._attempt, clips)

    def _attempt(self, clip: ClipSpan) -> Decoded | VideoDecodeError:
        try:
            return self.decode(clip)
        except VideoDecodeError as error:
            return error

    def decode(self, clip: ClipSpan) -> Decoded:
        """Decode the frames of a clip.

        Raises:
            VideoDecodeError: The clip failed, with one of REASONS or a filter's reason.
        """
        uri = clip.video_uri
        if not storage.is_remote(uri):
            return self._decode_local(clip, storage.resolve(uri))
        with TemporaryDirectory() as folder:
            local = Path(folder) / "video"  # an S3 key may not be a valid file name
            if failure := self._fetch(uri, local):
                raise VideoDecodeError(clip.clip_id, failure.reason, failure.message)
            try:
                return self._decode_local(clip, str(local))
            except VideoDecodeError as error:
                # The temporary name is meaningless and differs from run to run.
                message = error.message.replace(str(local), uri)
                raise VideoDecodeError(clip.clip_id, error.reason, message) from error

    def _fetch(self, uri: str, local: Path) -> Failure | None:
        """Copy a remote file to a local path; return the reason if that fails."""
        try:
            size_bytes = storage.size_bytes(uri)
            if size_bytes > self._request.max_bytes:
                return Failure("too_large", f"the file has {size_bytes:,} bytes")
            storage.fetch_file(uri, local)
        except FileNotFoundError:
            return Failure("missing", f"{uri} does not exist")
        except PermissionError as error:
            return Failure("forbidden", f"no permission to read {uri}: {error}")
        except (OSError, ValueError, ImportError) as error:
            # All attempts failed, S3 rejects the name, or the URI scheme is unknown.
            return Failure("unreachable", f"{uri}: {str(error)[:300]}")
        return None

    def _decode_local(self, clip: ClipSpan, path: str) -> Decoded:
        request = replace(
            self._request, path=path, start_s=clip.start_s, end_s=clip.end_s, seed=clip.seed
        )
        left_s = max(self._deadline_s - KILL_S, 0.5 * self._deadline_s)
        if request.decoder == "auto":
            # Try decord first; if it hangs, crashes or runs out of memory, try PyAV.
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
            message = f"decoding did not finish within {self._deadline_s:g} s"
            raise VideoDecodeError(clip.clip_id, "timeout", message) from error
        except ProcessExpired as error:
            message = f"the decoder process died with exit code {error.exitcode}"
            raise VideoDecodeError(clip.clip_id, "crashed", message) from error
        except BrokenProcessPool as error:
            message = f"the decoder process died {POOLS_A_CLIP} times before it started decoding"
            raise VideoDecodeError(clip.clip_id, "crashed", message) from error
        except MemoryError as error:
            message = "decoding exceeds the memory limit"
            raise VideoDecodeError(clip.clip_id, "out_of_memory", message) from error
        if isinstance(outcome, Failure):
            raise VideoDecodeError(clip.clip_id, outcome.reason, outcome.message)
        return outcome

    def _in_child(self, request: DecodeRequest, timeout_s: float) -> Decoded | Failure:
        """Decode in the child process, with a new pool if the current one is broken.

        A pool stays broken for all later clips once its child dies before starting a clip, for
        example because the kernel kills it when memory runs out.
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
            with self._renewing:  # other clips in flight see the same broken pool
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
        except RuntimeError as error:  # pebble raises it if the pool is closed or already broken
            if self._closed:
                raise
            raise BrokenProcessPool(str(error)) from error


def _answer(pool: ProcessPool, future: ProcessFuture[Decoded | Failure]) -> Decoded | Failure:
    """Wait for the child's result; a pool that breaks while accepting a clip never returns one."""
    while not wait([future], LOOK_S).done:
        if not pool.active and not wait([future], LOOK_S).done:
            raise BrokenProcessPool("the pool broke while it accepted a clip")
    return future.result()
