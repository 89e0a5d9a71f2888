"""Training configs of video question answering, by classification over an answer vocabulary.

Those of ALPRO have the published hyperparameters. The authors of STGT published results of question
answering, but neither the code of its classifier nor its hyperparameters: 44 text tokens, 16 frames
and a frozen encoder are theirs, and everything else is our own choice. Our results are therefore
not those of the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipelines.common.config import with_settings
from pipelines.train.config import TrainConfig
from stgt.alpro.config import alpro_base, alpro_tiny
from stgt.config import AugmentConfig, OptimConfig, stgt_g, stgt_tiny
from stgt.question_answering.accuracy import ACCURACY

BERT = "bert-base-uncased"
QUESTIONS, ANSWERS = "questions.parquet", "answers.json"
"""Names of the files in a recipe whose caller gives none; the command line asks for them."""
GPUS = 8
FRAMES, STGT_TOKENS, ALPRO_TOKENS = 16, 44, 40
TINY_MIN_LR, TINY_TOKENS = 1e-5, 32
TINY_STGT = {
    "steps": 400, "global_batch": 32, "optim.optimizer": "muon", "optim.lr": 1.2e-3,
}  # fmt: skip
TINY_ALPRO = {
    "steps": 800, "global_batch": 64, "optim.optimizer": "adamw", "optim.lr": 1e-3,
}  # fmt: skip
EARLIER_TINY_STGT = {
    "steps": (800, 400), "global_batch": (64, 32), "optim.optimizer": ("adamw", "muon"),
    "optim.lr": (1e-3, 1.2e-3),
}  # fmt: skip
"""Settings of STGT's tiny recipes in earlier versions and now."""

MSRVTT_ANSWERS, MSVD_ANSWERS, TINY_ANSWERS = 1500, 2423, 23
"""Sizes of the published vocabularies and of that of the generated questions. A training takes the
size of the vocabulary that it is given."""

Data = tuple[str, ...]


def _recipe(
    name: str,
    data: Data,
    output: str,
    init_from: str,
    vocab: str,
    questions: str,
    answers: str,
) -> TrainConfig:
    """Return the settings that all recipes share, with the tiny model in place of theirs."""
    return TrainConfig(
        recipe=name,
        name=name,
        data=data,
        output=output,
        vocab=vocab,
        init_from=init_from,
        questions=questions,
        answers=answers,
        model=stgt_tiny(),
        num_workers=GPUS,
        num_loaders=32,
        use_gpu=True,
        checkpoint_every=100,
        hold_out=500,
        val_clips=500,
        select_metric=ACCURACY,
    )


def _stgt(config: TrainConfig, epochs: int, num_answers: int) -> TrainConfig:
    """Return a recipe of STGT; the hyperparameters are our own choice."""
    return replace(
        config,
        model=replace(
            stgt_g(), num_frames=FRAMES, max_text_tokens=STGT_TOKENS, num_answers=num_answers
        ),
        num_frames=FRAMES,
        frame_choice="head_tail",
        precision="bf16",
        optim=OptimConfig(lr=2.5e-5, min_lr=1e-6, warmup_steps=0),
        augment=AugmentConfig(crop_scale_min=0.5, flip=False, num_ops=2, magnitude=5),
        epochs=epochs,
        global_batch=12 * GPUS,
    )


def _alpro(
    config: TrainConfig, epochs: int, num_answers: int, warmup_steps: int, norm: float
) -> TrainConfig:
    """Return a recipe of ALPRO with the published hyperparameters."""
    model = alpro_base(num_frames=FRAMES, max_text_tokens=ALPRO_TOKENS)
    return replace(
        config,
        model=replace(model, gradient_checkpointing=True, num_answers=num_answers),
        num_frames=FRAMES,
        frame_choice="random_sorted",
        optim=OptimConfig(
            lr=5e-5,
            min_lr=0.0,
            warmup_steps=warmup_steps,
            decay="linear",
            weight_decay=1e-3,
            max_grad_norm=norm,
        ),
        augment=AugmentConfig(crop_scale_min=1.0, flip=True, num_ops=2, magnitude=5),
        epochs=epochs,
        global_batch=24 * GPUS,
        micro_batch=12,
        seed=42,
    )


def qa_msrvtt_stgt(
    data: Data,
    output: str,
    init_from: str,
    vocab: str = BERT,
    questions: str = QUESTIONS,
    answers: str = ANSWERS,
) -> TrainConfig:
    """Answer the questions of MSRVTT-QA with STGT for 10 epochs. The settings are our own.

    python -m jobs.train qa_msrvtt_stgt --data CLIPS --questions TRAIN_QA.parquet --answers
    train_ans2label.json --output RUN --init-from PRETRAINED

    TRAIN_QA.parquet is made by jobs.manifest --format msrvtt_qa. Ingest the clips with at least 16
    frames. Hardware: 8 GPUs with 80 GB each, in bf16, with 12 questions per GPU.

    The best checkpoint is chosen on the questions about 500 clips, which are held out of training.
    To use the validation split: --hold-out 0 --val-store CLIPS_VAL --val-questions VAL_QA.parquet.

    The authors published neither their classifier nor its hyperparameters, so results differ from
    the paper's. --model.answering generation trains a model that generates its answers.
    """
    found = _recipe("qa_msrvtt_stgt", data, output, init_from, vocab, questions, answers)
    return _stgt(found, epochs=10, num_answers=MSRVTT_ANSWERS)


