"""Complete, named configs. What a recipe leaves to the caller is where things lie.

The tiny recipes run on two CPU cores in minutes and go through every part of the model.
"""

from __future__ import annotations

from pipelines.config import SamplingConfig, TrackingConfig, TrainConfig
from stgt.config import stgt_tiny
from stgt.frames import AugmentConfig
from stgt.optim import OptimConfig

TINY_LR = 1e-3
TINY_MIN_LR = 1e-5


def tiny_sampling() -> SamplingConfig:
    """Twelve frames of 64 pixels a clip: twice what the tiny model takes."""
    return SamplingConfig(num_frames=12, size=64)


def pretrain_stage1_tiny(store: str, output: str, vocab: str) -> TrainConfig:
    """From scratch with hard contrastive targets: 220 steps of 64 clips, 2 CPU workers, 2 minutes.

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
        augment=AugmentConfig(crop_scale_min=1.0, flip=False),
        optim=OptimConfig(lr=TINY_LR, min_lr=TINY_MIN_LR, warmup_steps=20),
        steps=220,
        global_batch=64,
        block_clips=32,
        num_workers=2,
        checkpoint_every=50,
        tracking=TrackingConfig(),
    )


def pretrain_stage2_tiny(store: str, output: str, vocab: str, init_from: str) -> TrainConfig:
    """From a stage 1 checkpoint with self-similarity targets: 160 steps of 64 clips, 2 CPU workers."""
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
        augment=AugmentConfig(crop_scale_min=1.0, flip=False),
        optim=OptimConfig(lr=TINY_LR, min_lr=TINY_MIN_LR, warmup_steps=10),
        steps=160,
        global_batch=64,
        block_clips=32,
        num_workers=2,
        checkpoint_every=50,
        tracking=TrackingConfig(),
    )
