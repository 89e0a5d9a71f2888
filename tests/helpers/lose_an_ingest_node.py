"""Ingest on two nodes, one of which is killed: `python -m ... MANIFEST OUTPUT CLIPS_PER_SHARD`."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from jobs.entry import set_up_process
from pipelines.common.config import TrackingConfig
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.run import run_ingest
from pipelines.video.config import SamplingConfig
from tests.helpers.waiting import wait_until

SHARDS_BEFORE = 2


def main() -> None:
    """Run it, and print a summary as one JSON line."""
    manifest, output = sys.argv[1], Path(sys.argv[2])
    set_up_process()
    store = {"object_store_memory": 100 * 1024**2}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **store})
    # Before there is another node: the driver must not belong to the one that is lost.
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    node = cluster.add_node(num_cpus=2, **store)
    cluster.wait_for_nodes()
    assert ray.get_runtime_context().get_node_id() != node.node_id
    config = IngestConfig(
        manifest=manifest,
        output=str(output),
        sampling=SamplingConfig(num_frames=8, size=64),
        clips_per_shard=int(sys.argv[3]),
        tracking=TrackingConfig(uri=f"sqlite:///{output}/mlflow.db"),
    )
    result: dict[str, Any] = {}
    ingest = threading.Thread(target=lambda: result.update(run_ingest(config)))
    ingest.start()
    wait_until(lambda: len(list(output.rglob("shards/*.json"))) >= SHARDS_BEFORE)
    (raylet,) = [
        info.process
        for kind, infos in node.all_processes.items()
        if kind == "raylet"
        for info in infos
    ]
    os.kill(raylet.pid, signal.SIGKILL)
    ingest.join(timeout=220)
    assert result, "the ingest did not end"
    dead = [info for info in ray.nodes() if not info["Alive"]]
    print(json.dumps({**result, "nodes_lost": len(dead)}), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
