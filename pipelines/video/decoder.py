"""Decodes exact frames of clips in a child process that can be killed.

Decoders hang, crash and exhaust memory on real-world files. Each worker therefore keeps one child
process (a `pebble` pool of size 1). A clip that exceeds its deadline or kills the child is rejected
with a reason, and a new child decodes the next clip. While one clip is decoded, the next ones are
fetched. Remote videos are kept in a cache that the workers of a node share. So are remote archives,
of which a clip's video may be a member (`NAME.tar#MEMBER`).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as DeadlineExceeded
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import tenacity
from pebble import ProcessExpired, ProcessFuture, ProcessPool

from pipelines.common import storage, tars
from pipelines.video import disk_cache
from pipelines.video.child import Decoded, DecodeRequest, Failure, begin_child, decode_file
from pipelines.video.config import ClipRequirements, DecodeLimits, DecodeReason, SamplingConfig
from pipelines.video.frame_codec import Codec
from pipelines.video.tar_members import Archive, NoMemberError, TarMembers
from pipelines.video.video_cache import OpenVideo, TooLargeError, VideoCache
from stgt.errors import VideoDecodeError

REASONS: dict[DecodeReason, str] = {
    "missing": "the file does not exist",
    "forbidden": "permission to read the file was denied",
    "unreachable": "the file could not be fetched",
    "empty": "the file is empty",
    "not_a_video": "the file is not a video in any supported format",
    "encrypted": "the video is encrypted",
    "no_video_stream": "the file has no video stream",
    "undecodable": "no frame can be decoded",
    "empty_span": "there is no frame between the clip's start and end",
    "too_large": "the file or its frames exceed the size limit",
    "out_of_memory": "decoding exceeds the memory limit",
    "timeout": "decoding exceeded the time limit",
    "crashed": "the decoder process died",
}
"""Why a clip could not be decoded; for clips rejected by filters see `pipelines.ingest.filters`."""

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Opened = TypeVar("Opened", OpenVideo, Archive)

AHEAD = 3
"""Number of clips that are fetched or wait for the decoder at the same time."""
POOLS_A_CLIP = 3
"""Number of pools to try for a clip whose child process dies before it starts decoding."""
LOOK_S = 0.5
"""Interval for checking the pool and the deadline while waiting for a clip, in seconds."""
KILL_S = 0.5
"""Part of the deadline that is reserved for killing a hung decoder, in seconds."""
START_S = 2.0
"""Time that a decoder process may take to start, in seconds, without shortening a clip's time."""
LATE_S = 1.0
"""Time after the deadline at which a pool that has not killed its child is given up, in seconds.

On a busy machine, its threads may get no turn; a child in an uninterruptible call cannot be
killed."""


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


