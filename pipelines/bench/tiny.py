"""A small set of the quickstart's clips and an untrained checkpoint, for training benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.artifacts import checkpoints
from pipelines.common import storage
from pipelines.common.config import TrackingConfig
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.run import run_ingest
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.run import run_manifest
from pipelines.quickstart.store import tiny_sampling
from pipelines.video.synthetic import dataset
from stgt.config import stgt_tiny
from stgt.inputs.tokenizer import Tokenizer
from stgt.model import STGT

CLIPS = 256
VAL_CLIPS = 10


@dataclass(frozen=True)
class Tiny:
    """Inputs of a tiny training."""

    store: str
    vocab: str
    checkpoint: str
    tracking: TrackingConfig


def make_store(folder: Path, split: str, tracking: TrackingConfig, num_val: int = VAL_CLIPS) -> str:
    """Write the videos of a split to a folder, ingest them, and return their clip store.

    Args:
        folder: Folder for all files.
        split: "train" or "val".
        tracking: Where the ingest is recorded.
        num_val: Number of clips of the validation split.
    """
    videos = dataset.plan_videos(CLIPS, num_val, seed=0)[split]
    annotations = dataset.write_split(str(folder), split, videos)
    manifest = str(folder / f"{split}.parquet")
    run_manifest(
        ManifestConfig(
            annotations=(annotations,), videos=(str(folder / "videos"),), output=manifest
        )
    )
    return run_ingest(
        IngestConfig(
            manifest=manifest,
            output=str(folder / "clips" / split),
            sampling=tiny_sampling(),
            clips_per_shard=128,
            tracking=tracking,
        )
    )["store"]


def make_tiny(folder: Path) -> Tiny:
    """Write videos, a clip store and an untrained checkpoint to a folder."""
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db")
    store = make_store(folder, "train", tracking)
    vocab = folder / "vocab.txt"
    dataset.write_vocabulary(str(vocab))
    tokenizer = Tokenizer(vocab)
    torch.manual_seed(0)
    model = STGT(stgt_tiny().for_vocabulary(tokenizer.bos_id, len(tokenizer), tokenizer.pad_id))
    checkpoint = storage.join(str(folder), "untrained")
    checkpoints.save(checkpoint, model, tokenizer, step=0)
    return Tiny(store=store, vocab=str(vocab), checkpoint=checkpoint, tracking=tracking)
