"""What is exported of an ingest and of a training that lose a worker."""

from __future__ import annotations

import functools
import threading
import time
from pathlib import Path

import pytest

from pipelines.ingest.run import run_ingest
from pipelines.train.run import run_train
from tests.helpers.data import TinyData, tiny_ingest
from tests.helpers.kills import processes
from tests.helpers.prometheus import exports_seen, has_prometheus, prometheus, targets
from tests.helpers.training import BATCH, killable_train, wait_for_step
from tests.helpers.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.soak]

RUN = "watched"
STEPS = 60
"""Enough for both halves to be in different exports, which Ray makes every 10 s."""
OF_RUN = f'{{run="{RUN}"}}'


def test_rates_and_restarts_of_a_training_that_loses_a_worker(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    if not has_prometheus():
        pytest.skip("prometheus is not here; install the Debian package prometheus to run this")
    config = killable_train(tiny_data, tmp_path / "run", name=RUN, num_workers=2, steps=STEPS)
    others, since = set(processes("RayTrainWorker")), time.time()
    with prometheus(targets()) as server:
        training = threading.Thread(target=run_train, args=(config,))
        training.start()
        wait_for_step(tmp_path / "run", STEPS // 2)
        (victim, *_) = set(processes("RayTrainWorker")) - others
        victim.kill()
        training.join(timeout=240)
        assert not training.is_alive()
        wait_until(lambda: server.query(f"ray_stgt_train_step{OF_RUN}") == [STEPS], 20)
        (steps,) = server.query(f"ray_stgt_train_steps_total{OF_RUN}")
        assert STEPS <= steps < 2 * STEPS, "steps after the last checkpoint are done twice"
        assert server.query(f"ray_stgt_train_clips_total{OF_RUN}") == [steps * BATCH]
        (restarts,) = server.history(f"ray_stgt_train_worker_restarts{OF_RUN}", since)
        assert sorted(set(restarts)) == [0, 1]
        (rates,) = server.history(f"rate(ray_stgt_train_clips_total{OF_RUN}[30s])", since)
        assert max(rates) > 0
        # What has ended is no longer exported, so that nobody takes it for what goes on.
        wait_until(lambda: not server.query(f"ray_stgt_train_loss{OF_RUN}"), 60)


def test_clips_are_counted_once_if_their_worker_is_lost(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    config = tiny_ingest(
        tiny_data.train_manifest, str(tmp_path), clips_per_shard=4, name="watched_ingest"
    )
    others = set(processes("ShardIngester"))
    with exports_seen() as seen:
        ingest = threading.Thread(target=run_ingest, args=(config,))
        ingest.start()
        wait_until(lambda: len(list(tmp_path.rglob("shards/*.json"))) >= 2)
        (victim, *_) = set(processes("ShardIngester")) - others
        victim.kill()
        ingest.join(timeout=240)
        assert list(tmp_path.rglob("catalogue.json"))
        total = functools.partial(seen.total, run="watched_ingest")
        wait_until(lambda: total("ray_stgt_ingest_clips_total") == 40, 30)
        assert total("ray_stgt_ingest_quarantined_clips_total") == 1
        assert total("ray_stgt_ingest_worker_restarts") == 1
