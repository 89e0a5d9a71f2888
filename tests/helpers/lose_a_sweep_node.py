"""A sweep on two nodes without a dashboard, one of which is killed: `python -m ... STORE VAL VOCAB
OUTPUT`."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from jobs.entry import set_up_process
from pipelines.common.config import TrackingConfig
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.journal import Journal
from pipelines.sweep.run import run_sweep
from stgt.errors import SettingError
from tests.helpers.data import TinyData
from tests.helpers.training import tiny_train
from tests.helpers.waiting import wait_until

OBJECT_STORE = {"object_store_memory": 150 * 1024**2}


def main() -> None:
    """Run it, and print a summary as one JSON line."""
    store, val_store, vocab, output = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
    set_up_process()
    head = {"num_cpus": 1, "include_dashboard": False, **OBJECT_STORE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    node = cluster.add_node(num_cpus=1, **OBJECT_STORE)
    cluster.wait_for_nodes()
    data = TinyData(
        videos="", vocab=vocab, train_manifest="", train_store=store, val_store=val_store
    )
    train = tiny_train(
        data,
        output,
        num_workers=1,
        steps=30,
        checkpoint_every=2,
        tracking=TrackingConfig(uri=f"sqlite:///{output.parent}/mlflow.db"),
    )
    config = SweepConfig(
        train=train,
        space=("optim.lr=grid(1e-3,1e-2,1.1e-5,1.2e-5,2e-3)",),
        search="grid",
        grace_steps=4,
    )
    config = replace(config, train=replace(config.train, keep_checkpoints=9))
    # The cluster has two CPUs, but no node has.
    refused = ""
    try:
        run_sweep(replace(config, train=replace(config.train, threads_per_worker=2)))
    except SettingError as error:
        refused = str(error)
    result: dict[str, Any] = {}
    sweep = threading.Thread(target=lambda: result.update(run_sweep(config)))
    sweep.start()
    trials = output / "trials"
    # Both nodes train when the second one is lost.
    wait_until(lambda: len(list(trials.glob("*/checkpoints/step-00000004/COMPLETE"))) >= 2)
    (raylet,) = [
        info.process
        for kind, infos in node.all_processes.items()
        if kind == "raylet"
        for info in infos
    ]
    os.kill(raylet.pid, signal.SIGKILL)
    deadline = time.monotonic() + 500
    while sweep.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    groups = [one for one in placement_group_table().values() if one["state"] != "REMOVED"]
    statuses = [one.status for one in Journal(str(output)).outcomes()]
    dead = [info for info in ray.nodes() if not info["Alive"]]
    summary = {
        **result,
        "refused": refused,
        "statuses": statuses,
        "groups_in_use": len(groups),
        "nodes_lost": len(dead),
    }
    print(json.dumps(summary), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
