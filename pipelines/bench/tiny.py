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
from pipelines.synthetic import dataset
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


def make_tiny(folder: Path) -> Tiny:
    """Write videos, a clip store and an untrained checkpoint to a folder."""
    videos = dataset.plan_videos(CLIPS, VAL_CLIPS, seed=0)["train"]
    annotations = dataset.write_split(str(folder), "train", videos)
    manifest = str(folder / "train.parquet")
    run_manifest(
        ManifestConfig(
            annotations=(annotations,), videos=(str(folder / "videos"),), output=manifest
        )
    )
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db")
    store = run_ingest(
        IngestConfig(
            manifest=manifest,
            output=str(folder / "clips"),
            sampling=tiny_sampling(),
            clips_per_shard=128,
            tracking=tracking,
        )
    )["store"]
    vocab = folder / "vocab.txt"
    dataset.write_vocabulary(str(vocab))
    tokenizer = Tokenizer(vocab)
    torch.manual_seed(0)
    model = STGT(stgt_tiny().for_vocabulary(tokenizer.bos_id, len(tokenizer), tokenizer.pad_id))
    checkpoint = storage.join(str(folder), "untrained")
    checkpoints.save(checkpoint, model, tokenizer, step=0)
    return Tiny(store=store, vocab=str(vocab), checkpoint=checkpoint, tracking=tracking)
