"""The training objective of question answering: cross-entropy of the annotated answers.

Legend: B questions of this worker, T frames, S text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

from stgt.errors import TooFewPairsError
from stgt.inputs.tokenizer import TextTokens
from stgt.interface.model import FrameTokens
from stgt.question_answering.head import AnsweringModel, answer_losses
from stgt.training.objective import Losses
from stgt.training.randomness import seed_generators

LOSS = "answer"
"""Name of the loss."""


class AnswerObjective(nn.Module):
    """Cross-entropy of the annotated answers, averaged over the questions of the global batch."""

    def __init__(self, model: AnsweringModel) -> None:
        """Wrap a model that answers questions."""
        super().__init__()
        self.model = model

    def forward(
        self,
        frames: torch.Tensor | FrameTokens,
        questions: TextTokens,
        answers: torch.Tensor,
        valid: torch.Tensor | None = None,
    ) -> Losses:
        """Compute the loss. The mean over workers is the mean over the global batch.

        Args:
            frames: [B, T, 3, H, W] float, normalized, or [B, T, H, W, 3] uint8, or the tokens of
                frames encoded before.
            questions: Ids and mask [B, S].
            answers: [B] int64, class of each annotated answer.
            valid: [B] bool, False for a clip that could not be read; None if all could be read.

        Raises:
            TooFewPairsError: No clip of the global batch could be read.
        """
        weights = _weights(answers, valid)
        return {LOSS: self._summed(frames, questions, answers, weights) / _share(weights, valid)}

    def accumulate(
        self,
        frames: torch.Tensor | FrameTokens,
        questions: TextTokens,
        answers: torch.Tensor,
        valid: torch.Tensor | None = None,
        *,
        micro_batch: int,
        seed: int,
        scale: float = 1.0,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> Losses:
        """Add the gradients of `forward`'s loss to the parameters', in passes over a few clips.

        Questions do not affect each other, so the gradients are those of one pass, apart from
        rounding and dropout.

        Args:
            frames: See `forward`.
            questions: See `forward`.
            answers: See `forward`.
            valid: See `forward`.
            micro_batch: Maximum number of clips per pass.
            seed: Seed for dropout.
            scale: Factor applied to the gradients, for fp16 loss scaling.
            context: Autocast context for the forward passes.

        Returns:
            The detached loss.
        """
        weights = _weights(answers, valid)
        share = _share(weights, valid)
        total = torch.zeros((), device=answers.device)
        for first in range(0, len(answers), micro_batch):
            rows = torch.arange(
                first, min(first + micro_batch, len(answers)), device=answers.device
            )
            seed_generators(seed + first, answers.device)
            with context():
                loss = self._summed(
                    frames[rows], questions.select(rows), answers[rows], weights[rows]
                )
            (loss / share * scale).backward()
            total += loss.detach()
        return {LOSS: total / share}

    def _summed(
        self,
        frames: torch.Tensor | FrameTokens,
        questions: TextTokens,
        answers: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        tokens = self.model.video_tokens(frames)
        return (answer_losses(self.model, tokens, questions, answers) * weights).sum()


def _weights(answers: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    weights = torch.ones(len(answers), device=answers.device)
    return weights if valid is None else weights * valid


def _share(weights: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Return the mean number of usable questions per worker."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1 and valid is None:
        return weights.sum()  # not read, since tensors of an estimate have no values
    count = weights.sum()
    if world > 1:
        dist.all_reduce(count)
    if count == 0:
        raise TooFewPairsError("none of the clips of the global batch could be used")
    return count / world
