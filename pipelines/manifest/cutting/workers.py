"""Examines the videos of parts on Ray Data."""

from __future__ import annotations

import logging
import time

from pipelines.common import cluster, parts
from pipelines.common.progress import PartsProgress, ProgressChannel, duration
from pipelines.manifest.cutting import facts
from pipelines.manifest.cutting.config import CuttingConfig
from pipelines.manifest.cutting.worker import VideoExaminer

logger = logging.getLogger(__name__)

POSITION_EVERY_S = 10.0
"""Seconds between two lines about the position in a long video."""


class _Positions:
    """Logs how far long videos have come."""

    def __init__(self) -> None:
        self._logged = time.monotonic()

    def tell(self, video: str, position_s: float, length_s: float) -> None:
        """Log the position in a video, unless the last line is recent."""
        if time.monotonic() - self._logged < POSITION_EVERY_S:
            return
        self._logged = time.monotonic()
        logger.info(
            "cutting: %s has been examined up to %s of %s",
            video,
            duration(position_s),
            duration(length_s),
        )


def examine_parts(
    config: CuttingConfig, folder: str, num_videos: int, pending: list[int], finished: list[int]
) -> None:
    """Examine the videos of some parts, and write their facts.

    Args:
        config: How to examine them.
        folder: The folder of facts.
        num_videos: Number of all videos.
        pending: Numbers of the parts to examine.
        finished: Numbers of the parts that an earlier run has finished, of which only videos that
            have changed since are examined.
    """
    assert config.cut is not None
    size = facts.part_size(num_videos, config.cut)
    count = sum(min(size, num_videos - part * size) for part in pending)
    progress = PartsProgress("cutting", num_videos, "videos", num_videos - count)
    positions = _Positions()
    handlers = {
        "part": lambda told: progress.reach_part(**told),
        "at": lambda told: positions.tell(**told),
    }
    with ProgressChannel(progress, handlers) as channel:
        for _ in parts.on_ray(
            "cutting",
            VideoExaminer,
            (config, folder, num_videos, channel.queue),
            [
                *({"part": part, "is_finished": True} for part in finished),
                *({"part": part, "is_finished": False} for part in pending),
            ],
            num_workers=config.num_workers or cluster.num_cpus(),
        ):
            pass  # the workers write the facts
