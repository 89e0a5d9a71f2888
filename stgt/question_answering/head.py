"""How models answer questions: by a classifier on top of a clip and a question, or by generation.

A model that classifies has `classifier`, an `AnswerHead`, and `fuse`, which turns visual
tokens and questions into one state per pair. For ALPRO, that is the first token of its multimodal
encoder, as published. The authors of STGT did not publish how theirs answers questions, so ours is
our own: the states of the query tokens, which attend to the clip and to the question as they do for
matching, averaged over the queries. The classifier itself is ALPRO's for both. A model that
generates its answers, which only STGT can, scores them itself; see `generation`.

Legend: N pairs of a clip and a question, M visual tokens, D vision width, H state width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import nn

from stgt.errors import CheckpointError
from stgt.inputs.tokenizer import TextTokens
from stgt.interface.inputs import answering_of
from stgt.interface.model import FrameTokens

Texts: TypeAlias = Sequence[str] | TextTokens
"""N questions, as strings or as tokens [N, S]."""


class AnswerHead(nn.Sequential):
    """Two linear layers with a ReLU between them: states [N, H] -> logits [N, K]."""

    def __init__(self, width: int, num_answers: int) -> None:
        """Build the classifier with random weights.

        Args:
            width: Width H of the states.
            num_answers: Number of classes K.
        """
        super().__init__(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, num_answers))

    @property
    def num_answers(self) -> int:
        """Number of classes K."""
        last = self[2]
        assert isinstance(last, nn.Linear)
        return last.out_features


class AnsweringModel(Protocol):
    """A video-text model that can answer questions."""

    config: Any
    """Its `answering` says whether it classifies or generates; without it, it classifies."""

    @property
    def classifier(self) -> nn.Module | None:
        """An `AnswerHead`; None in a model that does not classify answers."""
        ...

    def video_tokens(self, frames: torch.Tensor | FrameTokens) -> torch.Tensor:
        """Encode frames as visual tokens [N, M, D]."""
        ...

    def fuse(self, videos: torch.Tensor, texts: Texts) -> torch.Tensor:
        """Return the state [N, H] of each pair of visual tokens and a question."""
        ...

    def unused_when_answering(self) -> tuple[str, ...]:
        """Return the beginnings of the names of parameters that answers do not depend on."""
        ...


class GeneratingModel(AnsweringModel, Protocol):
    """A model that generates its answers."""

    def generated_answer_losses(
        self, tokens: torch.Tensor, questions: TextTokens, answers: torch.Tensor
    ) -> torch.Tensor:
        """Return the negative log-likelihood [N] of answers [N] int64 to questions [N, S]."""
        ...

    def generated_answer_logits(self, tokens: torch.Tensor, questions: TextTokens) -> torch.Tensor:
        """Return the log-likelihood [N, K] of every answer to questions [N, S]."""
        ...


def answer_logits(model: AnsweringModel, tokens: torch.Tensor, questions: Texts) -> torch.Tensor:
    """Compute the logits [N, K] of all answers for each pair of a clip and a question.

    The logits of generated answers are their log-likelihoods, so a softmax gives their shares of
    the likelihood of all answers of the vocabulary.

    Args:
        model: A model that was trained to answer questions.
        tokens: [N, M, D] float, visual tokens, or [1, M, D] for one clip with all questions.
        questions: N questions, as strings or tokens.

    Raises:
        CheckpointError: The model has no classifier, and does not generate answers.
    """
    if answering_of(model.config) == "generation":
        assert isinstance(questions, TextTokens)
        return cast("GeneratingModel", model).generated_answer_logits(tokens, questions)
    classifier = getattr(model, "classifier", None)
    if classifier is None:
        raise CheckpointError(
            "the model has no classifier of answers; train one with a recipe such as "
            "qa_msrvtt_stgt, and use its checkpoint"
        )
    return classifier(model.fuse(tokens, questions))


def answer_losses(
    model: AnsweringModel, tokens: torch.Tensor, questions: TextTokens, answers: torch.Tensor
) -> torch.Tensor:
    """Compute the negative log-probability [N] float of the annotated answer to each question.

    Args:
        model: A model that answers questions.
        tokens: [N, M, D] float, visual tokens.
        questions: Ids and mask [N, S].
        answers: [N] int64, number of each annotated answer in the vocabulary.
    """
    if answering_of(model.config) == "generation":
        return cast("GeneratingModel", model).generated_answer_losses(tokens, questions, answers)
    logits = answer_logits(model, tokens, questions).float()
    return F.cross_entropy(logits, answers, reduction="none")


def freeze_unused(model: nn.Module, names: Sequence[str]) -> None:
    """Exclude the parameters that answers do not depend on from training.

    They get no gradient, for which DistributedDataParallel would wait, and an optimizer that
    decays weights would change them.

    Args:
        model: The model.
        names: What its `unused_when_answering` returns.
    """
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(names)):
            parameter.requires_grad_(False)