@dataclass
class _Shared:
    """A remote video or an archive with several clips in one call of `decode_all`."""

    uses: int
    """Number of clips that are not decoded yet."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    readers: int = 0
    """Number of threads that read it now."""
    video: Any = None
    """The open video or archive."""


@dataclass
class _Clock:
    """Time that the decoder process has left for a clip, over all attempts.

    It starts when the process takes the clip up, or START_S after the process could have done so.
    """

    timeout_s: float
    allowance_s: float
    """Time that the process may take to start, in seconds."""
    ends: float | None = None
    """Value of time.monotonic() at which the time is over; None while earlier clips are decoded."""

    def start(self, allowance_s: float = 0.0) -> None:
        """Start the clock after a while, unless it starts earlier or runs already."""
        ends = time.monotonic() + allowance_s + self.timeout_s
        self.ends = ends if self.ends is None else min(self.ends, ends)

    @property
    def left_s(self) -> float:
        """Time left, in seconds; negative once it is over."""
        return self.timeout_s if self.ends is None else self.ends - time.monotonic()


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
        cache: VideoCache | None = None,
    ) -> None:
        """Start the child process.

        Args:
            sampling: which frames to decode and how to resize them.
            limits: limits on time, memory and size; a clip that exceeds one is rejected.
            codec: encoding of the returned frames; None returns an array.
            requirements: clips that do not meet these are rejected with the filter's reason.
            hash_files: whether to also hash each file.
            cache: keeps remote videos and indexes of long videos; None takes the one that all
                processes of this user share.
        """
        self._cache = cache or VideoCache()
        self._members = TarMembers(self._cache)
        self._shared: dict[str, _Shared] = {}
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
            frame_rules=sampling.frame_rules,
            index_folder=str(self._cache.index_folder),
        )
        self._memory_limit_bytes = limits.memory_limit_bytes
        self._pool = self._new_pool()
        self._renewing = threading.Lock()
        self._scheduling = threading.Lock()
        self._last: ProcessFuture[Any] | None = None
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
        pool = ProcessPool(
            max_workers=1,
            context=multiprocessing.get_context("spawn"),
            initializer=begin_child,
            initargs=(self._memory_limit_bytes,),
        )
        # This starts the child, which takes seconds on a busy machine; it is ready when the first
        # clip has been fetched.
        if not pool.active:
            raise BrokenProcessPool("the decoder process cannot be started")
        return pool

    def close(self) -> None:
        """End the child process."""
        with self._renewing:
            self._closed = True
            self._pool.stop()
            self._pool.join()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for shared in list(self._shared.values()):
            with shared.lock:
                if shared.video is not None:
                    shared.video.close()
                    shared.video = None

    def decode_all(self, clips: Iterable[ClipSpan]) -> Iterator[Decoded | VideoDecodeError]:
        """Decode clips in order; a clip that fails yields an error instead of frames.

        Clips of one remote video or archive are decoded one after the other, so that it is fetched
        once.
        """
        clips = list(clips)
        order = _order(clips)
        # A member is opened once for all its clips, and an archive is held for all members.
        uses = Counter(groups[-1] for groups in map(_groups, clips) if groups)
        uses += Counter(groups[0] for groups in set(map(_groups, clips)) if len(groups) > 1)
        for uri, count in uses.items():
            if uri in self._shared or count > 1:
                self._shared.setdefault(uri, _Shared(0)).uses += count
        outcomes = self._threads.map(self._attempt, (clips[place] for place in order))
        return _in_turn(order, outcomes)

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
        return self._on_local(clip, functools.partial(self._decode_local, clip))

    def examine(
        self,
        video_uri: str,
        work: Callable[[Request], Answer | Failure],
        ask: Callable[[str, str], Request],
        deadline_s: float,
    ) -> Answer:
        """Have the child process do other work on a whole video than decoding frames of a clip.

        Args:
            video_uri: The video, which is fetched if it is remote.
            work: A function of a module, called in the child process with the request.
            ask: Returns the request for a local path and the identity of the file, which is empty
                for a local file.
            deadline_s: Time limit in seconds, after which the child process is killed.

        Raises:
            VideoDecodeError: The work failed, with one of REASONS.
        """
        clip = ClipSpan(video_uri, video_uri)
        left_s = max(deadline_s - KILL_S, 0.5 * deadline_s)

        def examine_local(path: str, identity: str) -> Answer:
            task = functools.partial(self._in_child, work, ask(path, identity))
            return self._run(clip, task, _Clock(left_s, START_S), deadline_s)

        return self._on_local(clip, examine_local)

    def _on_local(self, clip: ClipSpan, work: Callable[[str, str], Answer]) -> Answer:
        """Work on the video of a clip as a local file, whose path and identity `work` takes."""
        uri = clip.video_uri
        with _failures(clip, uri):
            place = tars.split(uri)
        if place is None and not storage.is_remote(uri):
            return work(storage.resolve(uri), "")
        with self._fetched(clip, place) as video:
            try:
                return work(video.path, video.identity)
            except VideoDecodeError as error:
                # The path is meaningless and differs from run to run.
                message = error.message.replace(video.path, uri)
                raise VideoDecodeError(clip.clip_id, error.reason, message) from error

    def _fetched(
        self, clip: ClipSpan, place: tuple[str, str] | None
    ) -> AbstractContextManager[OpenVideo]:
        """Provide the video of a clip that is remote or a member of an archive.

        Args:
            clip: the clip.
            place: the archive and the member; None for an object of its own.
        """
        uri, max_bytes = clip.video_uri, self._request.max_bytes
        if place is None:
            return self._held(clip, uri, lambda: self._cache.open(uri, max_bytes))
        tar, name = place

        def open_member() -> OpenVideo:
            with self._held(clip, tar, lambda: self._members.open_archive(tar)) as archive:
                return self._members.open(archive, name, max_bytes)

        return self._held(clip, uri, open_member)

    @contextmanager
    def _held(self, clip: ClipSpan, uri: str, opened: Callable[[], Opened]) -> Iterator[Opened]:
        """Provide a video or an archive, and keep it open for further clips.

        Raises:
            VideoDecodeError: It cannot be opened, for whatever reason.
            OSError: The disk is full, which is no fault of the clip.
        """
        shared = self._shared.get(uri)
        if shared is None:
            with _failures(clip, uri):
                video = opened()
            try:
                yield video
            finally:
                video.close()
            return
        entered = False
        try:
            with shared.lock:
                if shared.video is None:
                    with _failures(clip, uri):
                        shared.video = opened()
                video = shared.video
                shared.readers, entered = shared.readers + 1, True
            yield video
        finally:
            with shared.lock:
                shared.uses -= 1
                shared.readers -= entered
                if shared.uses <= 0:
                    if self._shared.get(uri) is shared:
                        del self._shared[uri]
                    # A member that cannot be opened is tried again by each of its clips, so an
                    # archive may be used more often than was counted.
                    if shared.video is not None and shared.readers == 0:
                        shared.video.close()
                        shared.video = None

    def _decode_local(self, clip: ClipSpan, path: str, identity: str) -> Decoded:
        request = replace(
            self._request,
            path=path,
            name=storage.name_of(clip.video_uri),
            identity=identity,
            start_s=clip.start_s,
            end_s=clip.end_s,
            seed=clip.seed,
        )
        left_s = max(self._deadline_s - KILL_S, 0.5 * self._deadline_s)
        if request.decoder == "auto":
            # Try decord first; if it hangs, crashes or runs out of memory, try PyAV.
            try:
                return self._decode_request(clip, request, _Clock(left_s / 2, START_S))
            except VideoDecodeError as error:
                if error.reason not in ("timeout", "crashed", "out_of_memory"):
                    raise
            request = replace(request, decoder="pyav")
            return self._decode_request(clip, request, _Clock(left_s / 2, 0.0))
        return self._decode_request(clip, request, _Clock(left_s, START_S))

    def _decode_request(self, clip: ClipSpan, request: DecodeRequest, clock: _Clock) -> Decoded:
        task = functools.partial(self._in_child, decode_file, request)
        return self._run(clip, task, clock, self._deadline_s)

    def _run(
        self,
        clip: ClipSpan,
        task: Callable[[_Clock], Answer | Failure],
        clock: _Clock,
        deadline_s: float,
    ) -> Answer:
        """Run a task in the child process and raise whatever goes wrong as an error of the clip."""
        try:
            outcome = task(clock)
        except DeadlineExceeded as error:
            message = f"decoding did not finish within {deadline_s:g} s"
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

    def _in_child(
        self, work: Callable[[Request], Answer | Failure], request: Request, clock: _Clock
    ) -> Answer | Failure:
        """Work in the child process, with a new pool if the current one is broken.

        A pool stays broken for all later clips once its child dies before starting a clip, for
        example because the kernel kills it when memory runs out.
        """
        patience = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(BrokenProcessPool),
            stop=tenacity.stop_after_attempt(POOLS_A_CLIP),
            reraise=True,
        )
        return patience(self._in_one_child, work, request, clock)

    def _in_one_child(
        self, work: Callable[[Request], Answer | Failure], request: Request, clock: _Clock
    ) -> Answer | Failure:
        if clock.left_s <= 0:
            raise DeadlineExceeded
        pool = self._pool
        try:
            with self._scheduling:
                before, future = self._last, self._schedule(pool, work, request, clock.left_s)
                self._last = future
            return _answer(pool, future, before, clock)
        except BrokenProcessPool:
            self._renew(pool)
            raise
        except _PoolIsLateError as error:
            self._renew(pool)
            raise DeadlineExceeded from error

    def _renew(self, pool: ProcessPool) -> None:
        """Replace a pool, unless another clip in flight has done so."""
        with self._renewing:
            if self._pool is not pool or self._closed:
                return
            self._pool = self._new_pool()
        # Its end may take long, and no clip needs to wait for it.
        threading.Thread(target=_end, args=(pool,), name="end-pool", daemon=True).start()

    def _schedule(
        self,
        pool: ProcessPool,
        work: Callable[[Request], Answer | Failure],
        request: Request,
        timeout_s: float,
    ) -> ProcessFuture[Answer | Failure]:
        try:
            return pool.schedule(work, args=[request], timeout=timeout_s)
        except RuntimeError as error:  # pebble raises it if the pool is closed or already broken
            if self._closed:
                raise
            raise BrokenProcessPool(str(error)) from error


@contextmanager
def _failures(clip: ClipSpan, uri: str) -> Iterator[None]:
    """Turn an error of opening a clip's video, or the archive with it, into one of the clip."""
    try:
        yield
    except VideoDecodeError:
        raise  # of the archive
    except TooLargeError as error:
        reason, message, cause = "too_large", str(error), error
    except NoMemberError as error:
        reason, message, cause = "missing", f"{uri}: {error}", error
    except FileNotFoundError as error:
        reason, message, cause = "missing", f"{uri} does not exist", error
    except PermissionError as error:
        reason, message, cause = "forbidden", f"{uri}: {error.strerror or error}", error
    except Exception as error:  # a strange URI must affect only its clips
        if disk_cache.is_full(error):
            raise
        # All attempts failed, S3 rejects the name, or the URI scheme is unknown.
        said = str(error)[:300] or type(error).__name__
        reason, message, cause = "unreachable", f"{uri}: {said}", error
    else:
        return
    raise VideoDecodeError(clip.clip_id, reason, message) from cause


