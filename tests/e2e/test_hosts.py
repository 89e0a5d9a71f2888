"""Pipelines on several hosts that share nothing but S3 and MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.artifacts.manifest import clip_hash, whole_videos_table
from pipelines.bench.videos import make_video
from pipelines.common import storage
from tests.helpers import hosts
from tests.helpers.hosts import OUTPUT, Host
from tests.helpers.hosts_cluster import (
    HostCluster,
    RunningJob,
    host_cluster,
    put_videos,
)
from tests.helpers.training import assert_equal_up_to_rounding
from tests.helpers.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),  # tests of three hosts share what is slow to make
    pytest.mark.skipif(hosts.missing() is not None, reason=str(hosts.missing())),
]

BUCKET = "s3://bucket"
DATA = f"{BUCKET}/data"
VOCAB = f"{OUTPUT}/vocab.txt"
"""On the driver's host alone."""
CPUS = [1, 3, 2]
"""Of the head and two other nodes: only those have room for a training worker with 2 CPUs."""
TRAIN, VAL = 48, 12
STEPS, CHECKPOINT_EVERY = 12, 3
INGESTER, TRAINER = "ShardIngester", "RayTrainWorker"
SHORT_S, LONG_S = 5, 20


def manifest_flags(split: str, root: str) -> list[str]:
    return [
        f"--annotations={DATA}/results_{split}.csv", f"--videos={DATA}/videos",
        f"--output={root}/{split}.parquet",
    ]  # fmt: skip


def ingest_flags(split: str, root: str, tracking: str) -> list[str]:
    return [
        f"--manifest={root}/{split}.parquet", f"--output={root}/clips/{split}",
        "--sampling.num-frames=8", "--sampling.size=64", "--clips-per-shard=6",
        f"--tracking.uri={tracking}",
    ]  # fmt: skip


def train_flags(stores: str, output: str, tracking: str, *more: str) -> list[str]:
    return [
        "pretrain_stage1_tiny", f"--data={stores}/clips/train", f"--val-store={stores}/clips/val",
        f"--vocab={VOCAB}", f"--output={output}", f"--steps={STEPS}", "--global-batch=8",
        f"--checkpoint-every={CHECKPOINT_EVERY}", "--keep-checkpoints=9", "--progress-every=1",
        "--record-samples", "--num-workers=2", "--threads-per-worker=2", "--num-loaders=1",
        f"--tracking.uri={tracking}", *more,
    ]  # fmt: skip


def evaluate_flags(stores: str, run: str, output: str, tracking: str) -> list[str]:
    return [
        f"--data={stores}/clips/val", f"--checkpoint={run}", f"--output={output}",
        "--num-workers=2", "--k-rerank=4", f"--tracking.uri={tracking}",
    ]  # fmt: skip


def shares_nothing(one: Host, other: Host) -> None:
    for folder in (OUTPUT, "/tmp", "/dev/shm"):
        path = f"{folder}/only-on-{one.name}"
        one.write(path, "what only this host can read")
        assert one.sees(path)
        assert not other.sees(path)
        assert not Path(path).exists()
    assert one.run("touch", f"{hosts.PROJECT}/left.txt", check=False).returncode != 0


def listens_for(host: Host, address: str, port: int) -> bool:
    ask = f"import socket; raise SystemExit(socket.socket().connect_ex(('{address}', {port})))"
    return host.python("-c", ask, check=False).returncode == 0


