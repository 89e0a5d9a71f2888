"""Time until training resumes after one of two workers is killed, against a limit."""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from pipelines.bench.harness import Measured, Row, smaller
from pipelines.bench.tiny import Tiny, make_tiny
from pipelines.train import metrics_log, recipes, run_folder
from pipelines.train.config import TrainConfig
from pipelines.train.run import run_train

logger = logging.getLogger(__name__)

CHECKPOINT_EVERY = 10
STEPS = 60
STRUCK_AFTER = 20
WORKER = "RayTrainWorker"
LIMIT_S = 180.0


def measure(repeats: int, connect: Callable[[], None]) -> list[Row]:
    """Measure seconds from the kill to the end of the next step, and steps repeated and lost."""
    connect()
    stood_still, repeated, lost = [], [], []
    with TemporaryDirectory() as folder:
        tiny = make_tiny(Path(folder))
        for repeat in range(repeats):
            seconds, twice, missing = _strike(tiny, f"{folder}/run{repeat}")
            stood_still.append(seconds)
            repeated.append(twice)
            lost.append(missing)
            logger.info(
                "run %d of %d: training resumed after %.1f s, %.1f steps repeated, %d lost",
                repeat + 1,
                repeats,
                seconds,
                twice,
                missing,
            )
    return [
        smaller("recovery", "s", Measured(stood_still)),
        smaller("recovery/repeated", "steps", max(repeated)),
        smaller("recovery/lost", "steps", max(lost), STEPS),
    ]


def _strike(tiny: Tiny, output: str) -> tuple[float, float, int]:
    """Train, kill a worker, and return seconds without training, repeated steps and lost steps.

    Repeated steps are estimated from the time per step. Lost steps are missing from the metrics.
    """
    config = replace(
        recipes.pretrain_stage1_tiny((tiny.store,), output, tiny.vocab),
        steps=STEPS,
        checkpoint_every=CHECKPOINT_EVERY,
        tracking=tiny.tracking,
    )
    training = threading.Thread(target=run_train, args=(config,), daemon=True)
    training.start()
    deadline = time.monotonic() + LIMIT_S
    while (run_folder.latest(output) or 0) < STRUCK_AFTER:
        if time.monotonic() > deadline:
            raise RuntimeError("the training did not reach its checkpoint in time")
        time.sleep(0.05)
    time.sleep(1.0)  # so that steps after the checkpoint are lost
    struck = time.time()
    _kill_one()
    training.join(timeout=LIMIT_S)
    return _judge(config, struck)


def _kill_one() -> None:
    for process in psutil.Process().children(recursive=True):
        if WORKER in " ".join(process.cmdline()):
            process.kill()
            return
    raise RuntimeError(f"no {WORKER} process was found to kill")


def _judge(config: TrainConfig, struck: float) -> tuple[float, float, int]:
    rows = [
        row
        for step in range(CHECKPOINT_EVERY, STEPS + 1, CHECKPOINT_EVERY)
        for row in metrics_log.read(config.output, step)
    ]
    ended = [row["time_ms"] / 1000 for row in rows]
    step_s = statistics.median(row["metrics"]["time/step_s"] for row in rows)
    after = min(moment for moment in ended if moment > struck)
    before = max(moment for moment in ended if moment < struck)
    return after - struck, (struck - before) / step_s, STEPS - len({row["step"] for row in rows})