def qa_msvd_stgt(
    data: Data,
    output: str,
    init_from: str,
    vocab: str = BERT,
    questions: str = QUESTIONS,
    answers: str = ANSWERS,
) -> TrainConfig:
    """Answer the questions of MSVD-QA with STGT for 15 epochs. The settings are our own.

    python -m jobs.train qa_msvd_stgt --data CLIPS --questions TRAIN_QA.parquet --answers
    train_ans2label.json --output RUN --init-from PRETRAINED

    TRAIN_QA.parquet is made by jobs.manifest --format msvd_qa. Ingest the clips with at least 16
    frames. Hardware: 8 GPUs with 80 GB each, in bf16, with 12 questions per GPU.

    The best checkpoint is chosen on the questions about 100 clips, which are held out of training.
    To use the validation split: --hold-out 0 --val-store CLIPS_VAL --val-questions VAL_QA.parquet.

    The authors published neither their classifier nor its hyperparameters, so results differ from
    the paper's. --model.answering generation trains a model that generates its answers.
    """
    found = _recipe("qa_msvd_stgt", data, output, init_from, vocab, questions, answers)
    return replace(_stgt(found, epochs=15, num_answers=MSVD_ANSWERS), hold_out=100)


def qa_msrvtt_alpro(
    data: Data,
    output: str,
    init_from: str,
    vocab: str = BERT,
    questions: str = QUESTIONS,
    answers: str = ANSWERS,
) -> TrainConfig:
    """Answer the questions of MSRVTT-QA with ALPRO for 10 epochs, as published.

    python -m jobs.train qa_msrvtt_alpro --data CLIPS --questions TRAIN_QA.parquet --answers
    train_ans2label.json --output RUN --init-from PRETRAINED

    PRETRAINED is the folder of an imported `alpro_pretrained_ckpt.pt`; its 8 time embeddings are
    resized to 16. Hardware: 8 GPUs, in fp32, with 24 questions per GPU in passes of 12. The warm-up
    of 830 steps is a tenth of the 8,260 steps. The published accuracy is 42.12 %.

    The best checkpoint is chosen on the questions about 500 clips, which are held out of training.
    The authors chose it on the validation split: --hold-out 0 --val-store CLIPS_VAL --val-questions
    VAL_QA.parquet.
    """
    found = _recipe("qa_msrvtt_alpro", data, output, init_from, vocab, questions, answers)
    return _alpro(found, 10, MSRVTT_ANSWERS, warmup_steps=830, norm=5.0)


def qa_msvd_alpro(
    data: Data,
    output: str,
    init_from: str,
    vocab: str = BERT,
    questions: str = QUESTIONS,
    answers: str = ANSWERS,
) -> TrainConfig:
    """Answer the questions of MSVD-QA with ALPRO for 15 epochs, as published.

    python -m jobs.train qa_msvd_alpro --data CLIPS --questions TRAIN_QA.parquet --answers
    train_ans2label.json --output RUN --init-from PRETRAINED

    PRETRAINED is the folder of an imported `alpro_pretrained_ckpt.pt`; its 8 time embeddings are
    resized to 16. Hardware: 8 GPUs, in fp32, with 24 questions per GPU in passes of 12. The warm-up
    of 240 steps is a tenth of the 2,420 steps. The published accuracy is 45.91 %.

    The best checkpoint is chosen on the questions about 100 clips, which are held out of training.
    The authors chose it on the validation split: --hold-out 0 --val-store CLIPS_VAL --val-questions
    VAL_QA.parquet.
    """
    found = _recipe("qa_msvd_alpro", data, output, init_from, vocab, questions, answers)
    return replace(_alpro(found, 15, MSVD_ANSWERS, warmup_steps=240, norm=20.0), hold_out=100)


def _tiny_twin(recipe: Callable[..., TrainConfig]) -> Callable[..., TrainConfig]:
    """Return the tiny variant of a recipe, which trains on two CPU workers in minutes.

    Frames are not mirrored, cropped or sheared, because the generated questions ask for directions.
    """
    is_stgt = recipe.__name__.endswith("_stgt")
    settings: dict[str, Any] = TINY_STGT if is_stgt else TINY_ALPRO

    def make(
        data: Data,
        output: str,
        init_from: str,
        vocab: str = BERT,
        questions: str = QUESTIONS,
        answers: str = ANSWERS,
    ) -> TrainConfig:
        full = recipe(data, output, init_from, vocab, questions, answers)
        model = stgt_tiny() if is_stgt else alpro_tiny()
        tiny = replace(
            full,
            recipe=name,
            name=name,
            model=replace(model, max_text_tokens=TINY_TOKENS, num_answers=TINY_ANSWERS),
            num_frames=model.num_frames,
            precision="fp32",
            augment=AugmentConfig(crop_scale_min=1.0, flip=False, num_ops=0),
            optim=OptimConfig(min_lr=TINY_MIN_LR, warmup_steps=20),
            epochs=None,
            micro_batch=None,
            num_workers=2,
            num_loaders=0,
            use_gpu=False,
            checkpoint_every=200,
            hold_out=64,
            val_clips=64,
            seed=0,
        )
        return with_settings(tiny, settings)

    name = f"{recipe.__name__}_tiny"
    title = (recipe.__doc__ or "").splitlines()[0].partition(" for ")[0]
    make.__name__ = make.__qualname__ = name
    make.__doc__ = (
        f"{title}, at a tiny size ({settings['steps']} steps).\n\n"
        f"python -m jobs.train {name} --data CLIPS --questions QA.parquet --answers answers.json "
        "--vocab VOCAB --output RUN --init-from CHECKPOINT"
    )
    return make


RECIPES: dict[str, Callable[..., TrainConfig]] = {
    recipe.__name__: recipe
    for full in (qa_msrvtt_stgt, qa_msvd_stgt, qa_msrvtt_alpro, qa_msvd_alpro)
    for recipe in (full, _tiny_twin(full))
}
