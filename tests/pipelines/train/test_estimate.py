"""The estimate of memory and time that a training logs."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pipelines.train import estimate, recipes
from pipelines.train import tracing as tracing_module
from pipelines.train.config import TrainConfig
from pipelines.train.estimate import announcing_estimate
from pipelines.train.tracing import trace_in_child
from tests.helpers.data import PROJECT
from tests.helpers.kills import processes
from tests.helpers.waiting import has_ended, wait_until


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setattr(estimate, "SHORT_S", 0.0)
    recipe = recipes.pretrain_stage1_tiny(("clips",), str(tmp_path), "vocab.txt", None)
    return replace(recipe, num_workers=1)


def tracing() -> list[psutil.Process]:
    return processes("trace_for_parent")


@pytest.mark.slow
def test_the_estimate_is_logged_and_leaves_no_process(
    config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with announcing_estimate(config, 0) as made:
        assert made.seconds is None
        made.has_stepped.set()
        wait_until(lambda: made.seconds is not None)
        assert tracing() == []
    assert "0.0115 TFLOP per step" in caplog.text
    assert "0.8 M parameters, 0.8 M of them trainable" in caplog.text


@pytest.mark.slow
def test_the_process_that_waits_for_the_step_loads_neither_torch_nor_ray(
    config: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    code = (
        "import pickle, sys, threading; from pathlib import Path; "
        "from pipelines.train import tracing; tracing.LOOK_EVERY_S = 0.01; "
        f"config = pickle.loads(Path({str(tmp_path / 'config')!r}).read_bytes()); "
        "step = tracing.trace_in_child(config, threading.Event()); "
        "print(step.parameters, {'torch', 'ray', 'stgt.training.footprint'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, check=True, capture_output=True, text=True
    )
    parameters, _, loaded = done.stdout.partition(" ")
    assert int(parameters) > 800_000
    assert loaded == "set()\n"


@pytest.mark.slow
def test_a_process_that_fails_says_why(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing_module, "__name__", "pipelines.train.nothing")
    with pytest.raises(ChildProcessError, match=r"exit code 1 \(ModuleNotFoundError: No module"):
        trace_in_child(config, threading.Event())


@pytest.mark.slow
def test_a_training_that_ends_meanwhile_ends_the_estimate(
    config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with announcing_estimate(config, 0) as made:
        made.has_stepped.set()
        wait_until(tracing)
        (child,) = tracing()
    assert has_ended(child)
    assert made.seconds is None
    assert caplog.records == []


@pytest.mark.slow
def test_an_estimate_that_fails_is_logged_and_the_training_goes_on(
    config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with announcing_estimate(config, 0) as made:
        made.has_stepped.set()
        wait_until(tracing)
        tracing()[0].kill()
        wait_until(lambda: caplog.records)
    assert caplog.messages == [
        "could not estimate memory and time of the run: its process ended with exit code -9"
    ]
    assert made.seconds is None
