"""Shared fixtures. What lies outside the project is used where it exists, else named."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from jobs import entry
from pipelines import recipes, storage, synthetic
from pipelines.config import IngestConfig, ManifestConfig, TrackingConfig
from pipelines.ingest import run_ingest
from pipelines.manifest import run_manifest
from tests.faulty_s3 import FaultyS3
from tests.waiting import wait_until

PROJECT = Path(__file__).resolve().parents[1]


def _outside(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, PROJECT.parent / "shared" / default))
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here; set {variable} to run this test")
    return folder


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Recorded numbers of the published model."""
    return _outside("STGT_REFERENCE_DIR", "reference")


@pytest.fixture(scope="session")
def videos_dir() -> Path:
    """Real clips: good, damaged and bad."""
    return _outside("STGT_VIDEOS_DIR", "videos")


@pytest.fixture(scope="session")
def annotations_dir() -> Path:
    """Annotation files as the data sets ship them."""
    return _outside("STGT_ANNOTATIONS_DIR", "annotations")


@pytest.fixture(scope="session")
def crds_dir() -> Path:
    """KubeRay's custom resource definitions."""
    return _outside("STGT_KUBERAY_CRDS_DIR", "kuberay-crds")


def listens(server: subprocess.Popen[bytes], port: int, log: Path) -> bool:
    """Whether a server that was started answers on loopback."""
    assert server.poll() is None, log.read_text()[-2000:]
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="session")
def s3_environment() -> int:
    """Where S3 is for this process and those it starts; gives the port. Nothing listens yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}",
        AWS_ACCESS_KEY_ID="testing",
        AWS_SECRET_ACCESS_KEY="testing",
        AWS_DEFAULT_REGION="us-east-1",
    )
    return port


@pytest.fixture(scope="session")
def s3(s3_environment: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyS3]:
    """An S3 server on loopback whose requests can be made to fail."""
    log = tmp_path_factory.mktemp("s3") / "server.log"
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.faulty_s3", str(s3_environment)],
        cwd=PROJECT,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        wait_until(functools.partial(listens, server, s3_environment, log), told=log.read_text)
        faulty = FaultyS3(f"http://127.0.0.1:{s3_environment}")
        storage.filesystem("s3://bucket")[0].mkdir("bucket")
        yield faulty
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a size such as 256k, again to change it; gives its folder."""
    folder = tmp_path / "small"

    def mount(size: str) -> Path:
        again = folder.is_mount()
        folder.mkdir(exist_ok=True)
        options = f"remount,size={size}" if again else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("a small file system cannot be mounted here")
        return folder

    yield mount
    if folder.is_mount():
        # Lazily: Ray and MLflow may keep files open.
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def mlflow_away() -> TrackingConfig:
    """An MLflow server that does not answer: nothing listens at its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return TrackingConfig(uri=f"http://127.0.0.1:{probe.getsockname()[1]}")


@pytest.fixture(scope="session")
def ray_cluster(s3_environment: int) -> Iterator[None]:
    """One local Ray for all tests of the session: a start takes seconds."""
    entry.quieten()
    entry.start_ray(cpus=12, dashboard=True)  # trials that ASHA stopped free theirs late
    yield
    ray.shutdown()


@dataclass(frozen=True)
class TinyData:
    """Generated videos with their manifests, stores and vocabulary."""

    videos: str
    vocab: str
    train_manifest: str
    train_store: str
    val_store: str


@pytest.fixture(scope="session")
def tiny_data(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Forty training clips in three shards, one of them damaged, and twelve clips to search in."""
    folder = tmp_path_factory.mktemp("tiny_data")
    plan = synthetic.plan_videos(num_train=40, num_val=12, seed=0)
    manifests, stores = {}, {}
    for split, videos in plan.items():
        everything = {"id": np.arange(len(videos))}
        synthetic.write_videos(everything, str(folder / "videos"), videos)
        annotations = folder / f"results_{split}.csv"
        annotations.write_text(
            synthetic.webvid_csv(
                [video.video_id for video in videos],
                [video.page_dir for video in videos],
                [video.scene.caption() for video in videos],
            )
        )
        manifests[split] = str(folder / f"{split}.parquet")
        run_manifest(
            ManifestConfig(
                annotations=(str(annotations),),
                videos=str(folder / "videos"),
                output=manifests[split],
                split=split,
            )
        )
        stores[split] = run_ingest(tiny_ingest(manifests[split], str(folder / "clips" / split)))[
            "store"
        ]
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(synthetic.vocabulary()) + "\n")
    return TinyData(
        videos=str(folder / "videos"),
        vocab=str(vocab),
        train_manifest=manifests["train"],
        train_store=stores["train"],
        val_store=stores["val"],
    )


@functools.cache
def _tracking_folder() -> str:
    """One MLflow database for all ingests: making one takes seconds."""
    folder = tempfile.mkdtemp(prefix="stgt-mlflow-")
    atexit.register(shutil.rmtree, folder)
    return folder


def tiny_ingest(manifest: str, output: str, **changes: Any) -> IngestConfig:
    """The ingest of the tests: three shards of the training clips."""
    values = {
        "manifest": manifest,
        "output": output,
        "sampling": recipes.tiny_sampling(),
        "clips_per_shard": 14,
        "num_workers": 2,
        "tracking": TrackingConfig(uri=f"sqlite:///{_tracking_folder()}/mlflow.db"),
    }
    return IngestConfig(**{**values, **changes})
