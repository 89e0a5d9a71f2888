"""Finds clips that their captions do not describe, by the similarity that a model computes.

The similarity of a clip is the cosine of its embedding and that of its best caption. Clips without
captions are not judged. Similarities are kept beside the shards, so that only new clips and new
captions are scored when a store grows or an ingest is interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import ray

from pipelines.artifacts.clip_store import ShardRecord
from pipelines.common import parts, storage
from pipelines.common.progress import Progress
from pipelines.ingest.filters import Rejection
from pipelines.ingest.plan import IngestPlan
from pipelines.ingest.scores import read_scores
from pipelines.ingest.workers import num_workers

REASON = "low_similarity"


def dissimilar(
    plan: IngestPlan, records: dict[int, ShardRecord]
) -> dict[int, dict[str, Rejection]]:
    """Return the clips whose similarity is below the minimum, by shard and clip id.

    Args:
        plan: Plan of the ingest.
        records: Records of all shards.
    """
    config = plan.config
    checkpoint, least = config.filters.checkpoint, config.filters.min_similarity
    assert checkpoint is not None, "checked by the config"
    assert least is not None, "called with this filter only"
    captioned = {shard: _num_captioned(record) for shard, record in records.items()}

    def judge(shard: int) -> tuple[int, dict[str, Rejection]]:
        """Return how many similarities of a shard are known, and the clips below the minimum."""
        record = records[shard]
        known = read_scores(plan.store, shard, record["revision"], record["sha256"])
        low = {name: value for name, value in known.items() if value < least}
        return len(known), {
            name: Rejection(REASON, f"cosine {value:.3f}") for name, value in low.items()
        }

    shards = sorted(shard for shard, count in captioned.items() if count)
    with ThreadPoolExecutor(storage.READERS) as pool:
        judged = dict(zip(shards, pool.map(judge, shards), strict=True))
        pending = [shard for shard in shards if judged[shard][0] < captioned[shard]]
        left = sum(captioned[shard] for shard in pending)
        total = sum(captioned.values())
        progress = Progress("similarity", total, "clips", total - left)
        for shard in _scored(plan, checkpoint, pending):
            progress.advance(captioned[shard])
        judged |= dict(zip(pending, pool.map(judge, pending), strict=True))
    return {shard: low for shard, (_, low) in judged.items() if low}


def _num_captioned(record: ShardRecord) -> int:
    """Return the number of clips with a caption; all versions with this filter record it."""
    return next(iter(record.get("captions", ())), 0)


def _scored(plan: IngestPlan, checkpoint: str, shards: list[int]) -> Iterator[int]:
    """Compute the similarities of shards on Ray, and yield each shard that is done."""
    if not shards:
        return
    from pipelines.ingest.similarity_worker import SimilarityScorer

    config = plan.config
    workers = num_workers(config)
    if config.use_gpu:
        workers = max(1, min(workers, int(ray.cluster_resources().get("GPU", 0))))
    for row in parts.on_ray(
        "similarity",
        SimilarityScorer,
        (plan.store, config.sampling, checkpoint, config.use_gpu),
        [{"shard": shard} for shard in shards],
        num_workers=workers,
        use_gpu=config.use_gpu,
    ):
        yield int(row["shard"])
