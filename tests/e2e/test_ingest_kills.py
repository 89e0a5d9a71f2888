"""Ingest under SIGKILL: of its driver, a worker, a decoder, a node. No clip is lost or twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.manifest import SCHEMA, clip_hash, whole_videos_table
from pipelines.bench.videos import make_video
from pipelines.common import storage
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.run import run_ingest
from pipelines.video.config import SamplingConfig
from tests.helpers.data import PROJECT, digests, tiny_ingest
from tests.helpers.waiting import has_open, wait_until

CLIPS = 60
SAMPLING = SamplingConfig(num_frames=8, size=64)
PER_SHARD = 6

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Clips that take long enough to decode for something to happen meanwhile."""
    folder = tmp_path_factory.mktemp("kills")
    video = make_video(folder / "video.mp4", seconds=8, gop=250, seed=0)
    ids = sorted((f"clip{number}" for number in range(CLIPS)), key=clip_hash)
    uris = {
        clip_id: str(video if number % 20 else folder / "none.mp4")
        for number, clip_id in enumerate(ids)
    }
    path = str(folder / "manifest.parquet")
    table = whole_videos_table(uris, {name: f"caption of {name}" for name in ids}, "test")
    storage.write_table(path, table, row_group_rows=10)
    return path


def config(manifest: str, output: Path) -> IngestConfig:
    return tiny_ingest(manifest, str(output), sampling=SAMPLING, clips_per_shard=PER_SHARD)


