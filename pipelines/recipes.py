"""Complete, named configs. What a recipe leaves to the caller is where things lie.

The tiny recipes run on two CPU cores in minutes and go through every part of the model.
"""

from __future__ import annotations

from dataclasses import replace

from pipelines.config import (
    SamplingConfig,
    SweepConfig,
    TrackingConfig,
    TrainConfig,
    fingerprint,
    to_dict,
)
from stgt.config import AugmentConfig, OptimConfig, stgt_tiny

TINY_LR = 1e-3
TINY_STAGE2_LR = 2e-4
TINY_MIN_LR = 1e-5


def tiny_sampling() -> SamplingConfig:
    """Twelve frames of 64 pixels a clip: twice what the tiny model takes."""
    return SamplingConfig(num_frames=12, size=64)


def pretrain_stage1_tiny(store: str, output: str, vocab: str) -> TrainConfig:
    """From scratch with hard contrastive targets: 450 steps of 32 clips, 2 CPU workers, 3 minutes.

    Nothing is mirrored or cropped: captions of the quickstart tell left from right.
    """
    model = stgt_tiny()
    return TrainConfig(
        name="pretrain_stage1_tiny",
        store=store,
        output=output,
        vocab=vocab,
        model=model,
        targets="hard",
        num_frames=model.num_frames,
        augment=AugmentConfig(crop_scale_min=1.0, flip=False, num_ops=0),
        optim=OptimConfig(lr=TINY_LR, min_lr=TINY_MIN_LR, warmup_steps=20),
        steps=450,
        global_batch=32,
        block_clips=16,
        num_workers=2,
        checkpoint_every=100,
        tracking=TrackingConfig(),
    )


def pretrain_stage2_tiny(store: str, output: str, vocab: str, init_from: str) -> TrainConfig:
    """From a stage 1 checkpoint with self-similarity targets: 80 steps of 32 clips."""
    model = stgt_tiny()
    return TrainConfig(
        name="pretrain_stage2_tiny",
        store=store,
        output=output,
        vocab=vocab,
        init_from=init_from,
        model=model,
        targets="self_similarity",
        num_frames=model.num_frames,
        augment=AugmentConfig(crop_scale_min=1.0, flip=False, num_ops=0),
        optim=OptimConfig(lr=TINY_STAGE2_LR, min_lr=TINY_MIN_LR, warmup_steps=10),
        steps=80,
        global_batch=32,
        block_clips=16,
        num_workers=2,
        checkpoint_every=100,
        tracking=TrackingConfig(),
    )


def quickstart_store(folder: str, split: str) -> str:
    """Where the quickstart in a folder keeps the clip store of a split."""
    return f"{folder}/clips/{split}/{fingerprint(to_dict(tiny_sampling()))}"


def sweep_tiny(quickstart: str, output: str) -> SweepConfig:
    """Four short trials on the quickstart's clips: two learning rates by two graph thresholds."""
    train = replace(
        pretrain_stage1_tiny(
            quickstart_store(quickstart, "train"), output, f"{quickstart}/vocab.txt"
        ),
        val_store=quickstart_store(quickstart, "val"),
        steps=12,
        num_workers=1,
        checkpoint_every=4,
        progress_every=1,
        tracking=TrackingConfig(uri=f"sqlite:///{quickstart}/mlflow.db", experiment="sweep"),
    )
    return SweepConfig(train=train, output=output, grace_steps=4)
