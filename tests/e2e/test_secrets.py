"""Planted secrets are in nothing that jobs leave: files, stores, MLflow, logs, errors, reports.

Each test first shows that the jobs used the secrets, since one that is never used cannot leak.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.common import storage
from pipelines.video.synthetic import dataset
from tests.helpers.data import PROJECT
from tests.helpers.faulty_s3 import FaultyS3
from tests.helpers.heads import ray_head
from tests.helpers.mlflow_servers import BrokenServer, mlflow_server
from tests.helpers.secret_search import find_leaks, leaks_in, planted
from tests.helpers.servers import free_ports

pytestmark = pytest.mark.slow

USER = "somebody"


@dataclass(frozen=True)
class Planted:
    """Secrets, and an environment in which jobs have them."""

    secrets: dict[str, str]
    environment: dict[str, str]

    def run(self, job: str, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", f"jobs.{job}", *flags],
            cwd=PROJECT,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    def leaks(self, name: str, done: subprocess.CompletedProcess[str]) -> list[str]:
        """Secrets that a job printed."""
        return leaks_in(name, (done.stdout + done.stderr).encode(), self.secrets)


@pytest.fixture
def secrets_(s3_environment: int, tmp_path: Path) -> Planted:
    """Secrets of every kind in a job's environment."""
    found = {
        name: planted(name)
        for name in ("aws-key", "aws-token", "mlflow", "uri", "ray", "hf", "database")
    }
    token = tmp_path / "ray-token"
    token.touch(mode=0o600)
    token.write_text(found["ray"].replace("+/", "00"))  # tokens of Ray are letters and digits
    found["ray"] = token.read_text()
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("RAY_", "MLFLOW_", "AWS_", "PG"))
    }
    environment = {
        **kept,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_environment}",
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": found["aws-key"],
        "AWS_SESSION_TOKEN": found["aws-token"],
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": found["mlflow"],
        "HF_TOKEN": found["hf"],
        "PGPASSWORD": found["database"],
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return Planted(found, environment)


@pytest.fixture
def broken() -> Iterator[BrokenServer]:
    server = BrokenServer()
    yield server
    server.close()


def uri_with(secret: str, address: str, scheme: str = "http") -> str:
    """A URI with user name and password, whose slash and plus are quoted."""
    quoted = secret.replace("+", "%2B").replace("/", "%2F")
    return f"{scheme}://{USER}:{quoted}@{address}"


def test_errors_of_servers_that_refuse_show_no_secret(
    secrets_: Planted, broken: BrokenServer, s3: FaultyS3, tmp_path: Path
) -> None:
    broken.status, broken.body = 401, b"You are not authenticated."
    run_id = uuid.uuid4().hex
    refused = secrets_.run("compare", run_id, f"--tracking.uri=http://{broken.address}")
    sent = base64.b64decode(broken.headers["Authorization"].removeprefix("Basic ")).decode()
    assert sent == f"{USER}:{secrets_.secrets['mlflow']}"
    forbidden = secrets_.run(
        "manifest",
        "--annotations=s3://bucket/forbidden/a.csv",
        "--videos=s3://bucket/videos",
        f"--output={tmp_path / 'm.parquet'}",
    )
    for done, expected in (
        (refused, "does not accept the credentials"),
        (forbidden, "forbidden/a.csv"),
    ):
        assert done.returncode == 1, done.stderr
        assert expected in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert secrets_.leaks(expected, done) == []


