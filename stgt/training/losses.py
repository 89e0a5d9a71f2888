"""Contrastive, matching and caption losses: tensors in, tensors out.

Contrastive targets are hard (video i belongs to text i alone) or self-similar: pairs whose videos
and texts both resemble each other share the target mass (the paper's self-similarity alignment
loss).

Legend: N pairs of the global batch, Q query tokens, E shared embedding, S text tokens, W words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from stgt.config import Targets
from stgt.network.similarity import _full_precision, video_text_similarity

HARD_LABEL_SMOOTHING = 0.1

SELF_SIMILARITY_LABEL_SMOOTHING = 0.01

SELF_SIMILARITY_SHARPNESS = 5.0

SELF_SIMILARITY_LEAST = 0.05

UNRELATED = -100.0
"""Takes the place of affinities below SELF_SIMILARITY_LEAST; as published, before the factor 5."""

CAPTION_LABEL_SMOOTHING = 0.1


@dataclass(frozen=True)
class Pairs:
    """Embeddings of pairs of videos and texts."""

    video_embeds: torch.Tensor
    """[N, Q, E] float, unit length."""
    text_embeds: torch.Tensor
    """[N, E] float, unit length."""

    def __len__(self) -> int:
        return len(self.text_embeds)


def self_similarity_targets(rows: Pairs, columns: Pairs) -> torch.Tensor:
    """Soft targets from how much pairs resemble each other in both modalities.

    A = relu(u u^T) * relu(t t^T) with u the unit mean of a video's query embeddings; affinities
    below 0.05 count as unrelated; softmax(5 A) over a row. Gradients flow through the targets.

    Args:
        rows: R pairs.
        columns: the N pairs that they are compared with.

    Returns:
        [R, N] float, rows sum to 1.
    """
    with _full_precision(rows.text_embeds):
        one, other = (
            F.normalize(pairs.video_embeds.float().mean(dim=1), dim=-1) for pairs in (rows, columns)
        )
        texts = rows.text_embeds.float() @ columns.text_embeds.float().T
        affinity = F.relu(one @ other.T) * F.relu(texts)
    affinity = affinity.masked_fill(affinity < SELF_SIMILARITY_LEAST, UNRELATED)
    return (SELF_SIMILARITY_SHARPNESS * affinity).softmax(dim=1)


def contrastive_loss(
    rows: Pairs,
    columns: Pairs,
    own: torch.Tensor,
    temperature: torch.Tensor,
    targets: Targets,
) -> torch.Tensor:
    """Mean of the video-to-text and text-to-video cross-entropies of some rows of the global batch.

    Args:
        rows: R pairs whose loss it is.
        columns: all N pairs.
        own: [R] int64, the column of each row.
        temperature: scalar float.
        targets: "hard" (the own column) or "self_similarity".

    Returns:
        Scalar float.

    Raises:
        ValueError: the kind of targets is unknown.
    """
    if targets == "hard":
        wanted, smoothing = own, HARD_LABEL_SMOOTHING
    elif targets == "self_similarity":
        wanted = self_similarity_targets(rows, columns)
        smoothing = SELF_SIMILARITY_LABEL_SMOOTHING
    else:
        raise ValueError(f"targets = {targets!r}: must be 'hard' or 'self_similarity'")
    video_to_text = video_text_similarity(rows.video_embeds, columns.text_embeds)
    if rows is columns:
        text_to_video = video_to_text.T
    else:
        text_to_video = video_text_similarity(columns.video_embeds, rows.text_embeds).T
    return (
        F.cross_entropy(video_to_text / temperature, wanted, label_smoothing=smoothing)
        + F.cross_entropy(text_to_video / temperature, wanted, label_smoothing=smoothing)
    ) / 2


def choose_hard_negatives(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """For each row, draw a column other than the diagonal with probability softmax(logits).

    Args:
        logits: [N, N] float, similarity / temperature; column i of row i is the true pair.
        uniform: [N] float in [0, 1), one number a row: the draw is its inverse of the cumulative
            probabilities, hence a function of the sample and not of the worker it is on.

    Returns:
        [N] int64, never the row's own index.

    Raises:
        ValueError: there is only one pair, which leaves nothing to choose from.
    """
    count = logits.shape[0]
    if count < 2:
        raise ValueError("matching needs a global batch of at least 2 pairs to draw negatives from")
    diagonal = torch.eye(count, dtype=torch.bool, device=logits.device)
    weights = logits.detach().float().masked_fill(diagonal, -torch.inf).softmax(dim=1)
    cumulative = weights.cumsum(dim=1)
    threshold = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=count - 1)
    # Rounding at the very end of the row may land on the diagonal, whose weight is zero.
    own = torch.arange(count, device=logits.device)
    best = weights.argmax(dim=1)
    return torch.where(chosen == own, best, chosen)


def matching_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropies [N] of match logits [N, 2] float, labels [N] int64 (1 = they match)."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def count_targets(attention_mask: torch.Tensor) -> torch.Tensor:
    """How many tokens of texts with mask [N, S] int64 are to be predicted; scalar int64."""
    return (attention_mask[:, 1:] != 0).sum()


def caption_loss(
    logits: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed next-token cross-entropy over real tokens, and how many there were.

    Args:
        logits: [N, S, W] float.
        input_ids: [N, S] int64, the texts themselves; token s+1 is the target of position s.
        attention_mask: [N, S] int64, 1 = a real token.

    Returns:
        Sum of the token losses and the number of target tokens; their quotient is the mean loss.
    """
    targets = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100)
    total = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=-100,
        reduction="sum",
        label_smoothing=CAPTION_LABEL_SMOOTHING,
    )
    return total, (targets != -100).sum()
