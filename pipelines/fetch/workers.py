"""Runs the workers of the fetch job on Ray Data."""

from __future__ import annotations

import functools
import logging
import math

import ray.data
import tenacity
from ray.data import TaskPoolStrategy
from ray.util.queue import Queue

from pipelines.common import cluster, ray_errors
from pipelines.common.progress import PartsProgress, ProgressChannel
from pipelines.common.waiting import telling_of_wait
from pipelines.fetch.config import FetchConfig
from pipelines.fetch.worker import FetchWork, fetch_part

logger = logging.getLogger(__name__)

URLS_PER_WORKER = 16
"""URLs for which one more worker is started, unless the number of workers is given."""
CLUSTER_ATTEMPTS = 4


class FetchProgress(PartsProgress):
    """Progress of the workers in URLs, with the number of bytes received."""

    def __init__(self, total: int, done: int, bad: int) -> None:
        super().__init__("fetch", total, "URLs", done, bad)
        self.has_begun = False
        self._is_complete = False
        self._end = total
        self._bytes: dict[int, int] = {}

    def reach_fetched(self, part: int, done: int, bad: int, received_bytes: int) -> None:
        """Set the numbers of finished and failed URLs of a part, and of the bytes it received."""
        self.has_begun = True
        self._bytes[part] = received_bytes
        self.reach_part(part, done, bad)

    def reach(self, done: int, figures: dict[str, str] | None = None) -> None:  # type: ignore[override]
        """Set the number of finished URLs. The line with the last one is logged once."""
        if self._is_complete:
            return
        self._is_complete = done >= self._end
        received = sum(self._bytes.values())
        super().reach(done, {**(figures or {}), "received": f"{received / 1e6:,.0f} MB"})


def run_workers(
    config: FetchConfig,
    output: str,
    source: str,
    pending: int,
    done: int,
    bad: int,
    answered: frozenset[str],
) -> float | None:
    """Fetch all URLs that are pending, and return the rate in URLs per second, if it is known.

    Args:
        config: What to fetch.
        output: The output folder.
        source: Manifest whose videos are URLs.
        pending: Number of URLs to fetch.
        done: Number of URLs that are done.
        bad: Number of those that failed.
        answered: Hosts that have answered in earlier runs.
    """
    parts = config.num_workers or min(
        cluster.num_cpus(), config.most_workers, math.ceil(pending / URLS_PER_WORKER)
    )
    work = FetchWork(config=config, output=output, source=source, parts=parts, answered=answered)
    progress = FetchProgress(done + pending, done, bad)
    handlers = {"fetched": lambda told: progress.reach_fetched(**told)}
    # What was fetched is in storage, also if Ray Data gives up because a node was lost.
    patience = tenacity.Retrying(
        retry=tenacity.retry_if_exception(ray_errors.is_of_the_cluster),
        stop=tenacity.stop_after_attempt(CLUSTER_ATTEMPTS),
        wait=tenacity.wait_random(1, 5),
        before_sleep=tenacity.before_sleep_log(logger, logging.WARNING),
        reraise=True,
    )
    waits = telling_of_wait("fetch", {"CPU": 1}, lambda: progress.has_begun)
    with ProgressChannel(progress, handlers) as channel, waits:
        patience(_work_through, work, channel.queue)
    return progress.rate()


def _work_through(work: FetchWork, progress: Queue) -> None:
    made = ray.data.from_items(
        [{"part": part} for part in range(work.parts)], override_num_blocks=work.parts
    ).map_batches(
        functools.partial(fetch_part, work=work, progress=progress),
        batch_size=1,
        compute=TaskPoolStrategy(size=work.parts),
        num_cpus=1,
    )
    for _ in ray_errors.rows(made):
        pass  # the workers write the results
