"""Training configs for ALPRO: its two retrieval benchmarks with the published hyperparameters.

Sources: the configs and training code of salesforce/ALPRO. Two things there are worth knowing. The
configs name a weight decay of 0.001, which the code does not pass on to its optimizer; here it
applies, to matrices. Matching draws its negatives from the clips of one GPU there, and from the
whole batch here. Another text or another clip that is the same is not a negative here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pipelines.train.config import TrainConfig
from stgt.alpro.config import alpro_base, alpro_tiny
from stgt.config import AugmentConfig, LabelSmoothing, OptimConfig

BERT = "bert-base-uncased"

GPUS = 8

TINY_LR = 1e-3

TINY_MIN_LR = 1e-5

TINY_STEPS = 120

Data = tuple[str, ...]


def _retrieval(
    name: str,
    data: Data,
    output: str,
    init_from: str | None,
    vocab: str,
    *,
    tokens: int,
    clips_per_gpu: int,
    optim: OptimConfig,
    epochs: int,
) -> TrainConfig:
    """Return the settings that both benchmarks share."""
    return TrainConfig(
        recipe=name,
        name=name,
        data=data,
        output=output,
        vocab=vocab,
        init_from=init_from,
        model=alpro_base(num_frames=8, max_text_tokens=tokens),
        targets="hard",
        label_smoothing=LabelSmoothing(contrastive=0.0),
        frame_choice="random_sorted",
        optim=optim,
        # RandAugment's list of operations includes the horizontal flip there.
        augment=AugmentConfig(crop_scale_min=1.0, flip=True, num_ops=2, magnitude=5),
        epochs=epochs,
        global_batch=clips_per_gpu * GPUS,
        num_workers=GPUS,
        num_loaders=32,
        use_gpu=True,
        checkpoint_every=100,
        val_clips=1000,
        seed=42,
    )


def alpro_msrvtt(data: Data, output: str, init_from: str, vocab: str = BERT) -> TrainConfig:
    """Fine-tune ALPRO on MSR-VTT (9k split) for 5 epochs, with captions of up to 40 tokens.

    python -m jobs.train alpro_msrvtt --data CLIPS_9K --output RUN --init-from PRETRAINED

    PRETRAINED is the folder of an imported `alpro_pretrained_ckpt.pt` (see jobs.import_weights).
    Hardware: 8 GPUs, in fp32, with 8 clips per GPU and an estimated 20 GB of memory on each. The
    first tenth of the steps is the warm-up.

    The best checkpoint is chosen on 500 of the clips, which are held out of training. The authors
    chose it on a validation split; pass it as --val-store with --hold-out 0 to do the same.
    """
    recipe = _retrieval(
        "alpro_msrvtt",
        data,
        output,
        init_from,
        vocab,
        tokens=40,
        clips_per_gpu=8,
        optim=OptimConfig(
            lr=2.5e-5,
            min_lr=0.0,
            warmup_steps=1400,
            decay="linear",
            weight_decay=1e-3,
            max_grad_norm=5.0,
        ),
        epochs=5,
    )
    return replace(recipe, hold_out=500)


def alpro_didemo(data: Data, output: str, init_from: str, vocab: str = BERT) -> TrainConfig:
    """Fine-tune ALPRO on DiDeMo for 10 epochs, with paragraphs of up to 50 tokens.

    python -m jobs.train alpro_didemo --data CLIPS_TRAIN --val-store CLIPS_VAL --output RUN
    --init-from PRETRAINED

    PRETRAINED is the folder of an imported `alpro_pretrained_ckpt.pt` (see jobs.import_weights).
    Hardware: 8 GPUs, in fp32, with 12 clips per GPU and an estimated 28 GB of memory on each. The
    first tenth of the steps is the warm-up.

    Like the authors, this chooses the best checkpoint on DiDeMo's validation split.
    """
    return _retrieval(
        "alpro_didemo",
        data,
        output,
        init_from,
        vocab,
        tokens=50,
        clips_per_gpu=12,
        optim=OptimConfig(
            lr=4e-5,
            min_lr=0.0,
            warmup_steps=87,
            decay="linear",
            weight_decay=1e-3,
            max_grad_norm=20.0,
        ),
        epochs=10,
    )


def _tiny_twin(recipe: Callable[..., TrainConfig], title: str) -> Callable[..., TrainConfig]:
    """Return the tiny variant of a recipe, which starts from random weights.

    Frames are not mirrored or sheared, because captions of the quickstart distinguish left from
    right.
    """

    def make(
        data: Data, output: str, vocab: str = BERT, init_from: str | None = None
    ) -> TrainConfig:
        full = recipe(data, output, "", vocab)
        model = alpro_tiny()
        return replace(
            full,
            recipe=name,
            name=name,
            init_from=init_from,
            model=model,
            num_frames=model.num_frames,
            augment=AugmentConfig(crop_scale_min=1.0, flip=False, num_ops=0),
            optim=replace(
                full.optim, lr=TINY_LR, min_lr=TINY_MIN_LR, warmup_steps=20, max_grad_norm=1.0
            ),
            steps=TINY_STEPS,
            epochs=None,
            global_batch=32,
            num_workers=2,
            num_loaders=0,
            use_gpu=False,
            checkpoint_every=60,
            hold_out=min(full.hold_out, 64),
            val_clips=64,
        )

    name = f"{recipe.__name__}_tiny"
    make.__name__ = make.__qualname__ = name
    make.__doc__ = (
        f"Train a tiny ALPRO on {title} from scratch: 120 steps of 32 clips on 2 CPU workers.\n\n"
        f"python -m jobs.train {name} --data CLIPS --vocab VOCAB --output RUN"
    )
    return make


RECIPES: dict[str, Callable[..., TrainConfig]] = {
    recipe.__name__: recipe
    for full, title in ((alpro_msrvtt, "MSR-VTT"), (alpro_didemo, "DiDeMo"))
    for recipe in (full, _tiny_twin(full, title))
}
