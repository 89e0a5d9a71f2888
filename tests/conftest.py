"""Shared fixtures. What lies outside the project is used where it exists, else named."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import ray

from jobs import entry
from pipelines.common import storage
from pipelines.common.config import TrackingConfig
from pipelines.common.tracking import Run
from pipelines.ingest.run import run_ingest
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.run import run_manifest
from pipelines.video.synthetic import dataset
from tests.helpers.data import PROJECT, TinyData, tiny_ingest
from tests.helpers.faulty_s3 import FaultyS3
from tests.helpers.heads import NICENESS, SETTINGS
from tests.helpers.servers import listens
from tests.helpers.waiting import wait_until

# An example may take long on a machine that does other things as well.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")

os.environ.setdefault(NICENESS, SETTINGS[NICENESS])  # jobs have the others by themselves

STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--minutes", type=float, default=30.0, help="no further soak test is started after these"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if item.get_closest_marker("soak") and time.monotonic() > STARTED + 60 * minutes:
        pytest.skip(f"{minutes:g} minutes of soak tests are over; --minutes gives them more")


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
def cases_dir() -> Path:
    """Small inputs that failed once."""
    return _outside("STGT_CASES_DIR", "cases")


@pytest.fixture(scope="session")
def crds_dir() -> Path:
    """KubeRay's custom resource definitions."""
    return _outside("STGT_KUBERAY_CRDS_DIR", "kuberay-crds")


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
        [sys.executable, "-m", "tests.helpers.faulty_s3", str(s3_environment)],
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
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, for tests to copy: making one takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    config = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", experiment="first")
    Run.open(config, "first", str(folder / "run.json")).finish()
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def ray_cluster(s3_environment: int) -> Iterator[None]:
    """One local Ray for all tests of the session: a start takes seconds."""
    entry.set_up_process()
    entry.start_ray(cpus=12, dashboard=True)  # trials that ASHA stopped free theirs late
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def joining(ray_cluster: None) -> dict[str, str]:
    """The environment of a job that joins this Ray, in place of starting one of its own."""
    return {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}


@pytest.fixture(scope="session")
def tiny_data(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Forty training clips in three shards, one of them damaged, and twelve clips to search in."""
    folder = tmp_path_factory.mktemp("tiny_data")
    plan = dataset.plan_videos(num_train=40, num_val=12, seed=0)
    manifests, stores = {}, {}
    for split, videos in plan.items():
        annotations = dataset.write_split(str(folder), split, videos)
        manifests[split] = str(folder / f"{split}.parquet")
        run_manifest(
            ManifestConfig(
                annotations=(annotations,),
                videos=str(folder / "videos"),
                output=manifests[split],
                split=split,
            )
        )
        stores[split] = run_ingest(tiny_ingest(manifests[split], str(folder / "clips" / split)))[
            "store"
        ]
    vocab = folder / "vocab.txt"
    dataset.write_vocabulary(str(vocab))
    return TinyData(
        videos=str(folder / "videos"),
        vocab=str(vocab),
        train_manifest=manifests["train"],
        train_store=stores["train"],
        val_store=stores["val"],
    )
