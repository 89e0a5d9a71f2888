"""Complete, named configs. What a recipe leaves to the caller is where things lie.

Fine-tuning follows the published hyper-parameters. Those of pre-training were never published: ours
are stated as ours. Times are estimates, not measurements: the arithmetic of a step (4.7 TFLOP a
clip) at 40 % of an H100's peak, if data workers keep up; the preflight of a run says its own.

The tiny twins go through every part of the same stage on two CPU cores in about a minute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pipelines.common.config import TrackingConfig
from pipelines.train.config import TrainConfig
from stgt.config import AugmentConfig, OptimConfig, stgt_g, stgt_tiny

BERT = "bert-base-uncased"

CLIPS_PER_GPU = 20

GPUS = 8

TINY_LR = 1e-3

TINY_STAGE2_LR = 2e-4

TINY_FINETUNE_LR = 1e-4

TINY_MIN_LR = 1e-5

TINY_STEPS = 120

TINY_FINETUNE_STEPS = 60

Data = tuple[str, ...]


def pretrain_stage1(data: Data, output: str, init_from: str, vocab: str = BERT) -> TrainConfig:
    """Pre-training, first stage, with hard contrastive targets: WebVid-10M with VIDAL-4M or 7M.

    python -m jobs.train pretrain_stage1 --data CLIPS_WEBVID CLIPS_VIDAL --output RUN --init-from
    MODEL [--model.embed-dim 1024] [--mix 10 4]

    MODEL holds the frozen EVA ViT-g, and the weights that training begins with: `python -m
    jobs.import_weights --vision eva_vit_g.pth --bert bert-base-uncased --vocab bert-base-uncased
    --output MODEL`. One pass over 14 million clips, 8 frames at 224, 512 clips a step on 16 GPUs of
    80 GB in bf16: 27,000 steps, about 4 hours on H100s. Learning rate, warm-up and batch are ours:
    nothing was published.
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
    """Pre-training, second stage, with self-similarity targets, from a checkpoint of the first.

    python -m jobs.train pretrain_stage2 --data CLIPS_WEBVID CLIPS_VIDAL --output RUN --init-from
    STAGE1/checkpoints/step-NNNNNNNN

    As the first stage at half its learning rate, a shorter warm-up and the same cost. Ours: nothing
    was published.
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
    """What the four benchmarks share."""
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
        optim=OptimConfig(lr=2.5e-5, min_lr=1e-6, warmup_steps=200),
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
    """Fine-tuning on MSR-VTT: 9 epochs of the 9k split, 36 tokens.

    python -m jobs.train finetune_msrvtt --data CLIPS_9K --output RUN --init-from PRETRAINED

    8 GPUs of 80 GB with 20 clips each, bf16; 480 steps, about 3 minutes on H100s. The split has
    no validation clips: 500 of the 9,000 are held out and choose the checkpoint. The published
    recipe trains on all and chooses on the 1k-A test: --hold-out 0 --select-on test --test-store
    CLIPS_1KA.
    """
    recipe = _finetune("finetune_msrvtt", data, output, init_from, vocab, epochs=9, tokens=36)
    return replace(recipe, hold_out=500)


def finetune_didemo(data: Data, output: str, init_from: str, vocab: str = BERT) -> TrainConfig:
    """Fine-tuning on DiDeMo: 9 epochs of train and val, 55 tokens, paragraphs.

    python -m jobs.train finetune_didemo --data CLIPS_TRAIN CLIPS_VAL --output RUN --init-from
    PRETRAINED

    8 GPUs of 80 GB with 20 clips each, bf16; 500 steps, about 3 minutes on H100s. 500 clips of
    the first data set are held out and choose the checkpoint; as published: --hold-out 0
    --select-on test --test-store CLIPS_TEST.
    """
    recipe = _finetune("finetune_didemo", data, output, init_from, vocab, epochs=9, tokens=55)
    return replace(recipe, hold_out=500)


def finetune_lsmdc(data: Data, output: str, init_from: str, vocab: str = BERT) -> TrainConfig:
    """Fine-tuning on LSMDC: 9 epochs, 32 tokens.

    python -m jobs.train finetune_lsmdc --data CLIPS_TRAIN --val-store CLIPS_VAL --output RUN
    --init-from PRETRAINED

    8 GPUs of 80 GB with 20 clips each, bf16; 5,700 steps, about half an hour on H100s. The
    checkpoint is chosen on LSMDC's val; as published: --select-on test --test-store CLIPS_TEST.
    """
    return _finetune("finetune_lsmdc", data, output, init_from, vocab, epochs=9, tokens=32)


def finetune_msvd(data: Data, output: str, init_from: str, vocab: str = BERT) -> TrainConfig:
    """Fine-tuning on MSVD: 12 epochs, 32 tokens.

    python -m jobs.train finetune_msvd --data CLIPS_TRAIN --val-store CLIPS_VAL --output RUN
    --init-from PRETRAINED

    8 GPUs of 80 GB with 20 clips each, bf16; 90 steps, half a minute on H100s: a clip gives one of
    its forty captions at each pass. The checkpoint is chosen on MSVD's val; as published:
    --select-on test --test-store CLIPS_TEST.
    """
    recipe = _finetune("finetune_msvd", data, output, init_from, vocab, epochs=12, tokens=32)
    return replace(recipe, checkpoint_every=15, optim=replace(recipe.optim, warmup_steps=20))


def _tiny(recipe: TrainConfig, lr: float, steps: int) -> TrainConfig:
    """The same stage at a size that two CPU cores train in a minute.

    Nothing is mirrored, cropped or sheared: captions of the quickstart tell left from right.
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
        num_loaders=1,
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
    """From scratch with hard contrastive targets: 120 steps of 32 clips on 2 CPU workers.

    python -m jobs.train pretrain_stage1_tiny --data CLIPS --vocab VOCAB --output RUN

    The encoder is trained too. The quickstart trains it for 450 steps, which takes two minutes.
    """
    recipe = pretrain_stage1(data, output, "", vocab)
    return replace(_tiny(recipe, TINY_LR, TINY_STEPS), init_from=init_from, hold_out=0)


