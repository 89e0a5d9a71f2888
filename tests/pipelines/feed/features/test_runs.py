"""Whole runs on stored tokens: kills, S3, evaluations, and trainings that resume."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.artifacts.frame_features import FrameFeatures, record_uri, shard_uri
from pipelines.common import storage
from pipelines.common.config import TrackingConfig
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.run import run_evaluate
from pipelines.feed.config import EvaluationFeatures, TrainingFeatures
from pipelines.feed.features.run import run_features
from pipelines.feed.stored_tokens import open_reader
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.journal import Journal
from pipelines.sweep.run import run_sweep
from pipelines.train import metrics_log
from pipelines.train.config import TrainConfig
from pipelines.train.run import run_train
from stgt.errors import PausedError, STGTError
from tests.helpers.data import PROJECT
from tests.helpers.faulty_s3 import FaultyS3
from tests.helpers.features import SHARDS, FeatureData, make_feature_data
from tests.helpers.waiting import wait_until


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> FeatureData:
    return make_feature_data(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def exact(data: FeatureData) -> str:
    return run_features(data.features("fp32", format="fp32"))["output"]


@pytest.fixture
def tracking(mlflow_database: Path, tmp_path: Path) -> TrackingConfig:
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    return TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")


@pytest.mark.slow
def test_a_killed_job_continues_and_leaves_equal_bytes(data: FeatureData) -> None:
    def command(name: str) -> list[str]:
        config = data.features(name)
        return [
            *(sys.executable, "-m", "jobs.features", "--store", config.store),
            *("--checkpoint", config.checkpoint, "--output", config.output),
            *("--views", "12", "--seed", "2", "--batch-frames", "16"),
        ]

    killed = data.features("killed").output
    job = subprocess.Popen(command("killed"), cwd=PROJECT, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: Path(record_uri(killed, 0)).exists(), every_s=0.01)
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    with pytest.raises(STGTError, match="holds no finished frame features"):
        FrameFeatures(killed)
    first = Path(shard_uri(killed, 0)).stat().st_mtime_ns
    unfinished = Path(killed, "shards/.00001.arrow.0.tmp")
    unfinished.touch()
    subprocess.run(command("killed"), cwd=PROJECT, check=True, capture_output=True)
    assert Path(shard_uri(killed, 0)).stat().st_mtime_ns == first
    assert not unfinished.exists()
    config = data.features("calm", views=12, seed=2)
    calm = run_features(config)["output"]
    for shard in range(len(SHARDS)):
        ours, theirs = Path(shard_uri(killed, shard)), Path(shard_uri(calm, shard))
        assert ours.read_bytes() == theirs.read_bytes()
    assert FrameFeatures(killed).digest == FrameFeatures(calm).digest


@pytest.mark.ray
def test_features_on_s3_are_read_out_of_the_cache(
    data: FeatureData, s3: FaultyS3, exact: str
) -> None:
    s3.fail(0.05)
    folder = run_features(data.features("", output="s3://bucket/features", format="fp32"))["output"]
    s3.fail(0)
    assert FrameFeatures(folder).digest == FrameFeatures(exact).digest
    run_features(data.features("", output="s3://bucket/features", format="fp32", verify=True))
    places = np.array([[0, shard, 2, 0, 1, 4] for shard in range(len(SHARDS))])
    cache = data.folder / "node cache"
    remote = open_reader([folder], cache, 10**9)
    local = open_reader([exact], cache, 10**9)
    assert remote.read(places).tokens.equal(local.read(places).tokens)
    assert len(list(cache.glob("*.arrow"))) == len(SHARDS)
    before = s3.bytes_read("features/shards")
    again = open_reader([folder], cache, 10**9)
    assert again.read(places).tokens.equal(local.read(places).tokens)
    assert s3.bytes_read("features/shards") == before


@pytest.mark.slow
def test_an_evaluation_of_stored_tokens_has_the_ranks_of_one_of_frames(
    data: FeatureData, exact: str, tracking: TrackingConfig, tmp_path: Path
) -> None:
    half = run_features(data.features("half"))["output"]
    found = {}
    for name, store in (("frames", None), ("exact", exact), ("half", half)):
        config = EvaluateConfig(
            data=data.store,
            checkpoint=data.checkpoint,
            output=str(tmp_path / name),
            k_rerank=4,
            num_frames=4,
            resamples=0,
            features=EvaluationFeatures(store=store),
            tracking=tracking,
        )
        metrics = run_evaluate(config)["metrics"]
        found[name] = metrics, storage.read_table(str(tmp_path / name / "ranks.parquet"))
    assert found["exact"][0] == found["half"][0] == found["frames"][0]
    assert found["exact"][1].equals(found["frames"][1])
    views = run_features(data.features("evaluated views", views=1))["output"]
    with pytest.raises(STGTError, match="holds augmented views of each clip, and an evaluation"):
        run_evaluate(replace(config, features=EvaluationFeatures(store=views)))
    with pytest.raises(STGTError, match="holds the evaluation of another checkpoint"):
        run_evaluate(replace(config, output=str(tmp_path / "exact")))


def losses(config: TrainConfig) -> dict[int, float]:
    """Loss of each step."""
    return {
        row["step"]: row["metrics"]["loss/total"]
        for step in metrics_log.steps(config.output)
        for row in metrics_log.read(config.output, step)
    }


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_training_on_stored_tokens_resumes_exactly(
    ray_cluster: None, data: FeatureData, exact: str, tracking: TrackingConfig
) -> None:
    """With a data worker on Ray, clips held out for validation, and a frozen encoder.

    The encoder was trained by the initial checkpoint, so that the run keeps a copy of it.
    """
    changes: dict[str, Any] = {
        "steps": 6,
        "checkpoint_every": 3,
        "num_loaders": 1,
        "hold_out": 3,
        "val_clips": 3,
        "tracking": tracking,
    }
    resumed = data.train("resumed", exact, **changes)
    with pytest.raises(PausedError):
        run_train(resumed, until=3)
    finished = run_train(resumed)
    plain = data.train("of frames", **changes)
    wanted = run_train(plain)
    assert losses(resumed) == losses(plain)
    assert sorted(losses(plain)) == list(range(1, 7))
    name = "val/t2v/MnR"
    assert finished["metrics"][name] == wanted["metrics"][name]
    half = run_features(data.features("half"))["output"]
    for features in (TrainingFeatures(store=(half,)), TrainingFeatures()):
        with pytest.raises(STGTError, match=r"different settings \(.*features_digest: "):
            run_train(replace(resumed, features=features))


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(300)
def test_the_trials_of_a_sweep_share_stored_tokens(
    ray_cluster: None, data: FeatureData, exact: str, tracking: TrackingConfig
) -> None:
    def trials(name: str, *features: str) -> list[tuple[dict[str, Any], dict[int, float]]]:
        train = data.train(
            name, *features, steps=4, hold_out=3, val_clips=3, checkpoint_every=2, tracking=tracking
        )
        config = SweepConfig(
            train=train,
            space=("optim.lr=grid(1e-3,1e-4)",),
            search="grid",
            metric="val/t2v/Rmean",
            grace_steps=4,
        )
        run_sweep(config)
        journal = Journal(train.output)
        return [
            (one.values, losses(replace(train, output=journal.folder(f"trial_{number:05d}"))))
            for number, one in enumerate(journal.outcomes())
        ]

    found = trials("swept tokens", exact)
    assert [values for values, _ in found] == [{"optim.lr": 1e-3}, {"optim.lr": 1e-4}]
    assert all(list(steps) == [1, 2, 3, 4] for _, steps in found)
    assert found[0][1] != found[1][1]
    assert found == trials("swept frames")
