"""Metrics that an ingest exports, of what its workers send."""

from __future__ import annotations

import pytest

from pipelines.ingest.shards_progress import ShardsProgress
from tests.helpers.prometheus import exports_seen
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.ray

CLIPS = "ray_stgt_ingest_clips_total"
QUARANTINED = "ray_stgt_ingest_quarantined_clips_total"
BYTES = "ray_stgt_ingest_store_bytes_total"
RESTARTS = "ray_stgt_ingest_worker_restarts"


def test_a_shard_that_is_begun_again_counts_once_and_a_worker_that_is_too_many_is_a_restart(
    ray_cluster: None,
) -> None:
    progress = ShardsProgress("ingest", 40, 0, 0, run="counted", num_workers=2)
    progress.started()
    progress.started()
    progress.reach_shard(0, 8, 2, {"undecodable": 2, "caption_too_short": 1})
    progress.started()
    for done, reasons in ((0, {}), (5, {"undecodable": 1}), (20, {"undecodable": 3})):
        progress.reach_shard(0, done, sum(reasons.values()), reasons)
    progress.reach_shard(1, 20, 0, {})
    progress.wrote(1000)
    progress.wrote(500)
    calm = ShardsProgress("retry", 40, 0, 0, run="counted", num_workers=2)
    calm.started()
    with exports_seen() as seen:
        # What was recorded last is exported last, or together with the rest.
        wait_until(lambda: seen.series(RESTARTS, run="counted", work="retry"))
    assert seen.total(CLIPS, run="counted", work="ingest") == 40
    assert seen.total(QUARANTINED, run="counted", reason="undecodable") == 3
    assert seen.total(QUARANTINED, run="counted", reason="caption_too_short") == 1
    assert seen.total(BYTES, run="counted", work="ingest") == 1500
    assert seen.total(RESTARTS, run="counted", work="ingest") == 1
    assert seen.total(RESTARTS, run="counted", work="retry") == 0