@pytest.mark.soak
def test_a_whole_pipeline_leaves_no_secret(
    secrets_: Planted, broken: BrokenServer, s3: FaultyS3, tmp_path: Path
) -> None:
    """Manifest, ingest, training and evaluation on S3, with credentials in the tracking URI."""
    bucket = f"s3://bucket/{uuid.uuid4().hex}"
    prepared = _write_videos(tmp_path / "data", bucket)
    with (
        mlflow_server(tmp_path, f"{bucket}/mlflow") as server,
        ray_head(secrets_.environment, tmp_path / "head.log") as head,
    ):
        address = server.removeprefix("http://")
        flag = f"--tracking.uri={uri_with(secrets_.secrets['uri'], address)}"
        variables = {"RAY_ADDRESS": head.address}
        jobs = {
            "manifest": [
                f"--annotations={bucket}/results_train.csv", f"--videos={bucket}/videos",
                f"--output={bucket}/train.parquet",
            ],
            "ingest": [
                f"--manifest={bucket}/train.parquet", f"--output={bucket}/clips",
                "--sampling.size=64", "--sampling.num-frames=8", "--num-workers=1",
                "--max-bad-fraction=0.5", flag,
            ],
            "train": [
                "pretrain_stage1_tiny", f"--data={bucket}/clips", f"--vocab={prepared}",
                f"--output={bucket}/run", "--steps=4", "--global-batch=8", "--num-workers=1",
                "--checkpoint-every=2", "--optim.warmup-steps=1", flag,
            ],
            "evaluate": [
                "any", f"--data={bucket}/clips", f"--manifest={bucket}/train.parquet",
                f"--checkpoint={bucket}/run", f"--output={bucket}/evaluation", flag,
            ],
        }  # fmt: skip
        leaks = []
        for name, flags in jobs.items():
            done = secrets_.run(name, *flags, **variables)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout.splitlines()[-1])
            leaks += secrets_.leaks(f"output of {name}", done)
        # A training whose MLflow refuses it goes on, and one without rights to its data fails.
        broken.status, broken.body = 401, b"You are not authenticated."
        again = [word for word in jobs["train"] if not word.startswith(("--output", "--tracking"))]
        refused = secrets_.run(
            "train", *again, f"--output={bucket}/refused",
            f"--tracking.uri={uri_with(secrets_.secrets['uri'], broken.address)}", **variables,
        )  # fmt: skip
        assert refused.returncode == 0, refused.stderr
        assert "does not accept the credentials" in refused.stderr
        forbidden = secrets_.run(
            "ingest", f"--manifest={bucket}/train.parquet", f"--output={bucket}/forbidden/x",
            flag, **variables,
        )  # fmt: skip
        assert forbidden.returncode == 1
        (port,) = free_ports(1)
        database = uri_with(secrets_.secrets["database"], f"127.0.0.1:{port}/runs", "postgresql")
        lost = secrets_.run("compare", uuid.uuid4().hex, MLFLOW_TRACKING_URI=database)
        assert lost.returncode == 1
        assert "cannot be used" in lost.stderr.splitlines()[-1]
        leaks += secrets_.leaks("a database that does not answer", lost)
        leaks += secrets_.leaks("a refused training", refused)
        leaks += secrets_.leaks("an ingest without rights", forbidden)
        downloaded = _download(bucket, tmp_path / "downloaded")
        # The tables of MLflow: parameters, tags, metrics, and its server's log.
        (tmp_path / "downloaded" / "mlflow.db").write_bytes((tmp_path / "mlflow.db").read_bytes())
        (tmp_path / "downloaded" / "server.log").write_bytes((tmp_path / "server.log").read_bytes())
        found, count = find_leaks(downloaded, secrets_.secrets)
        in_ray, ray_count = find_leaks(head.folder, secrets_.secrets)
    names = {path.name for path in downloaded.rglob("*")}
    assert {"config.json", "report.html", "catalogue.json", "result.json"} <= names
    assert count > 40
    assert ray_count > 40
    assert leaks + found + in_ray == []


def _write_videos(folder: Path, bucket: str) -> Path:
    """Put generated videos and annotations onto S3; gives a local vocabulary."""
    videos = dataset.plan_videos(num_train=40, num_val=10, seed=0)
    dataset.write_split(bucket, "train", videos["train"])
    folder.mkdir()
    dataset.write_vocabulary(str(folder / "vocab.txt"))
    return folder / "vocab.txt"


def _download(bucket: str, folder: Path) -> Path:
    names = storage.list_below(bucket, 100_000)
    assert names
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        storage.fetch_file(f"{bucket}/{name}", target)
    return folder