@pytest.fixture(scope="module")
def whole_store(ray_cluster: None, manifest: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was made without an accident."""
    summary = run_ingest(config(manifest, tmp_path_factory.mktemp("whole")))
    assert summary["reasons"] == {"missing": 3}
    assert summary["clips"] == CLIPS - 3
    return Path(summary["store"])


@pytest.fixture(scope="module")
def whole(whole_store: Path) -> dict[str, str]:
    """Checksums of the store that was made without an accident."""
    return digests(str(whole_store))


def records(folder: Path) -> int:
    return len(list(folder.rglob("shards/*.json")))


def job(manifest: str, output: Path) -> list[str]:
    return [
        sys.executable, "-m", "jobs.ingest", f"--manifest={manifest}", f"--output={output}",
        "--sampling.num-frames=8", "--sampling.size=64", f"--clips-per-shard={PER_SHARD}",
        f"--tracking.uri=sqlite:///{output}/mlflow.db", "--num-workers=2",
    ]  # fmt: skip


def test_a_killed_driver_is_started_again_and_the_bytes_are_the_same(
    whole: dict[str, str], manifest: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(
        job(manifest, tmp_path), cwd=PROJECT, env=environment, stderr=subprocess.DEVNULL
    )
    family: list[psutil.Process] = []

    def both_work() -> bool:
        family[:] = [*ingesters(driver.pid), *decoders(driver.pid)]
        return len(family) >= 4 and records(tmp_path) >= 2

    try:
        wait_until(both_work)
    finally:
        driver.kill()
        driver.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, "processes of the killed run go on"
    finished = records(tmp_path)
    assert 2 <= finished < CLIPS // PER_SHARD
    assert not list(tmp_path.rglob("catalogue.json"))
    with caplog.at_level("INFO"):
        again = run_ingest(config(manifest, tmp_path))
    assert f"ingest resumes: {finished} of {CLIPS // PER_SHARD} shards" in caplog.text
    assert digests(again["store"]) == whole


@pytest.mark.soak
def test_a_store_that_grows_can_be_read_while_its_driver_is_killed(
    whole_store: Path, manifest: str, tmp_path: Path
) -> None:
    """Clips are added, removed and changed; a SIGKILL comes at the first shard that is written."""
    rows = storage.read_table(manifest).to_pylist()
    rows[0]["captions"] = ["another caption"]
    for number in range(12):
        name = f"new{number}"
        rows.append({**rows[-1], "clip_id": name, "clip_hash": clip_hash(name), "captions": [name]})
    table = pa.Table.from_pylist(
        sorted(rows[3:] + rows[:1], key=lambda row: row["clip_hash"]), schema=SCHEMA
    )
    grown = str(tmp_path / "grown.parquet")
    storage.write_table(grown, table, row_group_rows=10)
    folders = [tmp_path / name for name in ("killed", "calm")]
    stores = [shutil.copytree(whole_store, folder / whole_store.name) for folder in folders]
    before = ClipStore(str(stores[0]))
    shards = [before.read_shard(shard) for shard in range(len(before.shard_sizes))]

    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(
        job(grown, folders[0]), cwd=PROJECT, env=environment, stderr=subprocess.DEVNULL
    )
    family: list[psutil.Process] = []
    try:
        wait_until(lambda: records(folders[0]) > len(shards) or list(folders[0].rglob("*.r1.*")))
        family = [*ingesters(driver.pid), *decoders(driver.pid)]
    finally:
        driver.kill()
        driver.wait()
    psutil.wait_procs(family, timeout=60)
    for reader in (before, ClipStore(str(stores[0]))):
        assert reader.num_clips == CLIPS - 3
        for shard, table in enumerate(shards):
            assert reader.read_shard(shard).equals(table)

    again, calm = (run_ingest(config(grown, folder)) for folder in folders)
    assert again["clips"] == calm["clips"] == ClipStore(again["store"]).num_clips
    assert digests(again["store"]) == digests(calm["store"])
    assert run_ingest(replace(config(grown, folders[0]), verify=True))["clips"] == calm["clips"]


def decoders(driver: int) -> list[psutil.Process]:
    """Children that decode, whichever worker they belong to."""
    return [
        child
        for worker in ingesters(driver)
        for child in worker.children()
        if "spawn_main" in str(_words(child))
    ]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def killed_at_work(decoder: psutil.Process, video: Path) -> bool:
    """SIGKILL a decoder, as the kernel does when memory runs out, if it is not idle."""
    try:
        decoder.suspend()  # so that it does not finish between the look and the blow
        if not has_open(decoder, video):
            decoder.resume()
            return False
    except psutil.NoSuchProcess:
        return False
    time.sleep(2)  # and the pool knows what its child is at
    decoder.kill()
    return True


def ingesters(driver: int) -> list[psutil.Process]:
    """Workers that make shards."""
    return [
        process
        for process in psutil.Process(driver).children(recursive=True)
        if "ShardIngester" in str(_words(process))
    ]


class InBackground(threading.Thread):
    """An ingest that goes on while a test does harm."""

    def __init__(self, config: IngestConfig) -> None:
        super().__init__()
        self._config = config
        self.summary: Any = None
        self.start()

    def run(self) -> None:
        self.summary = run_ingest(self._config)


def kill_a_worker() -> None:
    """SIGKILL one of those that make shards; its decoder ends with it."""
    (victim, *_) = ingesters(os.getpid())
    (decoder, *_) = [child for child in victim.children() if "spawn_main" in str(_words(child))]
    victim.kill()
    psutil.wait_procs([decoder], timeout=60)
    assert not decoder.is_running(), "the decoder of a killed worker goes on"


@pytest.mark.parametrize(
    ("worker", "decoder"),
    [
        (True, True),
        pytest.param(True, False, marks=pytest.mark.soak),
        pytest.param(False, True, marks=pytest.mark.soak),
    ],
)
def test_a_killed_worker_costs_no_clip_and_a_killed_decoder_one_which_can_be_tried_again(
    whole: dict[str, str], manifest: str, tmp_path: Path, worker: bool, decoder: bool
) -> None:
    ingest = InBackground(config(manifest, tmp_path))
    wait_until(lambda: records(tmp_path) >= 2)
    if worker:
        kill_a_worker()
    if decoder:
        video = Path(manifest).with_name("video.mp4")
        wait_until(lambda: any(killed_at_work(one, video) for one in decoders(os.getpid())))
    ingest.join(timeout=240)
    assert ingest.summary["reasons"] == {"missing": 3, **({"crashed": 1} if decoder else {})}
    assert ingest.summary["clips"] == CLIPS - 3 - decoder
    if not decoder:
        assert digests(ingest.summary["store"]) == whole
        return
    again = replace(config(manifest, tmp_path), retry_quarantined=("crashed",))
    retried = run_ingest(again)
    assert retried["reasons"] == {"missing": 3}
    assert retried["clips"] == CLIPS - 3
    found = digests(retried["store"])
    (shard,) = [name for name in found if ".r1." in name and name.startswith("shards/")]
    assert found[shard] == whole[shard.replace(".r1", "")]
    assert not Path(retried["store"], shard.replace(".r1", "")).exists()
    number = Path(shard).name.partition(".")[0]
    others = {name for name in whole if number not in name} - {"catalogue.json"}
    assert len(others) == len(whole) - 5  # but its clips, hashes, quarantine and record
    assert {name: found[name] for name in others} == {name: whole[name] for name in others}
    assert run_ingest(replace(again, retry_quarantined=None, verify=True))["clips"] == CLIPS - 3


@pytest.mark.soak
def test_a_lost_node_costs_time_and_no_clip(
    whole: dict[str, str], manifest: str, tmp_path: Path
) -> None:
    """A cluster of a head and a node whose raylet is killed, in a process of its own."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.helpers.lose_an_ingest_node",
            manifest,
            str(tmp_path),
            str(PER_SHARD),
        ],  # fmt: skip
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Ray tells of the loss on standard output too.
    (summary,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert summary["nodes_lost"] == 1
    assert digests(summary["store"]) == whole
