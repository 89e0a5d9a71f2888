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
DUAL_ENCODERS = (
    "optim.lr=loguniform(2e-8,1e-5)",
    "optim.weight_decay=loguniform(0.02,0.5)",
    "optim.warmup_steps=choice(30,300)",
    "num_frames=choice(6,12)",
    "label_smoothing.contrastive=uniform(0,0.1)",
)
ALPRO = (
    "optim.lr=loguniform(5e-6,2e-4)",
    "optim.weight_decay=loguniform(0.0001,0.1)",
    "optim.warmup_steps=choice(0,200,500)",
    "num_frames=choice(4,8)",
    "label_smoothing.contrastive=uniform(0,0.1)",
    "model.vision.drop_path=choice(0.0,0.1,0.2)",
)
ANSWERS_ALPRO = (
    "optim.lr=loguniform(1e-5,2e-4)",
    "optim.weight_decay=loguniform(1e-4,1e-2)",
    "optim.warmup_steps=choice(0,200,500)",
    "num_frames=choice(8,16)",
)
ANSWERS = (*ANSWERS_ALPRO[:3], "model.graph.similarity_threshold=uniform(0.3,0.9)")
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
    **dict.fromkeys(("alpro_msrvtt", "alpro_didemo"), ALPRO),
    **dict.fromkeys(("qa_msrvtt_stgt", "qa_msvd_stgt"), ANSWERS),
    **dict.fromkeys(("qa_msrvtt_alpro", "qa_msvd_alpro"), ANSWERS_ALPRO),
    **dict.fromkeys(("clip_msrvtt", "clip_didemo", "clip_lsmdc", "clip_msvd"), DUAL_ENCODERS),
}
"""Default space of each recipe; `space_of` also knows those of tiny variants."""

TINY_OPTIMIZER = (
    "optim.lr=loguniform(5e-5,3e-3)",
    "optim.weight_decay=loguniform(0.005,0.2)",
    "optim.warmup_steps=choice(0,5,10)",
)
TINY_DUAL_ENCODERS = (*TINY_OPTIMIZER, "label_smoothing.contrastive=uniform(0,0.1)")
TINY_ALPRO = (*TINY_DUAL_ENCODERS, "model.vision.drop_path=uniform(0,0.2)")
TINY_SPACE = (
    *TINY_OPTIMIZER,
    "model.graph.similarity_threshold=uniform(0.5,0.95)",
    "label_smoothing.caption=uniform(0,0.2)",
)


def sweep_of(name: str, train: TrainConfig) -> SweepConfig:
    """Return the default sweep over a recipe.

    Args:
        name: Name of the recipe.
        train: The recipe. Settings that the caller must give may be missing.
    """
    sweep = SweepConfig(
        train=replace(train, name=f"sweep_{name}"), space=space_of(name, train.model.kind)
    )
    if train.questions is None:
        return sweep
    return replace(sweep, metric=f"{train.validation_split}/{train.select_metric}")


def space_of(name: str, kind: str) -> tuple[str, ...]:
    """Return the default space of a recipe, which trains a kind of model.

    A recipe or a kind without a space of its own searches the settings of the optimizer.
    """
    tiny = {"stgt": TINY_SPACE, "dual_encoder": TINY_DUAL_ENCODERS, "alpro": TINY_ALPRO}
    if name.endswith("_tiny"):
        return tiny.get(kind, TINY_OPTIMIZER)
    return SPACES.get(name, TINY_OPTIMIZER)


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
