"""Trainings of the tiny model."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts import checkpoints
from pipelines.common.config import TrackingConfig
from pipelines.feed.loader import LoaderConfig
from pipelines.train import recipes, run_folder
from pipelines.train.config import TrainConfig
from pipelines.train.preflight import with_absolute_paths, with_vocabulary
from stgt.config import AugmentConfig, OptimConfig
from tests.helpers.data import TinyData
from tests.helpers.waiting import wait_until

STEPS = 12
BATCH = 12


def tiny_train(data: TinyData, output: Path, /, **changes: Any) -> TrainConfig:
    recipe = recipes.pretrain_stage1_tiny((data.train_store,), str(output), data.vocab)
    values: dict[str, Any] = {
        "steps": 6,
        "global_batch": 16,
        "block_clips": 4,
        "checkpoint_every": 2,
        "val_store": data.val_store,
        "progress_every": 1,
        "optim": OptimConfig(lr=1e-3, warmup_steps=2),
        "tracking": TrackingConfig(uri=f"sqlite:///{output.parent}/mlflow.db"),
    }
    return replace(recipe, **{**values, **changes})


def begun(config: TrainConfig) -> None:
    """As after a checkpoint, which is what binds a run's folder to its settings."""
    folder = Path(run_folder.checkpoint_uri(config.output, 2))
    folder.mkdir(parents=True)
    (folder / checkpoints.COMPLETE).touch()


def loader_config(data: TinyData, **changes: Any) -> LoaderConfig:
    values: dict[str, Any] = {
        "data": (data.train_store,),
        "vocab": data.vocab,
        "max_text_tokens": 16,
        "num_frames": 6,
        "size": 64,
        "resize": "squash",
        "frame_choice": "random",
        "augment": AugmentConfig(crop_scale_min=0.8, flip=True),
        "seed": 0,
    }
    return LoaderConfig(**{**values, **changes})


def killable_train(data: TinyData, output: Path, **changes: Any) -> TrainConfig:
    """Twelve steps of twelve clips, nearly four epochs; 1, 2 and 3 workers can do it.

    A data worker loads the clips, as on a cluster.
    """
    values: dict[str, Any] = {
        "steps": STEPS,
        "global_batch": BATCH,
        "block_clips": 2,
        "checkpoint_every": 3,
        "keep_checkpoints": 9,
        "val_store": None,
        "record_samples": True,
        "num_loaders": 1,
    }
    return tiny_train(data, output, **{**values, **changes})


def wait_for_step(output: Path, step: int) -> None:
    wait_until(lambda: (run_folder.latest(str(output)) or 0) >= step, 400, every_s=0.02)


def assert_equal_up_to_rounding(found: dict[int, float], wanted: dict[int, float]) -> None:
    """Compare losses by step of two runs, in one of which sums are taken in another order.

    This is so after a change of the number of workers, or with more threads than cores. The first
    loss that is not equal bit for bit differs by rounding alone. Its gradient may differ more: a
    text's similarity is that with the best query token, and rounding decides which of two nearly
    equal ones this is. In one such case, the norm of the gradient changed by 0.1 % and the next
    loss by 0.07 %. Nine steps later it was 2 %.
    """
    assert found.keys() == wanted.keys()
    others = [step for step in sorted(found) if found[step] != wanted[step]]
    tolerances = itertools.chain((1e-5, 3e-3), itertools.repeat(0.05))
    for step, tolerance in zip(others, tolerances, strict=False):
        assert found[step] == pytest.approx(wanted[step], rel=tolerance), step


def resolved(config: TrainConfig) -> TrainConfig:
    """As a run resolves it: absolute paths, and the model's sizes for its vocabulary."""
    return with_vocabulary(with_absolute_paths(config))
