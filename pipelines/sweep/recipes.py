"""The sweep that runs by default, and the space that is searched by default for each recipe."""

from __future__ import annotations

from dataclasses import replace

from pipelines.common.config import TrackingConfig
from pipelines.sweep.config import SweepConfig
from pipelines.train.config import TrainConfig
from pipelines.train.recipes import pretrain_stage1_tiny


def _space(lr: str, warmup: str, *others: str) -> tuple[str, ...]:
    return (
        f"optim.lr=loguniform({lr})",
        "optim.weight_decay=loguniform(0.005,0.2)",
        f"optim.warmup_steps=choice({warmup})",
        "model.graph.similarity_threshold=uniform(0.3,0.9)",
        *others,
    )


FINETUNING = (
    "num_frames=choice(4,8)",
    "label_smoothing.caption=uniform(0,0.2)",
    "global_batch=choice(80,160)",
    "model.vision.unfreeze_last_blocks=choice(0,4)",
)
SPACES = {
    # Around the published values; batches and frames that fit the GPUs of the recipes.
    "pretrain_stage1": _space(
        "2e-5,4e-4", "500,2000", "label_smoothing.contrastive=uniform(0,0.2)"
    ),
    "pretrain_stage2": _space(
        "5e-6,1e-4", "200,1000", "label_smoothing.contrastive=uniform(0,0.1)"
    ),
    "finetune_msrvtt": _space("5e-6,1e-4", "0,200,500", *FINETUNING),
    "finetune_didemo": _space("5e-6,1e-4", "0,50,100", *FINETUNING),
    "finetune_lsmdc": _space("5e-6,1e-4", "0,200,500", *FINETUNING),
    "finetune_msvd": _space("5e-6,1e-4", "0,100,200", *FINETUNING),
}
"""Default space of each recipe; tiny variants have `TINY_SPACE`."""

TINY_SPACE = (
    "optim.lr=loguniform(5e-5,3e-3)",
    "optim.weight_decay=loguniform(0.005,0.2)",
    "optim.warmup_steps=choice(0,5,10)",
    "model.graph.similarity_threshold=uniform(0.5,0.95)",
    "label_smoothing.caption=uniform(0,0.2)",
)


def sweep_of(name: str, train: TrainConfig) -> SweepConfig:
    """Return the default sweep over a recipe.

    Args:
        name: Name of the recipe.
        train: The recipe. Settings that the caller must give may be missing.
    """
    return SweepConfig(
        train=replace(train, name=f"sweep_{name}"),
        space=TINY_SPACE if name.endswith("_tiny") else SPACES[name],
    )


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
        name="sweep",
        val_store=val_store,
        steps=12,
        num_workers=1,
        checkpoint_every=4,
        progress_every=1,
        tracking=TrackingConfig(uri=uri, experiment="sweep"),
    )
    return SweepConfig(
        train=train,
        space=(
            "optim.lr=grid(3e-4,1e-3)",
            "model.graph.similarity_threshold=grid(0.5,0.95)",
        ),
        search="grid",
        metric="val/t2v/R10",
        grace_steps=4,
        scheduler="asha",
    )
