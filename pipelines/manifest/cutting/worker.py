"""Examines videos to be cut: how long they are, where shots begin, and what their subtitles say."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.util.queue import Queue

from pipelines.common import ray_errors, storage, tars
from pipelines.manifest.cutting import facts
from pipelines.manifest.cutting.config import CuttingConfig
from pipelines.manifest.cutting.facts import VideoFacts
from pipelines.manifest.cutting.reading import SubtitleReader
from pipelines.manifest.cutting.subtitles import SubtitleError
from pipelines.video.config import DecodeLimits, SamplingConfig
from pipelines.video.decoder import ClipDecoder
from pipelines.video.examine import Examined, ExamineRequest, ShotRules, examine_file
from pipelines.video.video_cache import VideoCache
from stgt.errors import STGTError, VideoDecodeError

logger = logging.getLogger(__name__)

AHEAD = 3
"""Number of videos that are fetched or wait for the child process at the same time."""
MOST_UNREACHABLE = 10
"""Number of videos in a row that cannot be fetched after which the run ends: then the storage is
unavailable, and not the individual files."""
TELL_EVERY_S = 2.0
MINUTE_S = 60.0


class VideoExaminer:
    """Examines the videos of one part after another (a Ray Data actor).

    Reads:
        part: Number of the part.
        is_finished: Whether an earlier run has finished the part. Then only videos that have
            changed since are examined.
    Adds:
        Nothing. A returned row means that the facts of the part are written.
    """

    def __init__(
        self, config: CuttingConfig, folder: str, num_videos: int, progress: Queue | None
    ) -> None:
        assert config.cut is not None
        self._config = config
        self._folder = folder
        self._size = facts.part_size(num_videos, config.cut)
        self._num_videos = num_videos
        self._progress = progress
        self._cache = VideoCache(config.cache_dir, int(config.cache_gb * 1e9))
        self._limits = DecodeLimits()
        self._decoder = ClipDecoder(SamplingConfig(), limits=self._limits, cache=self._cache)
        self._subtitles = SubtitleReader(config) if config.subtitles else None
        self._threads = ThreadPoolExecutor(AHEAD, thread_name_prefix="examine")
        self._num_unreachable = 0

    @ray_errors.errors_as_rows
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Examine the videos of the parts in a batch."""
        parts = zip(batch["part"].tolist(), batch["is_finished"].tolist(), strict=True)
        for part, is_finished in parts:
            self._examine_part(part, is_finished)
        return {"part": batch["part"]}

    def close(self) -> None:
        """End the child process."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()

    def _examine_part(self, part: int, is_finished: bool) -> None:
        first = part * self._size
        rows = range(first, min(first + self._size, self._num_videos))
        listed = storage.read_rows(
            storage.join(self._folder, facts.VIDEOS), rows, columns=["video_uri"]
        )
        before = [one for one in facts.read_part(self._folder, part) or () if one["reason"] is None]
        unchanged = self._threads.map(self._is_unchanged, before)
        known = {one["video_uri"]: one for one, same in zip(before, unchanged, strict=True) if same}
        missing = [row["video_uri"] for row in listed if row["video_uri"] not in known]
        if is_finished and not missing:
            return
        counted = len(listed) if is_finished else 0  # the progress begins with finished parts
        done, bad, told_at = len(known), 0, time.monotonic()

        def tell() -> None:
            self._send({"part": {"part": part, "done": done - counted, "bad": bad}})

        tell()  # starts the rate's clock
        for found in self._threads.map(self._facts_of, missing):
            self._require_reachable(found)
            known[found["video_uri"]] = found
            done, bad = done + 1, bad + (found["reason"] is not None)
            if time.monotonic() - told_at > TELL_EVERY_S or done == len(listed):
                told_at = time.monotonic()
                tell()
        in_order = [known[row["video_uri"]] for row in listed]
        storage.write_json(facts.part_uri(self._folder, part), in_order)

    def _is_unchanged(self, known: VideoFacts) -> bool:
        version = self._version_of(known["video_uri"])
        return version is not None and version == known.get("version")

    def _version_of(self, video_uri: str) -> str | None:
        """Return a text that changes when a video or its subtitles are rewritten.

        None if they cannot be looked up; the reason is found when the video is examined.
        """
        try:
            place = tars.split(video_uri)
            size_bytes, version = storage.size_and_version(video_uri if place is None else place[0])
            said = "" if self._subtitles is None else self._subtitles.version(video_uri)
        except (OSError, ValueError, SubtitleError):
            return None
        return f"{size_bytes}|{version}|{said}"

    def _require_reachable(self, found: VideoFacts) -> None:
        """Count videos in a row that could not be fetched.

        Raises:
            STGTError: There are too many.
        """
        if found["reason"] != "unreachable":
            self._num_unreachable = 0
            return
        self._num_unreachable += 1
        if self._num_unreachable >= MOST_UNREACHABLE:
            raise STGTError(
                f"{self._num_unreachable} videos in a row could not be fetched (the last one: "
                f"{found['message']}); what was found out about other videos is kept"
            )

    def _facts_of(self, video_uri: str) -> VideoFacts:
        found = facts.unknown(video_uri)
        try:
            # The version comes first, so that a video that changes meanwhile is examined again.
            found["version"] = self._version_of(video_uri)
            examined = self._examine(video_uri, None, MINUTE_S)
            if self._config.cut == "shots":
                rules = ShotRules(
                    detector=self._config.shot_detector,
                    threshold=self._config.shot_threshold,
                    min_shot_s=self._config.min_shot_s,
                )
                examined = self._examine(video_uri, rules, examined.duration_s)
        except VideoDecodeError as error:
            return {**found, "reason": error.reason, "message": error.message}
        except (STGTError, MemoryError):
            raise
        except Exception as error:  # whatever a library raises must affect only this video
            if ray_errors.disk_is_full(error):
                raise
            logger.warning("video %s: %s", video_uri, error, exc_info=True)
            message = f"{type(error).__name__}: {str(error)[:300]}"
            return {**found, "reason": "unreachable", "message": message}
        found["duration_s"] = examined.duration_s
        found["cuts_s"] = list(examined.cuts_s)
        found["num_decoded"] = examined.num_decoded
        return found if self._subtitles is None else self._subtitles.add_to(found)

    def _examine(self, video_uri: str, rules: ShotRules | None, length_s: float) -> Examined:
        """Examine a video within the time for its length, and tell how far a long one has come."""
        deadline_s = self._config.deadline_s * max(1.0, length_s / MINUTE_S)
        with _position_file() as position:

            def ask(local: str, identity: str) -> ExamineRequest:
                return ExamineRequest(
                    path=local,
                    shots=rules,
                    max_pixels=self._limits.max_pixels,
                    max_bytes=self._limits.max_bytes,
                    identity=identity,
                    index_folder=str(self._cache.index_folder),
                    progress_path=f"/proc/{os.getpid()}/fd/{position}",
                )

            if rules is None:
                return self._decoder.examine(video_uri, examine_file, ask, deadline_s)
            tell = functools.partial(self._tell_position, video_uri, position, length_s)
            with _repeating(tell):
                return self._decoder.examine(video_uri, examine_file, ask, deadline_s)

    def _tell_position(self, video_uri: str, position: int, length_s: float) -> None:
        written = os.pread(position, 64, 0).decode()
        if written.endswith("\n"):  # otherwise it is being written, or nothing was yet
            told = {"video": video_uri, "position_s": float(written), "length_s": length_s}
            self._send({"at": told})

    def _send(self, message: dict[str, Any]) -> None:
        if self._progress is None:
            return
        try:
            self._progress.put(message)
        except RayActorError as error:
            logger.warning("progress is no longer reported: %s", error)
            self._progress = None


@contextmanager
def _position_file() -> Iterator[int]:
    """Provide the descriptor of a file in memory, to which the child process writes."""
    descriptor = os.memfd_create("position")
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _repeating(call: Callable[[], None]) -> Iterator[None]:
    """Call a function every few seconds, in another thread, until the work is done."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(TELL_EVERY_S):
            call()

    thread = threading.Thread(target=repeat, name="tell-position", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
