"""Speed of cutting long videos into windows and shots.

Windows are compared with reading all packets, and shots with PySceneDetect used directly.

Shots are compared by processor time, since PySceneDetect decodes and compares in two threads. Each
runs in a process of its own. How shots scale is measured by wall time, with one and with two
decoder processes, each of which is bound to one core.
"""

from __future__ import annotations

import functools
import logging
import os
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from pipelines.bench.harness import (
    Measured,
    Row,
    faster,
    higher,
    median_seconds,
    returned_by_child,
    smaller,
)
from pipelines.bench.spans import GOP, HOUR_S, PART_S, repeat_video
from pipelines.bench.videos import make_video
from pipelines.manifest.cutting.config import CuttingConfig
from pipelines.manifest.cutting.worker import AHEAD
from pipelines.video.config import DecodeLimits, SamplingConfig
from pipelines.video.decoder import ClipDecoder
from pipelines.video.exact_frames import read_index
from pipelines.video.examine import Examined, ExamineRequest, ShotRules, examine_file

logger = logging.getLogger(__name__)

SHOTS_S = 120.0
"""Duration of the video whose shots are found, in seconds."""
VIDEOS_EACH = 2
"""Number of such videos for each process, to see how shots scale."""
SHORT_VIDEOS = 300
"""Number of short videos that are cut into windows."""
DEADLINE_S = 1800.0

Cuts = tuple[float, ...]


def request(path: str, identity: str = "", shots: bool = False) -> ExamineRequest:
    """Return the request to examine a video as the job does it."""
    limits, settings = DecodeLimits(), CuttingConfig()
    rules = ShotRules(
        detector=settings.shot_detector,
        threshold=settings.shot_threshold,
        min_shot_s=settings.min_shot_s,
    )
    return ExamineRequest(
        path=path,
        identity=identity,
        shots=rules if shots else None,
        max_pixels=limits.max_pixels,
        max_bytes=limits.max_bytes,
    )


def examine(path: str, shots: bool = False) -> Examined:
    """Examine a video in this process, which knows nothing about it."""
    found = examine_file(request(path, identity=uuid.uuid4().hex, shots=shots))
    assert isinstance(found, Examined), found
    return found


def ours(path: str) -> Cuts:
    """Find the shots of a video as the job does it, and return where they begin, in seconds."""
    return examine(path, shots=True).cuts_s


def plain(path: str) -> Cuts:
    """Find the shots of a video with PySceneDetect alone."""
    from scenedetect import AdaptiveDetector, SceneManager, VideoStreamAv

    manager = SceneManager()
    manager.add_detector(AdaptiveDetector(min_scene_len=CuttingConfig().min_shot_s))
    manager.detect_scenes(VideoStreamAv(path, suppress_output=True))
    scenes = manager.get_scene_list(start_in_scene=True)
    return tuple(round(begin.seconds, 6) for begin, _ in scenes[1:])


def _timed(work: Callable[[str], Cuts], path: str) -> tuple[float, Cuts]:
    work(path)  # imports
    started = time.process_time()
    found = work(path)
    return time.process_time() - started, found


def _processor_seconds(path: Path, repeats: int) -> dict[str, Measured]:
    """Return the processor time of both ways to find the shots of a video, in seconds."""
    taken: dict[str, list[float]] = {"ours": [], "plain": []}
    for repeat in range(repeats):
        found: list[Cuts] = []
        for name in ("ours", "plain") if repeat % 2 == 0 else ("plain", "ours"):
            work = ours if name == "ours" else plain
            seconds, cuts = returned_by_child(_timed, (work, str(path)))
            taken[name].append(seconds)
            found.append(cuts)
        assert found[0] == found[1], "the two find different shots"
        logger.info(
            "run %d of %d: %s",
            repeat + 1,
            repeats,
            ", ".join(f"{name} {seconds[-1]:.2f} CPU s" for name, seconds in taken.items()),
        )
    return {name: Measured(seconds) for name, seconds in taken.items()}


def _rate(path: Path, cores: list[int]) -> float:
    """Return minutes of video per second, with a decoder process on each of some cores."""
    before = os.sched_getaffinity(0)
    decoders: list[ClipDecoder] = []
    ask = functools.partial(request, shots=True)
    try:
        for core in cores:
            os.sched_setaffinity(0, {core})  # what starts from here on stays on this core
            decoders.append(ClipDecoder(SamplingConfig()))
            decoders[-1].examine(str(path), examine_file, request, DEADLINE_S)  # starts it
    finally:
        os.sched_setaffinity(0, before)

    def work(decoder: ClipDecoder) -> None:
        for _ in range(VIDEOS_EACH):
            decoder.examine(str(path), examine_file, ask, DEADLINE_S)

    with ThreadPoolExecutor(len(cores)) as threads:
        started = time.perf_counter()
        list(threads.map(work, decoders))
        seconds = time.perf_counter() - started
    for decoder in decoders:
        decoder.close()
    return len(cores) * VIDEOS_EACH * SHOTS_S / 60 / seconds


def _videos_per_s(path: Path) -> float:
    """Return videos per second whose duration is found by one guarded child process."""
    with ClipDecoder(SamplingConfig()) as decoder, ThreadPoolExecutor(AHEAD) as threads:

        def work(number: int) -> Examined:
            del number
            return decoder.examine(str(path), examine_file, request, DEADLINE_S)

        work(0)  # starts the process
        started = time.perf_counter()
        found = list(threads.map(work, range(SHORT_VIDEOS)))
        seconds = time.perf_counter() - started
    assert not any(one.num_decoded for one in found)
    return SHORT_VIDEOS / seconds


def measure(device: str, repeats: int) -> list[Row]:
    """Measure windows of an hour, shots of two minutes, and how shots scale."""
    del device
    cores = sorted(os.sched_getaffinity(0))[:2]
    with TemporaryDirectory() as folder:
        logger.info("writing a video of one hour")
        part = make_video(Path(folder) / "part.mp4", PART_S, GOP, seed=0)
        hour = repeat_video(part, Path(folder) / "hour.mp4", HOUR_S)
        minutes = repeat_video(part, Path(folder) / "minutes.mp4", SHOTS_S)
        found = examine(str(hour))
        index = read_index(str(hour))
        assert found.duration_s == index.duration_s(2), "the durations differ"
        seconds = median_seconds(
            {"ours": lambda: examine(str(hour)), "packets": lambda: read_index(str(hour))},
            "cpu",
            repeats,
            warm=True,
        )
        rows = [
            faster("cutting/windows", seconds["ours"], seconds["packets"]),
            smaller("cutting/decoded", "frames", found.num_decoded, index.num_frames),
        ]
        rate = Measured([_videos_per_s(part) for _ in range(repeats)])
        rows.append(higher("cutting/videos", "videos/s", rate))
        spent = _processor_seconds(minutes, repeats)
        rates = {name: seconds.rate(SHOTS_S / 60) for name, seconds in spent.items()}
        rows.append(higher("cutting/shots", "min/CPU s", rates["ours"], rates["plain"]))
        if len(cores) == 2:
            one, two = (
                Measured([_rate(minutes, cores[:count]) for _ in range(repeats)])
                for count in (1, 2)
            )
            rows.append(higher("cutting/2 cores", "min/s", two, one))
    return rows
