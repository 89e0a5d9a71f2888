"""Contrastive, matching and caption losses as functions of tensors.

Contrastive targets are hard (only text i matches video i) or based on self-similarity: pairs whose
videos and texts are both similar share the target mass (the paper's self-similarity alignment
loss).

Legend: N pairs of the global batch, Q query tokens, E shared embedding, S text tokens, W words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from stgt.config import CAPTION_LABEL_SMOOTHING, CONTRASTIVE_LABEL_SMOOTHING, Targets
from stgt.network.similarity import _full_precision, video_text_similarity

SELF_SIMILARITY_SHARPNESS = 5.0

SELF_SIMILARITY_LEAST = 0.05

UNRELATED = -100.0
"""Replaces affinities below SELF_SIMILARITY_LEAST before the factor 5 is applied, as published."""


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
    """Compute soft targets from the similarity of pairs in both modalities.

    The targets are the row-wise softmax(5 A) of A = relu(u u^T) * relu(t t^T), where u is the
    normalized mean of a video's query embeddings and t is a text embedding. Affinities below 0.05
    count as unrelated. Gradients flow through the targets.

    Args:
        rows: R pairs.
        columns: The N pairs to compare them with.

    Returns:
        [R, N] float; each row sums to 1.
    """
    with _full_precision(rows.text_embeds):
        one, other = (
            F.normalize(pairs.video_embeds.float().mean(dim=1), dim=-1) for pairs in (rows, columns)
        )
        texts = rows.text_embeds.float() @ columns.text_embeds.float().T
        affinity = F.relu(one @ other.T) * F.relu(texts)
    affinity = affinity.masked_fill(affinity < SELF_SIMILARITY_LEAST, UNRELATED)
    return (SELF_SIMILARITY_SHARPNESS * affinity).softmax(dim=1)


def same_pairs(clip_keys: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Find pairs that are not negatives of each other, since they share the clip or the text.

    Args:
        clip_keys: [N] int64, equal for equal clips.
        input_ids: [N, S] int64, truncated and padded texts.

    Returns:
        [N, N] bool, symmetric, and true on the diagonal.
    """
    texts = torch.unique(input_ids, dim=0, return_inverse=True)[1]
    return (clip_keys[:, None] == clip_keys) | (texts[:, None] == texts)


def contrastive_loss(
    rows: Pairs,
    columns: Pairs,
    own: torch.Tensor,
    temperature: torch.Tensor,
    targets: Targets,
    same: torch.Tensor | None = None,
    label_smoothing: float | None = None,
) -> torch.Tensor:
    """Average the video-to-text and text-to-video cross-entropies of rows of the global batch.

    Args:
        rows: R pairs over which the loss is averaged.
        columns: All N pairs.
        own: [R] int64, the column of each row's true pair.
        temperature: Scalar float.
        targets: "hard" (the true pair only) or "self_similarity".
        same: [R, N] bool, columns that share a row's clip or text, and with it its hard target.
            None if only the true pair does.
        label_smoothing: Share of each target that is spread over all N columns, in [0, 1). None
            takes the published value: 0.1 for hard targets, 0.01 for self_similarity.

    Returns:
        Scalar float.

    Raises:
        ValueError: The kind of targets is unknown.
    """
    if targets == "hard":
        wanted = own if same is None else same.float() / same.sum(dim=1, keepdim=True)
    elif targets == "self_similarity":
        wanted = self_similarity_targets(rows, columns)
    else:
        raise ValueError(f"targets = {targets!r}: must be 'hard' or 'self_similarity'")
    smoothing = CONTRASTIVE_LABEL_SMOOTHING[targets] if label_smoothing is None else label_smoothing
    video_to_text = video_text_similarity(rows.video_embeds, columns.text_embeds)
    if rows is columns:
        text_to_video = video_to_text.T
    else:
        text_to_video = video_text_similarity(columns.video_embeds, rows.text_embeds).T
    return (
        F.cross_entropy(video_to_text / temperature, wanted, label_smoothing=smoothing)
        + F.cross_entropy(text_to_video / temperature, wanted, label_smoothing=smoothing)
    ) / 2


def choose_hard_negatives(
    logits: torch.Tensor, uniform: torch.Tensor, same: torch.Tensor | None = None
) -> torch.Tensor:
    """Draw a column other than the true pair for each row, with probability softmax(logits).

    Args:
        logits: [N, N] float, similarity / temperature; column i of row i is the true pair.
        uniform: [N] float in [0, 1), one random number per row, mapped through the row's inverse
            cumulative distribution. The draw does not depend on which worker holds the sample.
        same: [N, N] bool, columns that must not be drawn, with a true diagonal. None excludes only
            the diagonal.

    Returns:
        [N] int64, a column that may be drawn; the row's own index if there is none.

    Raises:
        ValueError: There is only one pair, so no negative exists.
    """
    count = logits.shape[0]
    if count < 2:
        raise ValueError(
            "matching requires a global batch of at least 2 pairs, to draw negatives from"
        )
    if same is None:
        same = torch.eye(count, dtype=torch.bool, device=logits.device)
    weights = logits.detach().float().masked_fill(same, -torch.inf).softmax(dim=1)
    weights = weights.masked_fill(same, 0.0)  # a row without negatives has no softmax
    cumulative = weights.cumsum(dim=1)
    threshold = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=count - 1)
    # At the end of a row, rounding may select an excluded column, whose weight is zero.
    best = weights.argmax(dim=1)
    own = torch.arange(count, device=logits.device)
    chosen = torch.where(same[own, chosen], best, chosen)
    return torch.where(same.all(dim=1), own, chosen)


def matching_losses(
    logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Return cross-entropies [N] of match logits [N, 2] float and labels [N] int64 (1 = match).

    `label_smoothing`, in [0, 1), is the share of each target that is spread over both classes.
    """
    return F.cross_entropy(
        logits.float(), labels, reduction="none", label_smoothing=label_smoothing
    )


def count_targets(attention_mask: torch.Tensor) -> torch.Tensor:
    """Count the target tokens of texts with mask [N, S] int64, as a scalar int64 tensor."""
    return (attention_mask[:, 1:] != 0).sum()


def caption_loss(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    label_smoothing: float = CAPTION_LABEL_SMOOTHING,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the next-token cross-entropy over real tokens, and count them.

    Args:
        logits: [N, S, W] float.
        input_ids: [N, S] int64, the unmodified texts; token s+1 is the target of position s.
        attention_mask: [N, S] int64, 1 = real token.
        label_smoothing: Share of each target that is spread over all W words, in [0, 1).

    Returns:
        Sum of the token losses and number of target tokens; their ratio is the mean loss.
    """
    targets = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100)
    total = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=-100,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return total, (targets != -100).sum()