def test_two_hosts_that_share_only_s3_make_one_store(tmp_path: Path) -> None:
    with host_cluster(tmp_path, cpus=[1, 1]) as cluster:
        head, node = cluster.hosts
        shares_nothing(head, node)
        shares_nothing(node, head)
        assert not listens_for(node, "127.0.0.1", 6379)
        assert listens_for(node, head.address, 6379)
        put_videos(cluster.s3, tmp_path, num_train=40, num_val=0)
        assert cluster.job("manifest", *manifest_flags("train", BUCKET))["clips"] == 40
        tracking = f"sqlite:///{OUTPUT}/mlflow.db"
        own = ["--output", f"{OUTPUT}/clips", "--manifest", f"{BUCKET}/train.parquet"]
        refused = cluster.start("ingest", *own, f"--tracking.uri={tracking}").error()
        assert f"--output {OUTPUT}/clips is not what the node {node.address} sees" in refused
        ingest = cluster.start("ingest", *ingest_flags("train", BUCKET, tracking))
        paused: set[psutil.Process] = set()

        def both_work() -> bool:
            assert ingest.is_running(), ingest.log
            at_work = [host.processes(INGESTER) for host in cluster.hosts]
            # The first waits for the other, and does not do all of the work meanwhile.
            for process in {one for found in at_work for one in found} - paused:
                process.suspend()
                paused.add(process)
            return all(at_work)

        try:
            wait_until(both_work, every_s=0.3, told=lambda: ingest.log)
        finally:
            for process in paused:
                process.resume()
        summary = ingest.summary()
        assert (summary["clips"], summary["quarantined"]) == (39, 1)
        shards = catalogue(cluster, summary["store"])["shards"]
        assert sum(shard["clips"] for shard in shards) == 39


@dataclass(frozen=True)
class Results:
    """What a pipeline leaves that must not depend on the hosts that it ran on."""

    store: str
    """Digest of the clip store, over all shards."""
    losses: dict[int, dict[str, float]]
    """By step."""
    samples: list[tuple[int, str]]
    """Step and clip, of all steps."""
    metrics: dict[str, float]
    """Of the evaluation."""


def catalogue(cluster: HostCluster, store: str) -> dict[str, Any]:
    return json.loads(cluster.s3.cat(f"{store}/catalogue.json"))


def losses_of(cluster: HostCluster, run: str) -> dict[int, dict[str, float]]:
    rows = [
        row
        for path in cluster.s3.glob(f"{run}/metrics/*.json")
        for row in json.loads(cluster.s3.cat(path))
    ]
    assert len({row["step"] for row in rows}) == len(rows) == STEPS
    return {
        row["step"]: {
            name: value
            for name, value in row["metrics"].items()
            if name.startswith(("loss", "val"))
        }
        for row in rows
    }


