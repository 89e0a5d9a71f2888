"""Runs workers over numbered parts on Ray Data, and shows their progress."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import tenacity

from pipelines.common import cluster, parts, ray_errors
from pipelines.common.progress import Progress

logger = logging.getLogger(__name__)

LABEL = "export"
CLUSTER_ATTEMPTS = 4


def run_workers(
    worker: Callable[..., Any],
    arguments: tuple[Any, ...],
    numbers: Sequence[int],
    progress: Progress,
    num_workers: int | None,
) -> None:
    """Give each part to a worker, which writes what it makes.

    Args:
        worker: Class of the workers. They read the column `part` and add `done`, the number of
            finished units.
        arguments: Arguments of its constructor.
        numbers: Numbers of the parts.
        progress: Shows what is finished.
        num_workers: Number of workers; None uses one per CPU of the cluster.
    """
    left = set(numbers)
    # Ray replaces lost workers by itself, but its data set may still fail when a node is lost.
    patience = tenacity.Retrying(
        retry=tenacity.retry_if_exception(ray_errors.is_of_the_cluster),
        stop=tenacity.stop_after_attempt(CLUSTER_ATTEMPTS),
        wait=tenacity.wait_random(1, 5),
        before_sleep=tenacity.before_sleep_log(logger, logging.WARNING),
        reraise=True,
    )

    def work() -> None:
        items = [{"part": number} for number in sorted(left)]
        size = num_workers or cluster.num_cpus()
        for row in parts.on_ray(LABEL, worker, arguments, items, num_workers=size):
            left.discard(int(row["part"]))
            progress.advance(int(row["done"]))

    if left:
        patience(work)
