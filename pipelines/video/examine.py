"""Examines whole videos in the decoder's child process: how long they are, and where shots change.

The duration comes from the last packets of a file, without decoding. Changes of shots are found by
PySceneDetect (https://www.scenedetect.com) with its PyAV backend, whose times are presentation
times, so that they are exact for videos of variable frame rate as well.

Times count from the start of the file, as those of clips do.
"""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import av
import numpy as np
from av.video.stream import VideoStream

from pipelines.video import animated_webp, exact_frames
from pipelines.video.child import Failure, OpenedFile, indexes_in, on_file
from pipelines.video.exact_frames import VideoIndex

if TYPE_CHECKING:
    from scenedetect import SceneDetector

ShotDetector = Literal["adaptive", "content", "hash", "histogram", "threshold"]

TELL_EVERY_S = 1.0
LEAST_DECODED = 0.5
"""Share of a video's frames that must be decodable to look for shots. PySceneDetect skips some
broken frames, and ends where many of them follow each other."""


@dataclass(frozen=True, kw_only=True)
class ShotRules:
    """Which changes between frames count as a change of shot."""

    detector: ShotDetector
    """A detector of PySceneDetect."""
    threshold: float | None
    """Threshold of the detector; None takes its default."""
    min_shot_s: float
    """Time after a change within which the detector reports no other, in seconds."""


@dataclass(frozen=True, kw_only=True)
class ExamineRequest:
    """What to find out about a video. Holds only plain values: it is sent to another process."""

    path: str
    shots: ShotRules | None = None
    """How to find shots; None asks for the duration alone."""
    max_pixels: int
    max_bytes: int
    identity: str = ""
    """Text that changes whenever the contents of the file change; empty takes it from the file
    system."""
    index_folder: str = ""
    """Folder in which processes of this node share the indexes of long videos; empty for none."""
    progress_path: str = ""
    """File for the number of seconds that were examined so far; empty for none."""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What was found out about a video."""

    duration_s: float
    """Time at which the last frame ends, in seconds."""
    cuts_s: tuple[float, ...] = ()
    """Ascending times at which another shot begins, in seconds."""
    num_decoded: int = 0
    """Number of frames that were decoded."""


def examine_file(request: ExamineRequest) -> Examined | Failure:
    """Examine a video; return problems with the file as a `Failure` instead of raising them."""
    return on_file(request, _examine)


def _examine(request: ExamineRequest, file: OpenedFile) -> Examined | Failure:
    animated = animated_webp.matches(file.beginning)
    if request.shots is None and not animated:
        duration_s = exact_frames.end_of_last_packets(request.path)
        if duration_s is not None:
            return Examined(duration_s=duration_s)
    read = animated_webp.read_index if animated else exact_frames.read_index
    index = indexes_in(request.index_folder).get(
        file.identity, functools.partial(read, request.path)
    )
    duration_s = index.duration_s(2)
    if request.shots is None or index.num_frames == 1:
        return Examined(duration_s=duration_s)
    if animated:
        return Failure("undecodable", "shots of animated WebP files cannot be found; use windows")
    if index.width * index.height > request.max_pixels:
        return Failure("too_large", f"the frames have {index.width}x{index.height} pixels")
    return _with_shots(request, request.shots, index)


def _with_shots(request: ExamineRequest, rules: ShotRules, index: VideoIndex) -> Examined | Failure:
    import cv2
    from scenedetect import FrameTimecode, SceneManager, VideoStreamAv
    from scenedetect.video_stream import FrameRateUnavailable

    class Watched(VideoStreamAv):
        """The backend, on one thread, which writes down how far it has come."""

        def __init__(self, path: str, frame_rate: Fraction | None) -> None:
            self.num_decoded = 0
            super().__init__(path, frame_rate=frame_rate, suppress_output=True)
            self._codec_context.thread_count = 1
            self._told = time.monotonic()

        @property
        def starts_s(self) -> float:
            """Time from the start of the file until PySceneDetect's time 0, in seconds."""
            if not timed:
                return 0.0
            stream, container = self._video_stream, self._container
            stream_s = (stream.start_time or 0) * float(stream.time_base or 0)
            return max(0.0, stream_s - (container.start_time or 0) / av.time_base)

        @property
        def position(self) -> FrameTimecode:
            """Time of the frame that was read last."""
            if timed:
                return super().position
            return FrameTimecode(max(0, self.num_decoded - 1), self.frame_rate)

        @property
        def _video_stream(self) -> VideoStream:
            return exact_frames.video_stream(self._container)

        def read(self, decode: bool = True):  # noqa: ANN202 - the type of the base class
            if self._decoder is None:
                self._decoder = self._container.decode(self._video_stream)
            frame = super().read(decode)
            if frame is not False:
                self.num_decoded += 1
            if request.progress_path and time.monotonic() - self._told > TELL_EVERY_S:
                self._told = time.monotonic()
                Path(request.progress_path).write_text(f"{self.position.seconds:.1f}\n")
            return frame

    # Frames of files without timestamps are counted, as in their index.
    timed, counted_fps = _is_timed(index), Fraction(index.average_fps).limit_denominator(10**6)
    logging.getLogger("pyscenedetect").setLevel(logging.CRITICAL)
    cv2.setNumThreads(1)
    try:
        video = Watched(request.path, None if timed else counted_fps)
    except FrameRateUnavailable:
        video = Watched(request.path, counted_fps)
    manager = SceneManager()
    manager.add_detector(_detector(rules))
    manager.detect_scenes(video)
    if video.num_decoded < LEAST_DECODED * index.num_frames:
        return Failure(
            "undecodable",
            f"only {video.num_decoded:,} of {index.num_frames:,} frames could be decoded, which is "
            "too few to find shots",
        )
    duration_s = index.duration_s(2)
    scenes: list[tuple[FrameTimecode, FrameTimecode]] = manager.get_scene_list(start_in_scene=True)
    cuts_s = [round(video.starts_s + begin.seconds, 6) for begin, _ in scenes[1:]]
    return Examined(
        duration_s=duration_s,
        cuts_s=tuple(cut_s for cut_s in cuts_s if 0 < cut_s < duration_s),
        num_decoded=video.num_decoded,
    )


def _is_timed(index: VideoIndex) -> bool:
    """Return whether the times of a video's frames come from timestamps."""
    counted_s = np.arange(index.num_frames) / index.average_fps
    return len(index.pts) > 0 or not np.array_equal(index.shown_s, counted_s)


def _detector(rules: ShotRules) -> SceneDetector:
    import scenedetect

    kinds = {
        "adaptive": (scenedetect.AdaptiveDetector, "adaptive_threshold"),
        "content": (scenedetect.ContentDetector, "threshold"),
        "hash": (scenedetect.HashDetector, "threshold"),
        "histogram": (scenedetect.HistogramDetector, "threshold"),
        "threshold": (scenedetect.ThresholdDetector, "threshold"),
    }
    kind, name = kinds[rules.detector]
    settings = {} if rules.threshold is None else {name: rules.threshold}
    return kind(min_scene_len=float(rules.min_shot_s), **settings)
