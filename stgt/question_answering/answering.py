"""Answers questions about clips: the most probable answers and their probabilities.

Legend: V clips, N questions, K classes, M visual tokens, D vision width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stgt.inputs.tokenizer import TextTokens
from stgt.interface.inputs import VideoTextConfig
from stgt.question_answering.head import AnsweringModel, answer_logits


def tokenize_questions(
    config: VideoTextConfig, tokenizer: Any, questions: Sequence[str], max_tokens: int
) -> TextTokens:
    """Tokenize questions as a model was trained with them.

    Args:
        config: Config of the model.
        tokenizer: Its tokenizer.
        questions: N questions.
        max_tokens: Length to which they are truncated and padded.
    """
    if config.cleans_questions:
        return tokenizer(questions, max_tokens)
    return tokenizer.as_written(questions, max_tokens)


@dataclass(frozen=True)
class RankedAnswers:
    """The most probable answers to N questions, in descending order of probability."""

    labels: torch.Tensor
    """[N, k] int64: classes. A class beyond the answer vocabulary is a wrong answer."""
    probabilities: torch.Tensor
    """[N, k] float32: shares of the softmax over all classes."""


@torch.no_grad()
def rank_answers(
    model: AnsweringModel,
    tokens: torch.Tensor,
    clips: torch.Tensor,
    questions: TextTokens,
    most: int = 5,
    batch_pairs: int = 128,
) -> RankedAnswers:
    """Answer questions about encoded clips.

    Args:
        model: A model that answers questions, in eval mode.
        tokens: [V, M, D] float, visual tokens of the clips.
        clips: [N] int64, the clip that each question is about.
        questions: Ids and mask [N, S].
        most: Number k of answers to return for each question, at most K of them.
        batch_pairs: Number of questions to answer at a time.
    """
    labels, probabilities = [], []
    for rows in torch.arange(len(clips), device=clips.device).split(batch_pairs):
        logits = answer_logits(model, tokens[clips[rows]], questions.select(rows))
        found = logits.float().softmax(dim=1)
        best = found.topk(min(most, found.shape[1]), dim=1)
        labels.append(best.indices)
        probabilities.append(best.values)
    return RankedAnswers(torch.cat(labels), torch.cat(probabilities))