def pretrain_stage2_tiny(data: Data, output: str, init_from: str, vocab: str = BERT) -> TrainConfig:
    """From a stage 1 checkpoint with self-similarity targets: 80 steps of 32 clips.

    python -m jobs.train pretrain_stage2_tiny --data CLIPS --vocab VOCAB --output RUN --init-from
    STAGE1/checkpoints/step-NNNNNNNN
    """
    recipe = _tiny(pretrain_stage2(data, output, init_from, vocab), TINY_STAGE2_LR, 80)
    return replace(recipe, hold_out=0, optim=replace(recipe.optim, warmup_steps=10))


def _tiny_twin(recipe: Callable[..., TrainConfig]) -> Callable[..., TrainConfig]:
    """The tiny twin of a fine-tuning recipe."""

    def make(data: Data, output: str, init_from: str, vocab: str = BERT) -> TrainConfig:
        full = recipe(data, output, init_from, vocab)
        return _tiny(full, TINY_FINETUNE_LR, TINY_FINETUNE_STEPS)

    name = f"{recipe.__name__}_tiny"
    benchmark = (recipe.__doc__ or "").splitlines()[0].partition(":")[0]
    make.__name__ = make.__qualname__ = name
    make.__doc__ = (
        f"{benchmark}, at the size of the tiny model: 60 steps of 32 clips on 2 CPU workers.\n\n"
        f"python -m jobs.train {name} --data CLIPS --vocab VOCAB --output RUN --init-from "
        "CHECKPOINT"
    )
    return make


finetune_msrvtt_tiny = _tiny_twin(finetune_msrvtt)

finetune_didemo_tiny = _tiny_twin(finetune_didemo)

finetune_lsmdc_tiny = _tiny_twin(finetune_lsmdc)

finetune_msvd_tiny = _tiny_twin(finetune_msvd)

RECIPES: dict[str, Callable[..., TrainConfig]] = {
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
