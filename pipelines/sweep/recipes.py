"""The sweep that runs by default."""

from __future__ import annotations

from dataclasses import replace

from pipelines.common.config import TrackingConfig
from pipelines.sweep.config import SweepConfig
from pipelines.train.recipes import pretrain_stage1_tiny


def sweep_tiny(train_store: str, val_store: str, vocab: str, uri: str, output: str) -> SweepConfig:
    """Return a sweep of four short trials: two learning rates by two graph thresholds.

    Args:
        train_store: Clip store to train on.
        val_store: Clip store that trials are compared on.
        vocab: Vocabulary file.
        uri: MLflow tracking URI.
        output: Output folder of the sweep.
    """
    train = replace(
        pretrain_stage1_tiny((train_store,), output, vocab),
        val_store=val_store,
        steps=12,
        num_workers=1,
        checkpoint_every=4,
        progress_every=1,
        tracking=TrackingConfig(uri=uri, experiment="sweep"),
    )
    return SweepConfig(train=train, output=output, grace_steps=4)