class _PoolIsLateError(Exception):
    """A pool has not killed its child at the deadline."""


def _answer(
    pool: ProcessPool,
    future: ProcessFuture[Answer],
    before: ProcessFuture[Any] | None,
    clock: _Clock,
) -> Answer:
    """Wait for the child's result; a pool that breaks while accepting a clip never returns one.

    Args:
        pool: the pool of the child.
        future: the result.
        before: the result of the clip that the child decodes before this one.
        clock: the time for this clip.

    Raises:
        BrokenProcessPool: The pool broke.
        TimeoutError: The time is over, and the pool has ended the child, or it has not started yet.
        _PoolIsLateError: The time is over, but the pool has not ended the child.
    """
    while not wait([future], min(LOOK_S, max(clock.left_s, 0.05))).done:
        if future.running():
            clock.start()
        elif clock.ends is None and (before is None or before.done()):
            clock.start(clock.allowance_s)
        if clock.left_s < 0 and not future.running():
            # The child is still starting. It goes on, so that the next clip finds it ready.
            raise DeadlineExceeded
        if clock.left_s < -LATE_S:
            raise _PoolIsLateError
        if not pool.active and not wait([future], LOOK_S).done:
            raise BrokenProcessPool("the pool broke while it accepted a clip")
    return future.result()