def samples_of(cluster: HostCluster, run: str) -> list[tuple[int, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = [
        pq.read_table(pa.BufferReader(cluster.s3.cat(path)))
        for path in sorted(cluster.s3.glob(f"{run}/samples/*.parquet"))
    ]
    return [(row["step"], row["clip_id"]) for table in tables for row in table.to_pylist()]


def make_stores(cluster: HostCluster, host: Host, root: str, address: str | None) -> dict[str, str]:
    """The stores of both splits, made by jobs on a host: the whole cluster's, or its own Ray's."""
    joining = {} if address is None else {"RAY_ADDRESS": address}
    stores = {}
    for split in ("train", "val"):
        for name, flags in (
            ("manifest", manifest_flags(split, root)),
            ("ingest", ingest_flags(split, root, cluster.mlflow)),
        ):
            job = RunningJob(host, cluster.folder, name, *flags, **joining)
            stores[split] = job.summary().get("store", "")
    return stores


def run_pipeline(cluster: HostCluster, host: Host, root: str, address: str | None) -> Results:
    joining = {} if address is None else {"RAY_ADDRESS": address}

    def job(name: str, *flags: str) -> dict[str, Any]:
        return RunningJob(host, cluster.folder, name, *flags, **joining).summary()

    stores = make_stores(cluster, host, root, address)
    flags = train_flags(root, f"{root}/run", cluster.mlflow)
    training = RunningJob(host, cluster.folder, "train", *flags, **joining)
    if host is cluster.head:
        wait_for_workers(cluster, training)
    assert training.summary()["step"] == STEPS
    evaluated = job(
        "evaluate", *evaluate_flags(root, f"{root}/run", f"{root}/evaluation", cluster.mlflow)
    )
    return Results(
        store=catalogue(cluster, stores["train"])["digest"],
        losses=losses_of(cluster, f"{root}/run"),
        samples=samples_of(cluster, f"{root}/run"),
        metrics=evaluated["metrics"],
    )


def wait_for_workers(cluster: HostCluster, training: RunningJob) -> None:
    """Wait until each of the other nodes has a training worker."""

    def are_there() -> bool:
        assert training.is_running(), training.log
        return all(node.processes(TRAINER) for node in cluster.nodes)

    wait_until(are_there, 180, every_s=0.2, told=lambda: training.log)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostCluster]:
    """A head and two nodes, with videos in S3."""
    folder = tmp_path_factory.mktemp("hosts")
    with host_cluster(folder, CPUS, mlflow=True, dashboard=True) as cluster:
        put_videos(cluster.s3, folder, TRAIN, VAL)
        put_vocabulary(cluster.head, folder)
        yield cluster


def put_vocabulary(host: Host, folder: Path) -> None:
    host.write(VOCAB, (folder / "data" / "vocab.txt").read_text())


@pytest.fixture(scope="module")
def alone(three: HostCluster) -> Results:
    """The same pipeline on one host with a Ray of its own."""
    host = three.host("alone")
    put_vocabulary(host, three.folder)
    try:
        return run_pipeline(three, host, f"{BUCKET}/alone", None)
    finally:
        host.kill()


@pytest.mark.soak
def test_a_pipeline_on_three_hosts_gives_what_one_host_does(
    three: HostCluster, alone: Results
) -> None:
    shares_nothing(three.nodes[0], three.nodes[1])
    found = run_pipeline(three, three.head, f"{BUCKET}/three", three.address)
    assert found == alone


LONG_CLIPS, LONG_PER_SHARD = 96, 4


@dataclass(frozen=True)
class LongIngest:
    """An ingest that takes long enough for something to happen meanwhile."""

    tracking: str

    def flags(self, output: str) -> list[str]:
        return [
            f"--manifest={BUCKET}/long/manifest.parquet", f"--output={output}",
            "--sampling.num-frames=8", "--sampling.size=64", f"--tracking.uri={self.tracking}",
            f"--clips-per-shard={LONG_PER_SHARD}",
        ]  # fmt: skip


@pytest.fixture(scope="module")
def long_ingest(three: HostCluster) -> LongIngest:
    folder = three.folder / "long"
    folder.mkdir()
    video = make_video(folder / "video.mp4", seconds=8, gop=250, seed=0)
    ids = sorted((f"clip{number}" for number in range(LONG_CLIPS)), key=clip_hash)
    uris = dict.fromkeys(ids, f"{BUCKET}/long/{video.name}")
    table = whole_videos_table(uris, {name: f"caption of {name}" for name in ids}, "test")
    storage.write_table(str(folder / "manifest.parquet"), table, row_group_rows=10)
    three.s3.put(f"{folder}/", "bucket/long/", recursive=True)
    return LongIngest(three.mlflow)


@pytest.fixture(scope="module")
def long_store(three: HostCluster, long_ingest: LongIngest) -> dict[str, Any]:
    """The catalogue of the store that was made without an accident."""
    return catalogue(three, three.job("ingest", *long_ingest.flags(f"{BUCKET}/calm"))["store"])


def wait_for_shards(cluster: HostCluster, ingest: RunningJob, output: str, count: int) -> None:
    def are_there() -> bool:
        assert ingest.is_running(), ingest.log
        return len(cluster.s3.glob(f"{output}/*/shards/*.json")) >= count

    wait_until(are_there, every_s=0.2, told=lambda: ingest.log)


def wait_for_checkpoint(cluster: HostCluster, training: RunningJob, run: str) -> None:
    def is_there() -> bool:
        assert training.is_running(), training.log
        return bool(cluster.s3.glob(f"{run}/checkpoints/*/COMPLETE"))

    wait_until(is_there, 180, every_s=0.1, told=lambda: training.log)


def wait_until_all_are_back(cluster: HostCluster) -> None:
    wait_until(lambda: cluster.alive() == len(cluster.hosts), every_s=1)


@pytest.mark.soak
@pytest.mark.parametrize("seconds", [SHORT_S, LONG_S])
def test_a_cut_link_costs_an_ingest_no_clip(
    three: HostCluster, long_ingest: LongIngest, long_store: dict[str, Any], seconds: float
) -> None:
    victim, output = three.nodes[1], f"{BUCKET}/ingest-cut-{seconds}"
    starts, lost = three.starts(victim), three.lost()
    ingest = three.start("ingest", *long_ingest.flags(output))
    wait_for_shards(three, ingest, output, 2)
    assert victim.processes(INGESTER)
    victim.cut(seconds)
    assert catalogue(three, ingest.summary()["store"]) == long_store
    if seconds == SHORT_S:
        assert (three.starts(victim), three.lost()) == (starts, lost)
    else:
        three.wait_for(victim, starts + 1)
        assert three.lost() == lost + 1
    wait_until_all_are_back(three)


@pytest.mark.soak
@pytest.mark.parametrize("seconds", [SHORT_S, LONG_S])
def test_a_cut_link_changes_no_step_of_a_training(
    three: HostCluster, alone: Results, seconds: float
) -> None:
    victim, run = three.nodes[1], f"{BUCKET}/train-cut-{seconds}"
    starts, lost = three.starts(victim), three.lost()
    training = three.start("train", *train_flags(f"{BUCKET}/alone", run, three.mlflow))
    wait_for_checkpoint(three, training, run)
    workers = {process.pid for host in three.nodes for process in host.processes(TRAINER)}
    assert len(workers) == 2
    victim.cut(seconds)
    assert training.is_running()
    now = {process.pid for host in three.nodes for process in host.processes(TRAINER)}
    training.summary()
    assert losses_of(three, run) == alone.losses
    assert samples_of(three, run) == alone.samples
    if seconds == SHORT_S:
        assert now == workers
        assert (three.starts(victim), three.lost()) == (starts, lost)
    else:
        three.wait_for(victim, starts + 1)
        assert three.lost() == lost + 1
    wait_until_all_are_back(three)


@pytest.mark.soak
def test_an_ingest_goes_on_without_a_host_that_is_lost_for_good(
    three: HostCluster, long_ingest: LongIngest, long_store: dict[str, Any]
) -> None:
    victim, output = three.nodes[1], f"{BUCKET}/ingest-loss"
    ingest = three.start("ingest", *long_ingest.flags(output))
    wait_for_shards(three, ingest, output, 2)
    three.lose(victim)
    try:
        assert catalogue(three, ingest.summary()["store"]) == long_store
    finally:
        three.add(f"{victim.name}-new", CPUS[2])


@pytest.mark.soak
def test_an_elastic_training_goes_on_without_a_host_that_is_lost_for_good(
    three: HostCluster, alone: Results
) -> None:
    victim, run = three.nodes[1], f"{BUCKET}/train-loss"
    flags = train_flags(f"{BUCKET}/alone", run, three.mlflow, "--min-workers=1")
    training = three.start("train", *flags)
    wait_for_checkpoint(three, training, run)
    three.lose(victim)
    try:
        training.summary()
    finally:
        three.add(f"{victim.name}-new", CPUS[2])
    assert samples_of(three, run) == alone.samples
    found, wanted = (
        {step: values["loss/total"] for step, values in losses.items()}
        for losses in (losses_of(three, run), alone.losses)
    )
    assert_equal_up_to_rounding(found, wanted)
