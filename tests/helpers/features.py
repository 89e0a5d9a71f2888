"""Small clip stores with different frames, and checkpoints, for tests of frame features."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.artifacts import checkpoints
from pipelines.feed.config import TrainingFeatures
from pipelines.feed.features.config import FeaturesConfig
from pipelines.train import recipes
from pipelines.train.config import TrainConfig
from pipelines.video import frame_codec
from pipelines.video.config import SamplingConfig
from stgt.model import STGT
from tests.helpers.models import CONFIGS, WORDS, small_tokenizer
from tests.helpers.stores import write_store

SHARDS = (7, 6, 5)
"""Clips of each shard."""
STORED_FRAMES = 8
SIZE = 64


@dataclass(frozen=True)
class FeatureData:
    """A store and a checkpoint whose frame encoder a training may freeze."""

    folder: Path
    store: str
    checkpoint: str
    vocab: str

    def features(self, name: str, **changes: Any) -> FeaturesConfig:
        """Settings that write features into a folder of their own."""
        values = {
            "store": self.store,
            "checkpoint": self.checkpoint,
            "output": str(self.folder / name),
            "batch_frames": 16,
        }
        return FeaturesConfig(**{**values, **changes})

    def train(self, name: str, *features: str, **changes: Any) -> TrainConfig:
        """Settings of a training with a frozen encoder, from stored tokens if there are any."""
        recipe = recipes.pretrain_stage1_tiny(
            (self.store,), str(self.folder / name), self.vocab, self.checkpoint
        )
        model = CONFIGS["stgt"]()
        values: dict[str, Any] = {
            "model": replace(model, vision=replace(model.vision, frozen=True)),
            "num_frames": 4,
            "steps": 10,
            "global_batch": 6,
            "block_clips": 2,
            "num_workers": 1,
            "features": TrainingFeatures(store=features),
        }
        return replace(recipe, **{**values, **changes})


def make_feature_data(folder: Path) -> FeatureData:
    """Write a store of 18 clips in three shards, one of which is shorter, and a checkpoint."""
    generator = np.random.default_rng(0)
    sampling = SamplingConfig(num_frames=STORED_FRAMES, size=SIZE)
    shards, number = [], 0
    for clips in SHARDS:
        rows = []
        for _ in range(clips):
            count = STORED_FRAMES - 3 * (number == 4)
            coarse = generator.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
            frames = coarse.repeat(SIZE // 8, axis=1).repeat(SIZE // 8, axis=2)
            captions = [
                " ".join(generator.choice(WORDS, 4).tolist()) for _ in range(1 + number % 2)
            ]
            rows.append(
                {
                    "clip_id": f"clip{number}",
                    "captions": captions,
                    "start_s": 0.0,
                    "end_s": 1.0,
                    "frames": frame_codec.encode_frames(frames, sampling.codec, 95),
                    "frame_indices": list(range(count)),
                }
            )
            number += 1
        shards.append(rows)
    store = write_store(folder / "store", sampling, shards)
    tokenizer = small_tokenizer(folder)
    torch.manual_seed(0)
    model = STGT(CONFIGS["stgt"]().for_tokenizer(tokenizer), tokenizer)  # type: ignore[arg-type]
    checkpoint = str(folder / "checkpoint")
    checkpoints.save(checkpoint, model, tokenizer, step=0)
    return FeatureData(folder, store, checkpoint, str(folder / "words.txt"))
