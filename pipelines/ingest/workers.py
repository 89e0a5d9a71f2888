"""Runs the decoding workers on Ray Data and summarizes the shards that they made."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import ray.data
import tenacity
from ray.data import ActorPoolStrategy
from ray.util.queue import Queue

from pipelines.artifacts.clip_store import (
    ShardRecord,
    captions_of_shards,
    finished_shards,
    recorded_sampling,
)
from pipelines.common import cluster, ray_errors, storage
from pipelines.common.progress import ProgressChannel
from pipelines.common.waiting import telling_of_wait
from pipelines.ingest import filters, histograms
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.plan import IngestPlan, recorded_filters
from pipelines.ingest.shards_progress import ShardsProgress
from pipelines.ingest.worker import ShardIngester, ShardWork

logger = logging.getLogger(__name__)

MOST_BLOCKS = 1000
"""Maximum number of blocks in the data set of shards. More blocks would overload Ray's driver."""
CLUSTER_ATTEMPTS = 4


def num_workers(config: IngestConfig) -> int:
    """Return the number of decoding workers: as configured, or one per CPU of the cluster."""
    return config.num_workers or cluster.num_cpus()


def run_workers(
    label: str,
    plan: IngestPlan,
    work: ShardWork,
    shards: list[int],
    count: int,
    finished: dict[int, ShardRecord],
) -> float | None:
    """Process shards in decoding workers and return the rate in clips per second.

    Args:
        label: Name of the work in progress lines.
        plan: Plan of the ingest.
        work: What to do on each shard.
        shards: Numbers of the shards to process.
        count: Number of clips to process in these shards.
        finished: Records of shards that are already finished, for the progress display.

    Returns:
        None if there are no shards to process.
    """
    if not shards:
        return None
    done = sum(record["clips"] + record["quarantined"] for record in finished.values())
    bad = sum(num_bad(record["reasons"]) for record in finished.values())
    progress = ShardsProgress(
        label,
        done + count,
        done,
        bad,
        run=plan.config.name,
        num_workers=_pool_size(plan, shards),
    )
    handlers = {
        "shard": lambda told: progress.reach_shard(**told),
        "wrote_bytes": progress.wrote,
        "started": lambda _: progress.started(),
    }
    # Ray replaces lost workers by itself, but its data set may still fail when a node is lost, for
    # example because results on that node were not read yet. Finished shards are in storage then.
    patience = tenacity.Retrying(
        retry=tenacity.retry_if_exception(ray_errors.is_of_the_cluster),
        stop=tenacity.stop_after_attempt(CLUSTER_ATTEMPTS),
        wait=tenacity.wait_random(1, 5),
        before_sleep=tenacity.before_sleep_log(logger, logging.WARNING),
        reraise=True,
    )
    waits = telling_of_wait(label, {"CPU": 1}, lambda: progress.has_begun)
    with ProgressChannel(progress, handlers) as channel, waits:
        patience(_work_through, plan, work, shards, channel.queue)
    return progress.rate()


def _work_through(plan: IngestPlan, work: ShardWork, shards: list[int], progress: Queue) -> None:
    """Process shards in one Ray data set. Workers skip shards that are already finished."""
    made = ray.data.from_items(
        [{"shard": shard} for shard in shards],
        override_num_blocks=min(len(shards), MOST_BLOCKS),
    ).map_batches(
        ShardIngester,
        fn_constructor_args=(work, progress),
        batch_size=1,
        compute=ActorPoolStrategy(size=_pool_size(plan, shards)),
        num_cpus=1,
    )
    for _ in ray_errors.rows(made):
        pass  # the workers write the shards


def _pool_size(plan: IngestPlan, shards: list[int]) -> int:
    return min(num_workers(plan.config), len(shards))


def num_bad(reasons: dict[str, int]) -> int:
    """Return the number of unusable clips, not counting those excluded by filters."""
    return sum(count for reason, count in reasons.items() if reason not in filters.REASONS)


def catalogue_of_records(plan: IngestPlan) -> dict[str, Any] | None:
    """Return the catalogue that the shard records add up to; None if a record is missing."""
    records = finished_shards(plan.store)
    if set(range(plan.num_shards)) - records.keys():
        return None
    return catalogue_of(plan, records)


def with_captions(plan: IngestPlan, records: dict[int, ShardRecord]) -> dict[int, ShardRecord]:
    """Return the records with the field `captions`, which those of earlier versions lack."""
    captions = captions_of_shards(plan.store, list(records.values()))
    return {
        shard: {**record, "captions": counts}
        for (shard, record), counts in zip(records.items(), captions, strict=True)
    }


def catalogue_of(plan: IngestPlan, records: dict[int, ShardRecord]) -> dict[str, Any]:
    """Return the catalogue of a store whose shards are all finished."""
    shards = [records[shard] for shard in range(plan.num_shards)]
    reasons: Counter[str] = Counter()
    for record in shards:
        reasons.update(record["reasons"])
    return {
        **({"generation": plan.generation} if plan.generation else {}),
        "sampling": recorded_sampling(plan.config.sampling),
        "filters": recorded_filters(plan.config.filters, plan.weights),
        "clips": sum(record["clips"] for record in shards),
        "quarantined": sum(record["quarantined"] for record in shards),
        "bad": num_bad(reasons),
        "salvaged": sum(record["salvaged"] for record in shards),
        "bytes": sum(record["bytes"] for record in shards),
        "reasons": dict(sorted(reasons.items())),
        "histograms": histograms.add([record["histograms"] for record in shards]),
        "digest": storage.digest_of("".join(record["sha256"] for record in shards).encode()),
        "shards": [
            {name: value for name, value in record.items() if name != "histograms"}
            for record in shards
        ],
    }
