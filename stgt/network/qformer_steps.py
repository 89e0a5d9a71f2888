"""Single steps of the Q-Former's layers, to share computation between the texts of a video.

`Blip2QFormerModel` computes all positions of every pair. Scoring many captions against a video, or
generating one word by word, would repeat most of that: the video's keys and values are the same for
all texts, and so are the query states when queries do not attend to the text. These functions run
the same modules with the same weights step by step, for inference.

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
    """Keys and values of an attention layer."""

    keys: torch.Tensor
    """[N, A, K, d] float."""
    values: torch.Tensor
    """[N, A, K, d] float."""

    def rows(self, index: torch.Tensor) -> KeysValues:
        """Return the keys and values of the rows `index` [R] int64."""
        return KeysValues(self.keys[index], self.values[index])

    def followed_by(self, more: KeysValues) -> KeysValues:
        """Return these positions followed by those of `more`."""
        return KeysValues(
            torch.cat([self.keys, more.keys], dim=2), torch.cat([self.values, more.values], dim=2)
        )


def layers_of(qformer: QFormer) -> list[Blip2QFormerLayer]:
    """Return the layers in order."""
    return cast(list[Blip2QFormerLayer], list(qformer.bert.encoder.layer))


def embed(qformer: QFormer, embeddings: torch.Tensor) -> torch.Tensor:
    """Normalize embeddings [N, S, H] of queries or texts for the first layer."""
    return qformer.bert.layernorm(embeddings)


def _split_heads(x: torch.Tensor, attention: Blip2QFormerMultiHeadAttention) -> torch.Tensor:
    # [N, S, H] -> [N, A, S, d]
    return x.unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)


def keys_values(block: Blip2QFormerAttention, states: torch.Tensor) -> KeysValues:
    """Compute the keys and values of states [N, K, H or D]."""
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
    """Apply attention with its residual connection and norm.

    Args:
        block: Self- or cross-attention of a layer.
        states: [N, S, H] float, the attending positions.
        seen: Keys and values to attend to.
        mask: Bool, broadcastable to [N, A, S, K]; True = may attend.

    Returns:
        [N, S, H] float.
    """
    attention = block.attention
    query = _split_heads(attention.query(states), attention)
    mixed = F.scaled_dot_product_attention(query, seen.keys, seen.values, attn_mask=mask)
    return block.output(mixed.transpose(1, 2).flatten(2), states)


def feed_forward_query(layer: Blip2QFormerLayer, states: torch.Tensor) -> torch.Tensor:
    """Apply the feed-forward of query positions: [N, Q, H] -> [N, Q, H]."""
    return layer.feed_forward_chunk_query(states)


def feed_forward_text(layer: Blip2QFormerLayer, states: torch.Tensor) -> torch.Tensor:
    """Apply the feed-forward of text positions: [N, S, H] -> [N, S, H]."""
    return layer.feed_forward_chunk(states)


def video_keys_values(qformer: QFormer, video_tokens: torch.Tensor) -> list[KeysValues | None]:
    """Compute the cross-attention keys and values of videos [V, M, D], shared by all their pairs.

    Returns:
        One entry per layer; None for layers without cross-attention.
    """
    return [
        keys_values(layer.crossattention, video_tokens) if layer.has_cross_attention else None
        for layer in layers_of(qformer)
    ]
