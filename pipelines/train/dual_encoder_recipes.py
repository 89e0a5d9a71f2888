"""Training configs of dual encoders: the settings of CLIP4Clip, and tiny variants.

CLIP4Clip (https://arxiv.org/abs/2104.08860) fine-tunes CLIP ViT-B/32 with parameter-free pooling.
Its published text-to-video R@1 are 43.1 on MSR-VTT (9k split), 43.4 on DiDeMo, 20.7 on LSMDC and
46.2 on MSVD. Two settings differ from its code: AdamW decays no vectors, and pairs that share the
clip or the text are no negatives of each other (`--negatives published` counts them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pipelines.train.config import TrainConfig
from stgt.config import AugmentConfig, LabelSmoothing, OptimConfig
from stgt.dual_encoder.config import DualEncoderConfig, dual_encoder_tiny

BATCH, GPUS, EPOCHS = 128, 4, 5
LR, WEIGHT_DECAY = 1e-7, 0.2
"""CLIP4Clip multiplies its learning rate of 1e-4 by 1e-3 for all weights that CLIP brings along."""
WARMUP_SHARE = 0.1
NO_AUGMENTATION = AugmentConfig(crop_scale_min=1.0, flip=False, num_ops=0)
BERT = "bert-base-uncased"
TINY_STEPS, TINY_BATCH, TINY_LR = 120, 32, 1e-3

Data = tuple[str, ...]


def _recipe(
    name: str,
    data: Data,
    output: str,
    init_from: str,
    vocab: str,
    *,
    frames: int,
    tokens: int,
    steps_an_epoch: int,
    hold_out: int,
) -> TrainConfig:
    """Return the settings that the four benchmarks share."""
    return TrainConfig(
        recipe=name,
        name=name,
        data=data,
        output=output,
        vocab=vocab,
        init_from=init_from,
        model=DualEncoderConfig(num_frames=frames, max_text_tokens=tokens),
        label_smoothing=LabelSmoothing(contrastive=0.0),
        precision="bf16",
        num_frames=frames,
        frame_choice="uniform",
        resize="crop",
        augment=NO_AUGMENTATION,
        optim=OptimConfig(
            lr=LR,
            min_lr=0.0,
            warmup_steps=round(WARMUP_SHARE * EPOCHS * steps_an_epoch),
            weight_decay=WEIGHT_DECAY,
        ),
        epochs=EPOCHS,
        global_batch=BATCH,
        num_workers=GPUS,
        num_loaders=16,
        use_gpu=True,
        checkpoint_every=100,
        hold_out=hold_out,
        val_clips=1000,
    )


def clip_msrvtt(data: Data, output: str, init_from: str, vocab: str = "") -> TrainConfig:
    """Fine-tune CLIP or SigLIP on MSR-VTT (9k split) for 5 epochs, as CLIP4Clip does.

    python -m jobs.train clip_msrvtt --data CLIPS_9K --output RUN --init-from hf:NAME

    NAME is a CLIP or SigLIP with safetensors weights on the Hugging Face Hub; a folder in the form
    of the hub may be given instead. Ingest the clips with --sampling.size 224 --sampling.resize
    crop, the way CLIP makes frames square. SigLIP takes --resize squash, and
    --model.max-text-tokens None.

    Hardware: 4 GPUs with 32 clips of 12 frames each. The best checkpoint is chosen on 500 clips
    that are held out of training.
    """
    return _recipe(
        "clip_msrvtt", data, output, init_from, vocab,
        frames=12, tokens=32, steps_an_epoch=1406, hold_out=500,
    )  # fmt: skip


def clip_didemo(data: Data, output: str, init_from: str, vocab: str = "") -> TrainConfig:
    """Fine-tune CLIP or SigLIP on DiDeMo for 5 epochs, as CLIP4Clip does.

    python -m jobs.train clip_didemo --data CLIPS_TRAIN CLIPS_VAL --output RUN --init-from hf:NAME

    Hardware: 4 GPUs with 32 clips of 64 frames each. The best checkpoint is chosen on 500 clips
    that are held out of training.
    """
    return _recipe(
        "clip_didemo", data, output, init_from, vocab,
        frames=64, tokens=64, steps_an_epoch=66, hold_out=500,
    )  # fmt: skip


def clip_lsmdc(data: Data, output: str, init_from: str, vocab: str = "") -> TrainConfig:
    """Fine-tune CLIP or SigLIP on LSMDC for 5 epochs, as CLIP4Clip does.

    python -m jobs.train clip_lsmdc --data CLIPS_TRAIN --val-store CLIPS_VAL --output RUN
    --init-from hf:NAME

    Hardware: 4 GPUs with 32 clips of 12 frames each. The best checkpoint is chosen on LSMDC's val
    split.
    """
    return _recipe(
        "clip_lsmdc", data, output, init_from, vocab,
        frames=12, tokens=32, steps_an_epoch=791, hold_out=0,
    )  # fmt: skip


def clip_msvd(data: Data, output: str, init_from: str, vocab: str = "") -> TrainConfig:
    """Fine-tune CLIP or SigLIP on MSVD for 5 epochs, as CLIP4Clip does.

    python -m jobs.train clip_msvd --data CLIPS_TRAIN --val-store CLIPS_VAL --output RUN
    --init-from hf:NAME

    Hardware: 4 GPUs with 32 clips of 12 frames each. The best checkpoint is chosen on MSVD's val
    split.
    """
    return _recipe(
        "clip_msvd", data, output, init_from, vocab,
        frames=12, tokens=32, steps_an_epoch=381, hold_out=0,
    )  # fmt: skip


def _tiny_twin(recipe: Callable[..., TrainConfig]) -> Callable[..., TrainConfig]:
    """Return the tiny variant of a recipe, which starts from random weights."""

    def make(
        data: Data, output: str, vocab: str = BERT, init_from: str | None = None
    ) -> TrainConfig:
        full = recipe(data, output, "", vocab)
        model = dual_encoder_tiny()
        return replace(
            full,
            recipe=name,
            name=name,
            init_from=init_from,
            model=model,
            num_frames=model.num_frames,
            precision="fp32",
            resize="squash",
            optim=OptimConfig(lr=TINY_LR, min_lr=1e-5, warmup_steps=20),
            steps=TINY_STEPS,
            epochs=None,
            global_batch=TINY_BATCH,
            num_workers=2,
            num_loaders=0,
            use_gpu=False,
            hold_out=min(full.hold_out, 64),
            val_clips=64,
        )

    name = f"{recipe.__name__}_tiny"
    benchmark = name.split("_")[1]
    title = {"msrvtt": "MSR-VTT", "didemo": "DiDeMo", "lsmdc": "LSMDC", "msvd": "MSVD"}[benchmark]
    make.__name__ = make.__qualname__ = name
    make.__doc__ = (
        f"Train a tiny CLIP on {title} from scratch: 120 steps of 32 clips on 2 CPU workers.\n\n"
        f"python -m jobs.train {name} --data CLIPS --vocab VOCAB --output RUN"
    )
    return make


RECIPES: dict[str, Callable[..., TrainConfig]] = {
    recipe.__name__: recipe
    for full in (clip_msrvtt, clip_didemo, clip_lsmdc, clip_msvd)
    for recipe in (full, _tiny_twin(full))
}
