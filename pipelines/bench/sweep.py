"""Time of a sweep of eight tiny trials, against the same eight trainings as separate commands.

All are commands, so that starting Python, Ray and MLflow counts on both sides.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from pipelines.bench.harness import Row, faster, in_child, median_seconds, returned_by_child
from pipelines.bench.tiny import make_store
from pipelines.common import storage
from pipelines.common.config import TrackingConfig
from pipelines.video.synthetic import dataset

logger = logging.getLogger(__name__)

RECIPE = "pretrain_stage1_tiny"
RATES = (1e-3, 1e-4, 2e-3, 3e-4, 5e-4, 2e-4, 3e-3, 7e-4)
"""Learning rates of the eight trials, good and bad ones mixed, as a random search finds them."""
STEPS = 48
CHECKPOINT_EVERY = 8
"""Steps between validations, at which ASHA may stop a trial."""
VAL_CLIPS = 64
TRAIN, VAL, VOCAB, STORES = "train", "val", "vocab.txt", "stores.json"


def measure(repeats: int, connect: Callable[[], None]) -> list[Row]:
    """Measure the seconds of a sweep without and with ASHA, and of the separate trainings."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        in_child(_make_stores, (folder,), connect)  # so that no Ray runs beside the commands
        runs = 0

        def output() -> str:
            nonlocal runs
            runs += 1
            return str(folder / f"output{runs}")

        seconds = median_seconds(
            {
                "separate trainings": lambda: returned_by_child(
                    _separate_trainings, (folder, output())
                ),
                "sweep": lambda: returned_by_child(_sweep, (folder, output(), "none")),
                "sweep with ASHA": lambda: returned_by_child(_sweep, (folder, output(), "asha")),
            },
            "cpu",
            repeats,
            warm=True,
        )
    baseline = seconds["separate trainings"]
    return [
        faster("sweep", seconds["sweep"], baseline),
        faster("sweep/asha", seconds["sweep with ASHA"], baseline),
    ]


def _make_stores(folder: Path) -> None:
    tracking = _tracking(folder)
    stores = {split: make_store(folder, split, tracking, VAL_CLIPS) for split in (TRAIN, VAL)}
    storage.write_json(str(folder / STORES), stores)
    dataset.write_vocabulary(str(folder / VOCAB))


def _tracking(folder: Path) -> TrackingConfig:
    return TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db")


def _common_flags(folder: Path) -> list[str]:
    """Return the flags that a sweep and a training share."""
    stores = storage.read_json(str(folder / STORES))
    flags = {
        "--data": stores[TRAIN],
        "--val-store": stores[VAL],
        "--vocab": str(folder / VOCAB),
        "--steps": str(STEPS),
        "--checkpoint-every": str(CHECKPOINT_EVERY),
        "--tracking.uri": _tracking(folder).uri or "",
    }
    return [text for flag in flags.items() for text in flag]


def _separate_trainings(folder: Path, output: str) -> None:
    for number, rate in enumerate(RATES):
        flags = ["--optim.lr", f"{rate:g}", "--output", f"{output}/training{number}"]
        _run(["jobs.train", RECIPE, *_common_flags(folder), *flags])


def _sweep(folder: Path, output: str, scheduler: str) -> None:
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    space = ["--space", f"optim.lr=grid({rates})", "--search", "grid", "--scheduler", scheduler]
    _run(["jobs.sweep", RECIPE, *_common_flags(folder), "--output", output, *space])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"python -m {' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}"
        )
