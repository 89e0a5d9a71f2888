"""Evaluation under SIGKILL: of an actor in either stage, and of its driver. The metrics stay."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from pipelines.artifacts import checkpoints
from pipelines.common.config import TrackingConfig
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.run import run_evaluate
from stgt.config import stgt_tiny
from stgt.inputs.tokenizer import Tokenizer
from stgt.model import STGT
from tests.helpers.data import PROJECT, TinyData
from tests.helpers.kills import processes
from tests.helpers.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DEPTH = 24
"""Blocks of a frame encoder that takes long enough for something to happen meanwhile."""


@pytest.fixture(scope="module")
def config(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    """Forty clips in three parts, one clip missing."""
    folder = tmp_path_factory.mktemp("evaluate-kills")
    tokenizer = Tokenizer(tiny_data.vocab)
    torch.manual_seed(0)
    tiny = stgt_tiny().for_vocabulary(tokenizer.bos_id, len(tokenizer), tokenizer.pad_id)
    model = STGT(replace(tiny, vision=replace(tiny.vision, depth=DEPTH)))
    checkpoints.save(str(folder / "checkpoint"), model, tokenizer, step=0)
    return EvaluateConfig(
        data=tiny_data.train_store,
        manifest=tiny_data.train_manifest,
        checkpoint=str(folder / "checkpoint"),
        output=str(folder / "calm"),
        k_rerank=20,
        batch_clips=4,
        resamples=0,
        num_workers=1,
        tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"),
    )


@pytest.fixture(scope="module")
def calm(config: EvaluateConfig) -> dict[str, float]:
    """The metrics of an evaluation without an accident."""
    return run_evaluate(config)["metrics"]


def parts(output: str, kind: str) -> list[Path]:
    return sorted(Path(output).rglob(f"{kind}/0*.parquet"))


WRITES = {"Encoder": "videos", "Matcher": "pairs"}
"""What the actors of each stage leave."""


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param(("Encoder", "Matcher"), marks=pytest.mark.soak),
        pytest.param(("Encoder",), marks=pytest.mark.soak),
        pytest.param(("Matcher",), marks=pytest.mark.soak),
    ],
    ids="-".join,
)
def test_killed_actors_change_nothing(
    config: EvaluateConfig, calm: dict[str, float], tmp_path: Path, stages: tuple[str, ...]
) -> None:
    """One of each stage, as soon as it is there."""
    changed = replace(
        config, output=str(tmp_path / "out"), batch_clips=1, batch_pairs=2, num_workers=2
    )
    before = {stage: set(processes(stage)) for stage in stages}
    struck: list[psutil.Process] = []
    found: list[dict[str, float]] = []
    evaluation = threading.Thread(target=lambda: found.append(run_evaluate(changed)["metrics"]))
    evaluation.start()
    try:
        for stage in stages:
            wait_until(lambda: set(processes(stage)) - before[stage] or not evaluation.is_alive())  # noqa: B023
            struck.append((set(processes(stage)) - before[stage]).pop())
            struck[-1].kill()
            assert len(parts(changed.output, WRITES[stage])) < 3
    finally:
        evaluation.join(timeout=280)
    assert not evaluation.is_alive()
    assert not any(one.is_running() for one in struck)
    assert found == [pytest.approx(calm, abs=1e-6)]


def test_a_killed_driver_goes_on_from_the_embeddings_it_has(
    config: EvaluateConfig, calm: dict[str, float], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = [
        sys.executable, "-m", "jobs.evaluate", "any", f"--data={config.data}",
        f"--manifest={config.manifest}", f"--checkpoint={config.checkpoint}",
        f"--output={output}", "--k-rerank=20", "--batch-clips=4", "--resamples=0",
        "--num-workers=1", f"--tracking.uri={config.tracking.uri}",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(command, cwd=PROJECT, env=environment, stderr=subprocess.DEVNULL)
    family: list[psutil.Process] = []
    try:
        wait_until(lambda: processes("Encoder", driver.pid) or driver.poll() is not None)
        family = processes("Encoder", driver.pid)
        wait_until(lambda: parts(str(output), "videos") or driver.poll() is not None, every_s=0.01)
    finally:
        driver.kill()
        driver.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert family
    assert not alive, "processes of the killed evaluation go on"
    had = {path: path.stat().st_mtime_ns for path in parts(str(output), "videos")}
    assert 1 <= len(had) < 3
    assert not (output / "metrics.json").exists()
    again = run_evaluate(replace(config, output=str(output)))
    assert {path: path.stat().st_mtime_ns for path in had} == had
    assert again["metrics"] == pytest.approx(calm, abs=1e-6)
