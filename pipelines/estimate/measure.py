"""Measures on this machine what an estimate needs: decoding, stored bytes, reading, arithmetic.

Rates are per second of processor time, so other work on the machine changes them little.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil

from pipelines.estimate.config import EstimateConfig
from pipelines.estimate.recorded_counts import Counted
from pipelines.train.config import TrainConfig
from pipelines.video import frame_codec
from pipelines.video.config import SamplingConfig
from pipelines.video.decoder import ClipDecoder, ClipSpan
from pipelines.video.synthetic.footage import write_footage
from stgt.errors import SettingError, VideoDecodeError
from stgt.inputs.frame_choice import choose_frames

logger = logging.getLogger(__name__)

MEASURED_S = 1.0
"""Processor time after which a measurement ends."""
MOST_CLIPS = 50
FOOTPRINT_CLIPS = 2
"""Clips of the step whose arithmetic is counted, the fewest that have negatives. Each clip takes
the same arithmetic in larger batches, apart from the comparison of embeddings."""


@dataclass(frozen=True)
class MeasuredClips:
    """What decoding some clips took."""

    clips_per_cpu_s: float
    bytes_per_clip: float
    coded: list[bytes]
    """Stored frames of one clip."""
    what: str
    """The clips that were decoded, in words."""


def measure_ingest(config: EstimateConfig) -> MeasuredClips:
    """Decode typical clips and encode their frames, as an ingest does.

    Raises:
        SettingError: None of the given videos can be decoded.
    """
    if config.videos:
        what = f"{len(config.videos)} videos" if len(config.videos) > 1 else "".join(config.videos)
        return _decode(config, config.videos, what, once=True)
    with TemporaryDirectory(prefix="stgt-estimate-") as folder:
        path = Path(folder) / "clip.mp4"
        logger.info("generating a clip of %g s to measure with", config.clip_s)
        write_footage(
            path, config.clip_s, config.source_width, config.source_height, config.source_fps
        )
        what = (
            f"a generated clip of {config.clip_s:g} s ({config.source_width}x"
            f"{config.source_height}, {config.source_fps:g} frames/s, H.264)"
        )
        return _decode(config, [str(path)], what, once=False)


def _decode(
    config: EstimateConfig, videos: Sequence[str], what: str, *, once: bool
) -> MeasuredClips:
    sampling = SamplingConfig(
        num_frames=config.stored_frames,
        size=config.train.model.inputs.image_size,
        resize=config.train.resize,
        jpeg_quality=config.jpeg_quality,
    )
    seconds, sizes, coded = 0.0, [], []
    others = {child.pid for child in multiprocessing.active_children()}
    with ClipDecoder(sampling, codec=sampling.codec) as decoder:
        # The process takes as long to start as to decode some clips, so the first one is repeated.
        clips = [videos[0], *(videos if once else itertools.repeat(videos[0], MOST_CLIPS))]
        for number, uri in enumerate(clips):
            before = _cpu_s(others)
            try:
                decoded = decoder.decode(ClipSpan(uri, uri))
            except VideoDecodeError as error:
                if number > 0 or not once:
                    logger.warning("%s is not measured: %s: %s", uri, error.reason, error.message)
                if not once:
                    break  # it would fail again
                continue
            if number == 0:
                continue
            after = _cpu_s(others)
            # A process that was killed by an earlier clip has been replaced.
            seconds += sum(after[pid] - before.get(pid, 0.0) for pid in after)
            coded = decoded.coded
            sizes.append(sum(map(len, coded)))
            if not once and seconds >= MEASURED_S:
                break
    if not sizes and not once:
        raise SettingError(
            "the generated clip cannot be decoded on this machine; give "
            "--ingest-clips-per-cpu-s, --feed-clips-per-cpu-s and --bytes-per-clip, or --videos to "
            "measure with"
        )
    if not sizes:
        raise SettingError(
            f"videos = {' '.join(videos)}: none of them can be decoded; give other videos, or "
            "leave --videos out to measure with a generated clip"
        )
    # The clock of a process ticks in hundredths of a second.
    return MeasuredClips(len(sizes) / max(seconds, 0.01), float(np.mean(sizes)), coded, what)


def _cpu_s(others: set[int | None]) -> dict[int, float]:
    """Return the processor time of the decoder's processes so far, by process id."""
    found = {}
    for child in multiprocessing.active_children():
        if child.pid is not None and child.pid not in others:
            times = psutil.Process(child.pid).cpu_times()
            found[child.pid] = times.user + times.system
    return found


def measure_feed(config: EstimateConfig, coded: Sequence[bytes]) -> float:
    """Return how many clips one CPU reads from stored frames and augments per second.

    Args:
        config: Settings of the estimate.
        coded: Stored frames of one clip.
    """
    train = config.train
    size = train.model.inputs.image_size

    def prepared() -> Iterator[None]:
        if train.augment.changes_nothing:
            while True:
                frame_codec.decode_frames(_chosen(train.num_frames, coded), "jpeg", size)
                yield
        import torch

        from stgt.inputs.transforms import augment_clip

        torch.set_num_threads(1)  # as in a data worker
        generator = np.random.default_rng(0)
        while True:
            frames = frame_codec.decode_frames(_chosen(train.num_frames, coded), "jpeg", size)
            augment_clip(frames, train.augment, generator)
            yield

    clips = prepared()
    next(clips)  # imports libraries
    started, count = time.process_time(), 0
    while (seconds := time.process_time() - started) < MEASURED_S:
        next(clips)
        count += 1
    return count / seconds


def _chosen(num_frames: int, coded: Sequence[bytes]) -> list[bytes]:
    places = choose_frames(len(coded), num_frames, "uniform", np.random.default_rng(0))
    return [coded[place] for place in places]


def count_arithmetic(train: TrainConfig) -> Counted:
    """Count the arithmetic of a sample, without computing it; this imports torch."""
    from stgt.training.footprint import training_footprint

    footprint = training_footprint(
        train.model,
        train.precision,
        FOOTPRINT_CLIPS,
        train.num_frames,
        train.targets,
        optimizer=train.optim.optimizer,
    )
    return Counted(footprint.flops / FOOTPRINT_CLIPS, footprint.checkpoint_bytes)
