"""Single steps of the Q-Former's layers, for passes that share work between many texts of a video.

`Blip2QFormerModel` computes every position of every pair anew. Scoring many captions against a
video, or writing one word by word, repeats most of that: the video's keys and values are the same
for all texts, and so are the query states where no query sees a text. These functions run the
same layers (same modules, same weights) piece by piece, for inference.

Legend: V videos, N pairs or texts, Q query tokens, S text tokens, M visual tokens, H width, A
heads, d = H / A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from transformers.models.blip_2.modeling_blip_2 import (
    Blip2QFormerAttention,
    Blip2QFormerLayer,
    Blip2QFormerMultiHeadAttention,
)

from stgt.network.qformer import QFormer


@dataclass(frozen=True)
class KeysValues:
    """What an attention layer looks at."""

    keys: torch.Tensor
    """[N, A, K, d] float."""
    values: torch.Tensor
    """[N, A, K, d] float."""

    def rows(self, index: torch.Tensor) -> KeysValues:
        """Those of the rows `index` [R] int64."""
        return KeysValues(self.keys[index], self.values[index])

    def followed_by(self, more: KeysValues) -> KeysValues:
        """These positions, then more of them."""
        return KeysValues(
            torch.cat([self.keys, more.keys], dim=2), torch.cat([self.values, more.values], dim=2)
        )


def layers_of(qformer: QFormer) -> list[Blip2QFormerLayer]:
    """The layers in order."""
    return cast(list[Blip2QFormerLayer], list(qformer.bert.encoder.layer))


def embed(qformer: QFormer, embeddings: torch.Tensor) -> torch.Tensor:
    """What the first layer takes: normalized [N, S, H], of queries or of texts."""
    return qformer.bert.layernorm(embeddings)


def _split_heads(x: torch.Tensor, attention: Blip2QFormerMultiHeadAttention) -> torch.Tensor:
    # [N, S, H] -> [N, A, S, d]
    return x.unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)


def keys_values(block: Blip2QFormerAttention, states: torch.Tensor) -> KeysValues:
    """Keys and values of states [N, K, H or D]."""
    attention = block.attention
    return KeysValues(
        _split_heads(attention.key(states), attention),
        _split_heads(attention.value(states), attention),
    )


def attend(
    block: Blip2QFormerAttention,
    states: torch.Tensor,
    seen: KeysValues,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention with its residual and norm.

    Args:
        block: self- or cross-attention of a layer.
        states: [N, S, H] float, the positions that look.
        seen: what they look at.
        mask: bool, broadcast to [N, A, S, K], True = may attend.

    Returns:
        [N, S, H] float.
    """
    attention = block.attention
    query = _split_heads(attention.query(states), attention)
    mixed = F.scaled_dot_product_attention(query, seen.keys, seen.values, attn_mask=mask)
    return block.output(mixed.transpose(1, 2).flatten(2), states)


def feed_forward_query(layer: Blip2QFormerLayer, states: torch.Tensor) -> torch.Tensor:
    """The feed-forward of query positions: [N, Q, H] -> [N, Q, H]."""
    return layer.feed_forward_chunk_query(states)


def feed_forward_text(layer: Blip2QFormerLayer, states: torch.Tensor) -> torch.Tensor:
    """The feed-forward of text positions: [N, S, H] -> [N, S, H]."""
    return layer.feed_forward_chunk(states)


def video_keys_values(qformer: QFormer, video_tokens: torch.Tensor) -> list[KeysValues | None]:
    """Cross-attention keys and values of videos [V, M, D], once for all their pairs.

    Returns:
        One entry a layer; None for layers without cross-attention.
    """
    return [
        keys_values(layer.crossattention, video_tokens) if layer.has_cross_attention else None
        for layer in layers_of(qformer)
    ]
