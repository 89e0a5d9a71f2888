"""Training on two nodes, one of which is killed: `python -m ... STORE VOCAB OUTPUT`."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from jobs.entry import set_up_process
from pipelines.train import run_folder
from pipelines.train.run import run_train
from tests.helpers.data import TinyData
from tests.helpers.kills import processes
from tests.helpers.training import killable_train, wait_for_step

THREADS = 3
"""So many that the node that stays has no room for a second worker."""
OBJECT_STORE = {"object_store_memory": 150 * 1024**2}


def main() -> None:
    """Run it, and print a summary as one JSON line."""
    store, vocab, output = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    set_up_process()
    # One training worker, a data worker and what hands out work fit the node that stays.
    head = {"num_cpus": THREADS + 2, "include_dashboard": False, **OBJECT_STORE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    node = cluster.add_node(num_cpus=THREADS, **OBJECT_STORE)
    cluster.wait_for_nodes()
    data = TinyData(videos="", vocab=vocab, train_manifest="", train_store=store, val_store="")
    training_config = killable_train(
        data, output, num_workers=2, min_workers=1, threads_per_worker=THREADS
    )
    result: dict[str, Any] = {}
    training = threading.Thread(target=lambda: result.update(run_train(training_config)))
    began, first_start_s = time.monotonic(), None
    training.start()
    while first_start_s is None:
        assert training.is_alive(), "the training ended before its workers started"
        if _training_workers():
            first_start_s = time.monotonic() - began
        time.sleep(0.2)
    wait_for_step(output, 3)
    before = _training_workers()
    (raylet,) = [
        info.process
        for kind, infos in node.all_processes.items()
        if kind == "raylet"
        for info in infos
    ]
    os.kill(raylet.pid, signal.SIGKILL)
    lost, again, resumed_from = time.monotonic(), None, None
    now = before
    while training.is_alive():
        assert time.monotonic() < lost + 500
        now = _training_workers() or now
        if again is None and now - before:
            again = time.monotonic() - lost
            # New workers need seconds to start, so this checkpoint is not theirs.
            resumed_from = run_folder.latest(str(output))
        time.sleep(0.2)
    assert result, "the training did not end"
    dead = [info for info in ray.nodes() if not info["Alive"]]
    print(
        json.dumps(
            {
                **result,
                "nodes_lost": len(dead),
                "workers_before": len(before),
                "workers_at_the_end": len(now),
                "seconds_until_the_first_start": first_start_s,
                "seconds_until_others_start": again,
                "resumed_from": resumed_from,
            }
        ),
        flush=True,
    )
    ray.shutdown()
    cluster.shutdown()


def _training_workers() -> set[int]:
    return {process.pid for process in processes("RayTrainWorker")}


if __name__ == "__main__":
    main()
