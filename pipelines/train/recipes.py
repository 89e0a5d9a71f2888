"""Complete, named training configs. The caller supplies only locations.

Fine-tuning uses the published hyperparameters. The authors published none for pre-training, so
those are our own choice. Times on GPUs are estimates, not measurements: they assume the arithmetic
of a step (4.7 TFLOP per clip) at 40 % of an H100's peak, and data workers that keep up. Each run
logs its own estimate when it starts.

The tiny variants run every part of the same stage on two CPU cores in about a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pipelines.common.config import TrackingConfig, flatten, to_dict, with_settings
from pipelines.train import alpro_recipes, dual_encoder_recipes, question_recipes
from pipelines.train.config import TrainConfig
from stgt.config import AugmentConfig, OptimConfig, stgt_g, stgt_tiny
from stgt.field_marks import earlier_values

BERT = "bert-base-uncased"

CLIPS_PER_GPU = 20

GPUS = 8

TINY_LR = 1e-3

TINY_MUON_LR = 3e-3
"""Learning rate of tiny models from scratch with optim.optimizer = muon."""

TINY_STAGE2_LR = 2e-4

TINY_FINETUNE_LR = 1e-4

TINY_MIN_LR = 1e-5

TINY_STEPS = 120

TINY_FINETUNE_STEPS = 60

Data = tuple[str, ...]


def pretrain_stage1(data: Data, output: str, init_from: str, vocab: str = BERT) -> TrainConfig:
    """Pre-train stage 1 for 1 epoch on WebVid-10M and VIDAL-4M/7M, with hard contrastive targets.

    python -m jobs.train pretrain_stage1 --data CLIPS_WEBVID CLIPS_VIDAL --output RUN --init-from
    MODEL [--model.embed-dim 1024] [--mix 10 4]

    MODEL contains the frozen EVA ViT-g and the initial weights of the other parts. Create it with
    `python -m jobs.import_weights --vision eva_vit_g.pth --qformer blip2_pretrained_flant5xxl.pth
    --bert bert-base-uncased --vocab bert-base-uncased --output MODEL`. Like the authors, this
    starts from the Q-Former of BLIP-2. BERT fills the text layers that this file lacks.

    Hardware: 16 GPUs with 80 GB each, in bf16, with 8 frames of 224 pixels per clip and 512 clips
    per step. Time: 27,000 steps, one pass over 14 million clips, take an estimated 4 hours on
    H100s. The best checkpoint is chosen on 1,000 clips held out of the first data set.

    Learning rate, warmup and batch size are our own choice, since the authors published none.
    """
    return TrainConfig(
        recipe="pretrain_stage1",
        name="pretrain_stage1",
        data=data,
        output=output,
        vocab=vocab,
        init_from=init_from,
        model=stgt_g(),
        targets="hard",
        precision="bf16",
        optim=OptimConfig(lr=1e-4, min_lr=1e-5, warmup_steps=2000),
        augment=AugmentConfig(num_ops=0),
        epochs=1,
        global_batch=512,
        micro_batch=32,
        num_workers=16,
        num_loaders=64,
        use_gpu=True,
        checkpoint_every=500,
        validate_every=500,
        hold_out=1000,
        val_clips=1000,
    )


def pretrain_stage2(data: Data, output: str, init_from: str, vocab: str = BERT) -> TrainConfig:
    """Pre-train stage 2 for 1 epoch on the data of stage 1, with self-similarity targets.

    python -m jobs.train pretrain_stage2 --data CLIPS_WEBVID CLIPS_VIDAL --output RUN --init-from
    STAGE1/checkpoints/step-NNNNNNNN

    It starts from a checkpoint of stage 1. Compared with stage 1, the learning rate is half as
    high and the warmup shorter. Hardware, time and the choice of the checkpoint are the same.

    The hyperparameters are our own choice, since the authors published none.
    """
    return replace(
        pretrain_stage1(data, output, init_from, vocab),
        recipe="pretrain_stage2",
        name="pretrain_stage2",
        targets="self_similarity",
        optim=OptimConfig(lr=5e-5, min_lr=1e-6, warmup_steps=1000),
    )


def _finetune(
    name: str, data: Data, output: str, init_from: str, vocab: str, epochs: int, tokens: int
) -> TrainConfig:
    """Return the settings that the four benchmarks share."""
    return TrainConfig(
        recipe=name,
        name=name,
        data=data,
        output=output,
        vocab=vocab,
        init_from=init_from,
        model=replace(stgt_g(), max_text_tokens=tokens),
        targets="self_similarity",
        precision="bf16",
        frame_choice="head_tail",
        optim=OptimConfig(lr=2.5e-5, min_lr=1e-6, warmup_steps=0),
        augment=AugmentConfig(crop_scale_min=0.5, flip=True, num_ops=2, magnitude=5),
        epochs=epochs,
        global_batch=CLIPS_PER_GPU * GPUS,
        num_workers=GPUS,
        num_loaders=32,
        use_gpu=True,
        checkpoint_every=100,
        val_clips=1000,
    )


def finetune_msrvtt(data: Data, output: str, init_from: str, vocab: str = BERT) -> TrainConfig:
    """Fine-tune on MSR-VTT (9k split) for 9 epochs, with captions of up to 36 tokens.

    python -m jobs.train finetune_msrvtt --data CLIPS_9K --output RUN --init-from PRETRAINED

    Hardware: 8 GPUs with 80 GB each, in bf16, with 20 clips per GPU. Time: 9,563 steps, each epoch
    with all 20 captions of every clip, take an estimated 40 minutes on H100s.

    The split has no validation clips, so the best checkpoint is chosen on 500 of the 9,000 clips,
    which are held out of training. The authors trained on all clips (10,125 steps) and took the
    last checkpoint; use --hold-out 0 --select-on last to do the same.
    """
    recipe = _finetune("finetune_msrvtt", data, output, init_from, vocab, epochs=9, tokens=36)
    return replace(recipe, hold_out=500)


def finetune_didemo(data: Data, output: str, init_from: str, vocab: str = BERT) -> TrainConfig:
    """Fine-tune on DiDeMo (train and val) for 9 epochs, with paragraphs of up to 55 tokens.

    python -m jobs.train finetune_didemo --data CLIPS_TRAIN CLIPS_VAL --output RUN --init-from
    PRETRAINED

    Hardware: 8 GPUs with 80 GB each, in bf16, with 20 clips per GPU. Time: 500 steps take an
    estimated 3 minutes on H100s.

    The best checkpoint is chosen on 500 clips of the first data set, which are held out of
    training. The authors chose it on the test split; use --hold-out 0 --select-on test
    --test-store CLIPS_TEST to do the same.
    """
    recipe = _finetune("finetune_didemo", data, output, init_from, vocab, epochs=9, tokens=55)
    return replace(recipe, hold_out=500)


def finetune_lsmdc(data: Data, output: str, init_from: str, vocab: str = BERT) -> TrainConfig:
    """Fine-tune on LSMDC for 9 epochs, with captions of up to 32 tokens.

    python -m jobs.train finetune_lsmdc --data CLIPS_TRAIN --val-store CLIPS_VAL --output RUN
    --init-from PRETRAINED

    Hardware: 8 GPUs with 80 GB each, in bf16, with 20 clips per GPU. Time: 5,700 steps take an
    estimated half hour on H100s.

    The best checkpoint is chosen on LSMDC's val split. The authors chose it on the test split; use
    --select-on test --test-store CLIPS_TEST to do the same.
    """
    return _finetune("finetune_lsmdc", data, output, init_from, vocab, epochs=9, tokens=32)


def finetune_msvd(data: Data, output: str, init_from: str, vocab: str = BERT) -> TrainConfig:
    """Fine-tune on MSVD for 12 epochs, with captions of up to 32 tokens.

    python -m jobs.train finetune_msvd --data CLIPS_TRAIN --val-store CLIPS_VAL --output RUN
    --init-from PRETRAINED

    Hardware: 8 GPUs with 80 GB each, in bf16, with 20 clips per GPU. Time: 3,659 steps, each epoch
    with all of the forty or so captions of every clip, take an estimated 15 minutes on H100s.

    The best checkpoint is chosen on MSVD's val split. The authors took the last checkpoint; use
    --select-on last to do the same.
    """
    return _finetune("finetune_msvd", data, output, init_from, vocab, epochs=12, tokens=32)


def _tiny(recipe: TrainConfig, lr: float, steps: int) -> TrainConfig:
    """Return the same stage at a size that two CPU cores train in a minute.

    Frames are not mirrored, cropped or sheared, because captions of the quickstart distinguish left
    from right.
    """
    model = stgt_tiny()
    return replace(
        recipe,
        recipe=f"{recipe.recipe}_tiny",
        name=f"{recipe.name}_tiny",
        model=model,
        precision="fp32",
        num_frames=model.num_frames,
        augment=AugmentConfig(crop_scale_min=1.0, flip=False, num_ops=0),
        optim=OptimConfig(lr=lr, min_lr=TINY_MIN_LR, warmup_steps=min(20, steps // 6)),
        steps=steps,
        epochs=None,
        global_batch=32,
        micro_batch=None,
        num_workers=2,
        num_loaders=0,
        use_gpu=False,
        checkpoint_every=min(100, steps // 2),
        validate_every=None,
        hold_out=min(recipe.hold_out, 64),
        val_clips=64,
        tracking=TrackingConfig(),
    )


def pretrain_stage1_tiny(
    data: Data, output: str, vocab: str = BERT, init_from: str | None = None
) -> TrainConfig:
    """Pre-train the tiny model from scratch (stage 1): 120 steps of 32 clips on 2 CPU workers.

    python -m jobs.train pretrain_stage1_tiny --data CLIPS --vocab VOCAB --output RUN

    It uses hard contrastive targets and also trains the frame encoder. The quickstart runs it for
    1,000 steps, with Muon, batches of similar captions and eight times the weight of matching.
    """
    recipe = pretrain_stage1(data, output, "", vocab)
    return replace(_tiny(recipe, TINY_LR, TINY_STEPS), init_from=init_from, hold_out=0)


def with_muon(recipe: TrainConfig) -> TrainConfig:
    """Return a tiny recipe that trains from scratch with Muon instead of AdamW."""
    return replace(recipe, optim=replace(recipe.optim, optimizer="muon", lr=TINY_MUON_LR))


def pretrain_stage2_tiny(data: Data, output: str, init_from: str, vocab: str = BERT) -> TrainConfig:
    """Pre-train the tiny model from a stage 1 checkpoint (stage 2): 80 steps of 32 clips.

    python -m jobs.train pretrain_stage2_tiny --data CLIPS --vocab VOCAB --output RUN --init-from
    STAGE1/checkpoints/step-NNNNNNNN

    It uses self-similarity targets and 2 CPU workers.
    """
    recipe = _tiny(pretrain_stage2(data, output, init_from, vocab), TINY_STAGE2_LR, 80)
    return replace(recipe, hold_out=0, optim=replace(recipe.optim, warmup_steps=10))


def _tiny_twin(recipe: Callable[..., TrainConfig]) -> Callable[..., TrainConfig]:
    """Return the tiny variant of a fine-tuning recipe."""

    def make(data: Data, output: str, init_from: str, vocab: str = BERT) -> TrainConfig:
        full = recipe(data, output, init_from, vocab)
        return _tiny(full, TINY_FINETUNE_LR, TINY_FINETUNE_STEPS)

    name = f"{recipe.__name__}_tiny"
    benchmark = (recipe.__doc__ or "").splitlines()[0].partition(" for ")[0]
    make.__name__ = make.__qualname__ = name
    make.__doc__ = (
        f"{benchmark} with the tiny model: 60 steps of 32 clips on 2 CPU workers.\n\n"
        f"python -m jobs.train {name} --data CLIPS --vocab VOCAB --output RUN --init-from "
        "CHECKPOINT"
    )
    return make


finetune_msrvtt_tiny = _tiny_twin(finetune_msrvtt)

finetune_didemo_tiny = _tiny_twin(finetune_didemo)

finetune_lsmdc_tiny = _tiny_twin(finetune_lsmdc)

finetune_msvd_tiny = _tiny_twin(finetune_msvd)

RECIPES: dict[str, Callable[..., TrainConfig]] = (
    {
        recipe.__name__: recipe
        for recipe in (
            pretrain_stage1,
            pretrain_stage2,
            finetune_msrvtt,
            finetune_didemo,
            finetune_lsmdc,
            finetune_msvd,
            pretrain_stage1_tiny,
            pretrain_stage2_tiny,
            finetune_msrvtt_tiny,
            finetune_didemo_tiny,
            finetune_lsmdc_tiny,
            finetune_msvd_tiny,
        )
    }
    | dual_encoder_recipes.RECIPES
    | alpro_recipes.RECIPES
    | question_recipes.RECIPES
)

EARLIER_SETTINGS: dict[str, dict[str, tuple[Any, Any]]] = {
    **dict.fromkeys(
        ("finetune_msrvtt", "finetune_didemo", "finetune_lsmdc"),
        {"optim.warmup_steps": (200, 0)},
    ),
    "finetune_msvd": {"optim.warmup_steps": (20, 0)},
    **dict.fromkeys(
        ("qa_msrvtt_stgt_tiny", "qa_msvd_stgt_tiny"), question_recipes.EARLIER_TINY_STGT
    ),
}
"""Settings that recipes had in an earlier version and have now, by their dotted names."""


def with_earlier_settings(
    config: TrainConfig, recorded: Mapping[str, Any], prefix: str = ""
) -> TrainConfig:
    """Return a config of a recipe in which settings that an earlier version had keep its values.

    A setting of which the caller asks for another value than the recipe's is not changed.

    Args:
        config: The config, of any recipe or none.
        recorded: The settings that a run or sweep began with, by dotted name.
        prefix: Dotted name of the training's config in the record, with a dot at the end.
    """
    asked, unrecorded = flatten(to_dict(config)), earlier_values(TrainConfig)
    kept: dict[str, Any] = {}
    for name, (earlier, now) in EARLIER_SETTINGS.get(config.recipe, {}).items():
        began_with = recorded.get(f"{prefix}{name}", unrecorded.get(name))
        if (began_with, asked[name]) == (earlier, now):
            kept[name] = earlier
    return with_settings(config, kept)