def _end(pool: ProcessPool) -> None:
    """End a pool whose child is dead or hangs."""
    pool.stop()
    pool.join()


def _groups(clip: ClipSpan) -> tuple[str, ...]:
    """Return what is fetched or copied for a clip: an archive and its member, or a remote video."""
    archive = tars.archive_of(clip.video_uri)
    if archive is not None:
        return archive, clip.video_uri
    return (clip.video_uri,) if storage.is_remote(clip.video_uri) else ()


def _order(clips: Sequence[ClipSpan]) -> list[int]:
    """Return the places of clips in the order of decoding.

    It is their own order, except that clips of one remote video or archive follow its first clip,
    and clips of one member of an archive its first one.
    """
    first: dict[str, int] = {}
    keys: list[tuple[int, ...]] = []
    for place, clip in enumerate(clips):
        keys.append((*(first.setdefault(uri, place) for uri in _groups(clip)), place))
    return sorted(range(len(clips)), key=keys.__getitem__)


def _in_turn(
    order: Sequence[int], outcomes: Iterable[Decoded | VideoDecodeError]
) -> Iterator[Decoded | VideoDecodeError]:
    """Yield outcomes by ascending place; those that come early wait in a temporary file.

    Args:
        order: the place of each outcome.
        outcomes: the outcomes.
    """
    early: dict[int, int] = {}  # position in the file by place
    following = 0
    with TemporaryFile() as file:
        for place, outcome in zip(order, outcomes, strict=True):
            if place != following:
                early[place] = file.seek(0, os.SEEK_END)
                pickle.dump(outcome, file)
                continue
            yield outcome
            following += 1
            while following in early:
                file.seek(early.pop(following))
                yield pickle.load(file)  # noqa: S301 - written above
                following += 1
