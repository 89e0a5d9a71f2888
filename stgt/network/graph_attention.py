"""The patch graph of a clip and attention along its edges.

Legend: B videos, T frames, P patches per frame, D width, A heads, d = D / A, K = 3P patches of the
previous, same and next frame.

The nodes are the T*P patches. Two patches share an edge if their frames are at most one apart and
their cosine similarity reaches a threshold, so scores are only needed within adjacent frames. Per
head and frame, one [P, K] matrix is kept for the backward pass; the dense formulation keeps several
[TP, TP] matrices per head. At T = 8, edges exist in only 22 of the 64 pairs of frames.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

_Two: TypeAlias = tuple[torch.Tensor, torch.Tensor]

HEADS_AT_ONCE_CPU = 4
"""Number of heads of one frame processed together. At full size their scores take 3 MB."""
SCORES_AT_ONCE_CPU = 4 * 256 * 768
"""Number of scores computed together, at least those of one video. At full size this is one video.
Small models process many videos at once, since each operation takes some microseconds to start."""


def patch_similarity(patches_BTPD: torch.Tensor) -> torch.Tensor:
    """Compute the cosine similarity of each patch with those of the previous, same and next frame.

    This is always computed in float32, so that the precision policy affects edges only through the
    patches themselves.

    Args:
        patches_BTPD: [B, T, P, D] float.

    Returns:
        [B, T, P, 3P] float32 in [-1, 1]; zero before the first and after the last frame.
    """
    batch, frames, patches, _ = patches_BTPD.shape
    with torch.autocast(patches_BTPD.device.type, enabled=False):
        unit_BTPD = F.normalize(patches_BTPD.float(), dim=-1)
        similarity = unit_BTPD.new_zeros(batch, frames, patches, 3, patches)
        similarity[:, :, :, 1] = unit_BTPD @ unit_BTPD.transpose(-1, -2)
        to_next = unit_BTPD[:, :-1] @ unit_BTPD[:, 1:].transpose(-1, -2)
        similarity[:, :-1, :, 2] = to_next
        similarity[:, 1:, :, 0] = to_next.transpose(-1, -2)
    return similarity.flatten(3)


def edges(similarity_BTPK: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return which pairs of patches share an edge: each patch with itself and with similar ones.

    Self-edges are added explicitly because rounding can put a patch's similarity with itself below
    a threshold of 1, and the softmax of a node without edges is undefined.

    Args:
        similarity_BTPK: [B, T, P, 3P] float, from `patch_similarity`.
        threshold: Minimum similarity of an edge.

    Returns:
        [B, T, P, 3P] bool, True = may attend.
    """
    _, frames, patches, window = similarity_BTPK.shape
    device = similarity_BTPK.device
    inside_TK = torch.ones(frames, window, dtype=torch.bool, device=device)
    inside_TK[0, :patches] = False
    inside_TK[-1, 2 * patches :] = False
    itself_PK = torch.zeros(patches, window, dtype=torch.bool, device=device)
    itself_PK[:, patches : 2 * patches] = torch.eye(patches, dtype=torch.bool, device=device)
    return ((similarity_BTPK >= threshold) | itself_PK) & inside_TK[:, None, :]


