"""What is particular to a training with questions: its answer vocabulary, checks and validation."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.artifacts.questions import Question, by_clip, read_answers, read_questions
from pipelines.artifacts.vocabulary import open_tokenizer
from pipelines.common import storage
from pipelines.common.config import fingerprint
from pipelines.feed.dataset_checks import digest_of
from pipelines.feed.plan import TrainPlan
from pipelines.feed.sources import Clip, ClipSource
from pipelines.train.config import TrainConfig
from stgt.errors import (
    CheckpointError,
    ClipStoreError,
    ManifestError,
    SettingError,
    VideoDecodeError,
)
from stgt.interface.inputs import answering_of
from stgt.question_answering.accuracy import accuracy
from stgt.question_answering.vocabulary import FILE, NO_ANSWER, normalized

if TYPE_CHECKING:
    import torch

# torch and the model's libraries are imported where they are used, since the driver does not need
# them.

logger = logging.getLogger(__name__)

CLIPS_AT_A_TIME = 16
SHOWN = 3


def with_answers(config: TrainConfig) -> TrainConfig:
    """Return the config with a classifier of the size of the answer vocabulary.

    Raises:
        CheckpointError: The initial checkpoint has a classifier of another vocabulary.
        SettingError: The model has no classifier of answers.
        STGTError: The vocabulary cannot be read.
    """
    if config.questions is None:
        return config
    assert config.answers is not None, "checked by the config"
    if not hasattr(config.model, "num_answers"):
        raise SettingError(
            f"questions = {config.questions!r}: {config.model.title} cannot answer questions; use "
            "STGT or ALPRO, such as the recipe qa_msrvtt_stgt"
        )
    vocabulary = read_answers(config.answers)
    if config.init_from is not None:
        own = storage.join(config.init_from, FILE)
        if storage.exists(own) and read_answers(own) != vocabulary:
            raise CheckpointError(
                f"{config.init_from} answers from another vocabulary ({FILE} there) than "
                f"{config.answers}; use that vocabulary, or start from a checkpoint without a "
                "classifier"
            )
    # The models that have a classifier name its size alike.
    model: Any = config.model
    return replace(config, model=replace(model, num_answers=len(vocabulary)))


def prepare_answers(config: TrainConfig, model: Any) -> None:
    """Give a model its answer vocabulary, and exclude what answers do not depend on from training.

    Does nothing in a training without questions.
    """
    if config.questions is None:
        return
    from stgt.question_answering.head import freeze_unused

    assert config.answers is not None, "checked by the config"
    model.answers = read_answers(config.answers)
    if answering_of(config.model) == "generation":
        model.tokenizer = open_tokenizer(config.vocab)
    freeze_unused(model, model.unused_when_answering())


def digest_of_questions(config: TrainConfig) -> list[str]:
    """Return digests of the questions and the answer vocabulary; none for a training without."""
    if config.questions is None:
        return []
    assert config.answers is not None, "checked by the config"
    return [digest_of(config.questions), fingerprint(list(read_answers(config.answers).answers))]


def check_questions(config: TrainConfig, plan: TrainPlan) -> None:
    """Log how many questions are used, and check that there are some to validate on.

    Raises:
        ManifestError: The questions cannot be used.
        STGTError: The answer vocabulary cannot be used.
    """
    if config.questions is None:
        return
    assert config.answers is not None, "checked by the config"
    vocabulary = read_answers(config.answers)
    questions = read_questions(config.questions)
    outside = [one for one in questions if vocabulary.label_of(one.answer) == NO_ANSWER]
    logger.info(
        "%d of %d questions are used in an epoch: the answers of %d are outside the vocabulary%s, "
        "and %d are about clips that are held out or not in the data",
        plan.num_samples,
        len(questions),
        len(outside),
        f" (for example {', '.join(one.answer for one in outside[:SHOWN])})" if outside else "",
        len(questions) - len(outside) - plan.num_samples,
    )
    if config.val_questions is not None:
        read_questions(config.val_questions)


def measured_content(config: TrainConfig) -> str:
    """Return a digest of the questions that a training validates on."""
    assert config.questions is not None
    return digest_of(config.val_questions or config.questions)


def validate_answers(
    model: Any,
    tokenizer: Any,
    config: TrainConfig,
    device: torch.device,
    source: ClipSource,
    places: Sequence[tuple[int, int]],
) -> dict[str, float]:
    """Compute the accuracy of answers to all questions about the validation clips.

    All workers must call this. Each answers a part of the questions, and all return the same
    metrics. Questions about clips that cannot be read are left out, with a warning.

    Args:
        model: The model, in eval mode.
        tokenizer: Its tokenizer.
        config: Config of the run.
        device: Device of the model.
        source: The validation clips.
        places: Shard and row of each of them.

    Raises:
        ManifestError: There are no questions about these clips.
        ClipStoreError: None of the clips could be read.
    """
    import torch.distributed as dist

    asked = by_clip(read_questions(config.val_questions or str(config.questions)))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = list(enumerate(places))[rank::world]
    mine: list[tuple[int, str, bool]] = []
    there = 0
    for first in range(0, len(share), CLIPS_AT_A_TIME):
        part = share[first : first + CLIPS_AT_A_TIME]
        clips: list[Clip] = []
        for shard, rows in itertools.groupby((place for _, place in part), key=lambda one: one[0]):
            clips += source.clips(shard, [row for _, row in rows])
        with_questions = [
            (number, clip, asked[clip["clip_id"]])
            for (number, _), clip in zip(part, clips, strict=True)
            if clip["clip_id"] in asked
        ]
        there += len(with_questions)
        mine += _answered(model, tokenizer, config, device, source, with_questions)
    parts: list[Any] = [(there, mine)]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, (there, mine))
    answered = sorted(one for _, found in parts for one in found)
    if not answered:
        where = config.val_questions or config.questions
        if any(there for there, _ in parts):
            raise ClipStoreError(f"{source.uri}: no validation clip could be read; see the log")
        raise ManifestError(
            f"{where} contains no questions about the validation clips of {source.uri}; give their "
            "questions with --val-questions"
        )
    found = accuracy(
        np.array([is_right for _, _, is_right in answered]), [kind for _, kind, _ in answered]
    )
    return {f"{config.validation_split}/{name}": value for name, value in found.items()}


def _answered(
    model: Any,
    tokenizer: Any,
    config: TrainConfig,
    device: torch.device,
    source: ClipSource,
    asked: Sequence[tuple[int, Clip, list[Question]]],
) -> list[tuple[int, str, bool]]:
    """Return (number of the clip, type, whether right) of each question about readable clips."""
    import torch

    from stgt.precision import autocast
    from stgt.question_answering.answering import rank_answers, tokenize_questions

    vocabulary = read_answers(str(config.answers))
    frames: list[np.ndarray] = []
    questions: list[tuple[int, int, Question]] = []
    for number, clip, about in asked:
        try:
            even = source.frames(
                {**clip, "captions": ["asked"]},
                config.num_frames,
                "uniform",
                np.random.default_rng(0),
            )
        except VideoDecodeError as error:
            logger.warning("skipping a validation clip: %s", error)
            continue
        questions += [(number, len(frames), one) for one in about]
        frames.append(even)
    if not questions:
        return []
    text = tokenize_questions(
        config.model,
        tokenizer,
        [one.question for _, _, one in questions],
        config.model.inputs.max_text_tokens,
    )
    with torch.no_grad(), autocast(config.precision, device):
        best = rank_answers(
            model,
            model.video_tokens(torch.from_numpy(np.stack(frames)).to(device)),
            torch.tensor([place for _, place, _ in questions], device=device),
            text.to(device),
            most=1,
        )
    predicted = [vocabulary.answer_of(label) for label in best.labels[:, 0].tolist()]
    return [
        (number, one.type, answer == normalized(one.answer))
        for (number, _, one), answer in zip(questions, predicted, strict=True)
    ]