class _Bands:
    """Splits the attention scores of a batch by frame, and on a CPU also by videos and heads."""

    def __init__(self, query: torch.Tensor, frames: int) -> None:
        batch, heads, nodes, _ = query.shape
        patches = nodes // frames
        on_cpu = query.device.type == "cpu"
        step_b, step_a = batch, heads
        if on_cpu:
            step_a = min(heads, HEADS_AT_ONCE_CPU)
            scores = step_a * patches * min(3, frames) * patches
            step_b = max(1, SCORES_AT_ONCE_CPU // scores)
        self.pieces = [
            _Piece(
                videos=slice(b, b + step_b),
                heads=slice(a, a + step_a),
                frame=t,
                own=slice(t * patches, (t + 1) * patches),
                window=slice(max(0, t - 1) * patches, min(frames, t + 2) * patches),
                columns=slice(patches * (t == 0), patches * (3 - (t == frames - 1))),
            )
            for b in range(0, batch, step_b)
            for a in range(0, heads, step_a)
            for t in range(frames)
        ]


class _Piece:
    """Index ranges of one frame, for some videos and heads, in each tensor."""

    def __init__(
        self,
        videos: slice,
        heads: slice,
        frame: int,
        own: slice,
        window: slice,
        columns: slice,
    ) -> None:
        self.own = (videos, heads, own)
        """The frame's nodes, in [B, A, T*P, d]."""
        self.window = (videos, heads, window)
        """Nodes of the previous, same and next frame, in [B, A, T*P, d]."""
        self.graph = (videos, None, frame, slice(None), columns)
        """The frame's part of the graph, in [B, T, P, 3P]; selects [b, 1, P, up to 3P]."""


class _BandedAttention(torch.autograd.Function):
    """Computes softmax((Q K^T) * S + bias) V frame by frame.

    The backward pass uses one stored copy of the attention weights within the band, and regenerates
    dropout masks from their seed.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        similarity: torch.Tensor,
        edge: torch.Tensor,
        dropout: float,
        seed: int,
        compiled: bool,
    ) -> torch.Tensor:
        bands = _Bands(query, similarity.shape[1])
        bias = torch.zeros_like(similarity).masked_fill_(~edge, -math.inf)
        mixed = torch.empty_like(query)
        kept: list[torch.Tensor] = []
        keeps = any(ctx.needs_input_grad)  # type: ignore[attr-defined]
        attention_weights = maybe_compiled(_attention_weights, compiled)
        for index, piece in enumerate(bands.pieces):
            scores = query[piece.own] @ key[piece.window].transpose(-1, -2)
            weights, dropped = attention_weights(
                scores,
                similarity[piece.graph],
                bias[piece.graph],
                _not_dropped(scores, dropout, seed + index),
                dropout,
            )
            if keeps:
                kept.append(weights)
            mixed[piece.own] = dropped @ value[piece.window]
        if keeps:
            ctx.save_for_backward(query, key, value, similarity, mixed, *kept)
        ctx.bands, ctx.dropout, ctx.seed = bands, dropout, seed  # type: ignore[attr-defined]
        ctx.compiled = compiled  # type: ignore[attr-defined]
        return mixed

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, grad_mixed: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        query, key, value, similarity, mixed, *kept = ctx.saved_tensors  # type: ignore[attr-defined]
        bands, dropout, seed = ctx.bands, ctx.dropout, ctx.seed  # type: ignore[attr-defined]
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        # Row sums of weights * their gradients, which the softmax gradient subtracts.
        expected = (grad_mixed * mixed).sum(dim=-1, keepdim=True)
        score_gradients = maybe_compiled(_score_gradients, ctx.compiled)  # type: ignore[attr-defined]
        for index, (piece, weights) in enumerate(zip(bands.pieces, kept, strict=True)):
            grad_own = grad_mixed[piece.own]
            grad, dropped = score_gradients(
                grad_own @ value[piece.window].transpose(-1, -2),
                weights,
                expected[piece.own],
                similarity[piece.graph],
                _not_dropped(weights, dropout, seed + index),
                dropout,
            )
            grad_value[piece.window] += dropped.transpose(-1, -2) @ grad_own
            grad_query[piece.own] = grad @ key[piece.window]
            grad_key[piece.window] += grad.transpose(-1, -2) @ query[piece.own]
        return grad_query, grad_key, grad_value, None, None, None, None, None


def _attention_weights(
    scores: torch.Tensor,
    similarity: torch.Tensor,
    bias: torch.Tensor,
    not_dropped: torch.Tensor | None,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the softmax of scores * similarity + bias, and the same after dropout."""
    precise = _precise(scores)
    torch.addcmul(bias, precise, similarity, out=precise)
    weights = precise.softmax(dim=-1).to(scores.dtype)
    if not_dropped is None:
        return weights, weights
    return weights, weights * _dropout_mask(not_dropped, dropout, weights.dtype)


def _score_gradients(
    grad: torch.Tensor,
    weights: torch.Tensor,
    expected: torch.Tensor,
    similarity: torch.Tensor,
    not_dropped: torch.Tensor | None,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of the scores, and the weights after dropout.

    Args:
        grad: Gradient of the weights after dropout.
        weights: The weights before dropout.
        expected: Row sums of the weights times their gradients.
        similarity: The factors of the scores.
        not_dropped: From `_not_dropped`.
        dropout: Dropout probability.
    """
    precise, dropped = _precise(grad), weights
    if not_dropped is not None:
        mask = _dropout_mask(not_dropped, dropout, weights.dtype)
        dropped = weights * mask
        precise = precise.mul_(mask)
    precise.sub_(expected).mul_(weights).mul_(similarity)
    return precise.to(weights.dtype), dropped


@functools.cache
def maybe_compiled(function: Callable[..., _Two], compiled: bool) -> Callable[..., _Two]:
    """Return a function, compiled by torch.compile if asked for, always the same one."""
    # Frames at the ends of a clip have fewer scores, so there are a few fixed sizes.
    return torch.compile(function, dynamic=False) if compiled else function


def _precise(scores: torch.Tensor) -> torch.Tensor:
    """Cast half-precision scores to float32, for an accurate softmax and gradient."""
    return scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores


def _not_dropped(weights: torch.Tensor, dropout: float, seed: int) -> torch.Tensor | None:
    """Return which weights the seed's dropout keeps, as bool of their shape; None for all."""
    if dropout == 0:
        return None
    generator = torch.Generator(weights.device).manual_seed(seed)
    if weights.device.type == "cuda":  # one kernel that writes a byte per weight
        kept = torch.empty(weights.shape, dtype=torch.bool, device=weights.device)
        return kept.bernoulli_(1 - dropout, generator=generator)
    return torch.rand(weights.shape, generator=generator, device=weights.device) >= dropout


def _dropout_mask(not_dropped: torch.Tensor, dropout: float, dtype: torch.dtype) -> torch.Tensor:
    """Return 1 / (1 - dropout) where a weight is kept, and 0 elsewhere."""
    return not_dropped.to(dtype).mul_(1 / (1 - dropout))


def banded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    similarity: torch.Tensor,
    edge: torch.Tensor,
    dropout: float = 0.0,
    compiled: bool = False,
) -> torch.Tensor:
    """Apply the softmax over edges of (Q K^T / sqrt(d)) * similarity to V.

    Args:
        query: [B, A, T*P, d] float, nodes ordered by frame.
        key: [B, A, T*P, d] float.
        value: [B, A, T*P, d] float.
        similarity: [B, T, P, 3P] float32, from `patch_similarity`; receives no gradient.
        edge: [B, T, P, 3P] bool, True = may attend.
        dropout: Dropout probability of attention weights. Masks are seeded by torch's global
            generator.
        compiled: Compile what is between the matrix products with torch.compile.

    Returns:
        [B, A, T*P, d] float.
    """
    seed = int(torch.randint(2**62, ())) if dropout > 0 else 0
    scaled = query / math.sqrt(query.shape[-1])
    with torch.autocast(query.device.type, enabled=False):
        return _BandedAttention.apply(  # type: ignore[no-any-return]
            scaled, key, value, similarity, edge, dropout, seed, compiled
        )


class GraphAttention(nn.Module):
    """Multi-head attention along the edges of the patch graph, with similarity-weighted scores."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.compiled = False
        """Whether what is between the matrix products is compiled."""
        self.W_Q = nn.Linear(width, width)
        self.W_K = nn.Linear(width, width)
        self.W_V = nn.Linear(width, width)
        self.W_O = nn.Linear(width, width)

    def forward(
        self, patches: torch.Tensor, similarity: torch.Tensor, edge: torch.Tensor
    ) -> torch.Tensor:
        """Attend along edges, without a residual connection.

        Args:
            patches: [B, T, P, D] float.
            similarity: [B, T, P, 3P] float32; receives no gradient.
            edge: [B, T, P, 3P] bool, True = may attend.

        Returns:
            [B, T, P, D] float.
        """
        nodes = patches.flatten(1, 2)

        def split_heads(x: torch.Tensor) -> torch.Tensor:
            # [B, T*P, D] -> [B, A, T*P, d]
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2).contiguous()

        mixed = banded_attention(
            split_heads(self.W_Q(nodes)),
            split_heads(self.W_K(nodes)),
            split_heads(self.W_V(nodes)),
            similarity,
            edge,
            self.dropout if self.training else 0.0,
            self.compiled,
        )
        # [B, A, T*P, d] -> [B, T, P, D]
        return self.W_O(mixed.transpose(1, 2).flatten(2)).reshape(patches.shape)
