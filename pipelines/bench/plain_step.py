"""The losses of STGT in the plain formulation of the published code, as a baseline.

It computes what `TrainingObjective` computes, with the weights of the same model, but forms every
attention matrix, attends over all pairs of a clip's patches, and runs the Q-Former four times:
queries, texts, pairs to match, and captions after the cached keys and values of the queries.

Legend: B pairs, T frames, P patches per frame, L tokens per frame, D width, A heads, d = D / A,
M visual tokens, Q query tokens, S text tokens, H Q-Former width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from stgt.config import Targets
from stgt.inputs.tokenizer import TextTokens
from stgt.model import STGT
from stgt.network.graph import GraphBlock, ResidualAttention
from stgt.network.graph_attention import GraphAttention
from stgt.network.qformer import QFormer
from stgt.network.qformer_steps import layers_of
from stgt.network.similarity import video_text_similarity
from stgt.training.losses import (
    Pairs,
    caption_loss,
    choose_hard_negatives,
    contrastive_loss,
    matching_losses,
)
from stgt.training.objective import Losses

HIDDEN = -10000.0
"""Added to the scores of positions that must not be attended to."""

Cache = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [B, positions, H] of each layer."""


def form_attention_matrices(model: STGT) -> None:
    """Make the blocks of the frame encoder compute softmax(Q K^T) as a tensor."""
    for block in model.frame_encoder.vit.blocks:
        block.attn.fused_attn = False


def plain_losses(model: STGT, frames: torch.Tensor, text: TextTokens, draw_seed: int) -> Losses:
    """Compute the losses of B distinct pairs with hard targets.

    Args:
        model: A model whose frame encoder `form_attention_matrices` has changed.
        frames: [B, T, H, W, 3] uint8.
        text: Ids and mask [B, S].
        draw_seed: Seed for drawing negatives, as in `TrainingObjective`.
    """
    qformer, count = model.qformer, len(text)
    tokens = model.ln_vision(_related_frames(model, model.encode_frames(frames)))
    queries, cache = _run(qformer, _queries(qformer, count), qformer.num_queries, None, tokens)
    embedded_text = qformer.embed_text(text.input_ids)
    text_states, _ = _run(qformer, embedded_text, 0, _bias(text.attention_mask), None)
    pairs = Pairs(
        model.project_video(queries).float(),
        F.normalize(model.text_proj(text_states[:, 0]), dim=-1).float(),
    )
    own = torch.arange(count, device=tokens.device)
    targets: Targets = "hard"
    losses = {"itc": contrastive_loss(pairs, pairs, own, model.temperature, targets)}
    with torch.no_grad():
        logits = video_text_similarity(pairs.video_embeds, pairs.text_embeds) / model.temperature
    uniform = torch.rand(2, count, generator=torch.Generator().manual_seed(draw_seed)).to(logits)
    videos = choose_hard_negatives(logits.T, uniform[0])
    texts = choose_hard_negatives(logits, uniform[1])
    matched = _match(
        model,
        torch.cat([tokens, tokens[videos], tokens]),
        TextTokens(
            torch.cat([text.input_ids, text.input_ids, text.input_ids[texts]]),
            torch.cat([text.attention_mask, text.attention_mask, text.attention_mask[texts]]),
        ),
    )
    labels = (torch.arange(3 * count, device=tokens.device) < count).long()
    losses["itm"] = matching_losses(matched, labels).mean()
    total, words = caption_loss(
        _caption_logits(model, text, cache), text.input_ids, text.attention_mask
    )
    losses["lm"] = total / words
    return losses


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend with a score matrix: [B, S, H] and twice [B, K, H] -> [B, S, H]."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if bias is not None:
        scores = scores + bias
    weights = F.dropout(scores.softmax(dim=-1), dropout, training=dropout > 0)
    return (weights @ value).transpose(1, 2).flatten(2)


def _related_frames(model: STGT, frame_tokens: torch.Tensor) -> torch.Tensor:
    """Run the graph transformer: [B, T, L, D] -> [B, M, D]."""
    graph = model.graph
    tokens = frame_tokens + graph.time_embedding(frame_tokens.shape[1])[:, None]
    tokens = tokens + graph.pos_2D_embed
    for block in graph.resblocks:
        assert isinstance(block, GraphBlock)
        tokens = block.proj_fc(tokens)
        cls_BTD, patches_BTPD = tokens[:, :, 0], tokens[:, :, 1:]
        cls_BTD = _residual_attention(block.message_attn, cls_BTD)
        cls_BTD = _residual_attention(block.message_attn, cls_BTD)
        patches_BTPD = _dense_graph(block.graphattn, patches_BTPD, block.threshold)
        tokens = torch.cat([cls_BTD[:, :, None], patches_BTPD], dim=2)
        tokens = _residual_attention(block.frame_attn, tokens.flatten(0, 1)).view_as(tokens)
    return graph.ln_post(graph.pool(tokens)) @ graph.proj


def _residual_attention(block: ResidualAttention, tokens: torch.Tensor) -> torch.Tensor:
    attention = block.attn
    normed = block.ln_1(tokens)
    assert attention.in_proj_weight is not None
    assert attention.in_proj_bias is not None
    query, key, value = (
        F.linear(normed, weight, bias)
        for weight, bias in zip(
            attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
        )
    )
    tokens = tokens + attention.out_proj(_attend(query, key, value, attention.num_heads))
    widen, _, narrow = block.mlp
    wide = widen(block.ln_2(tokens))
    return tokens + narrow(wide * torch.sigmoid(1.702 * wide))


def _dense_graph(
    layer: GraphAttention, patches_BTPD: torch.Tensor, threshold: float
) -> torch.Tensor:
    """Attend along the edges among all T*P patches of a clip: [B, T, P, D] -> [B, T, P, D]."""
    nodes = patches_BTPD.flatten(1, 2)
    count, patches = nodes.shape[1], patches_BTPD.shape[2]
    unit = F.normalize(nodes.detach(), dim=-1)
    similarity = unit @ unit.transpose(1, 2)
    frame = torch.arange(count, device=nodes.device) // patches
    itself = torch.eye(count, dtype=torch.bool, device=nodes.device)
    edge = ((frame[:, None] - frame).abs() <= 1) & ((similarity >= threshold) | itself)
    query, key, value = (
        x.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for x in (layer.W_Q(nodes), layer.W_K(nodes), layer.W_V(nodes))
    )
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    scores = (scores * similarity[:, None]).masked_fill(~edge[:, None], -math.inf)
    weights = F.dropout(scores.softmax(dim=-1), layer.dropout, training=layer.training)
    mixed = (weights @ value).transpose(1, 2).flatten(2)
    return layer.W_O(mixed).view_as(patches_BTPD)


def _queries(qformer: QFormer, count: int) -> torch.Tensor:
    return qformer.query_tokens.expand(count, -1, -1)


def _bias(mask: torch.Tensor) -> torch.Tensor:
    """Return what to add to scores, [B, 1, 1, S], for a mask [B, S] of real tokens."""
    return ((1 - mask) * HIDDEN)[:, None, None]


def _run(
    qformer: QFormer,
    states: torch.Tensor,
    num_queries: int,
    bias: torch.Tensor | None,
    video: torch.Tensor | None,
    past: Cache | None = None,
) -> tuple[torch.Tensor, Cache]:
    """Run the Q-Former over states [B, S, H], of which the first are queries.

    Returns:
        The states [B, S, H] of the last layer, and the keys and values of each layer.
    """
    states = qformer.bert.dropout(qformer.bert.layernorm(states))
    cache: Cache = []
    for index, layer in enumerate(layers_of(qformer)):
        block = layer.attention
        key, value = block.attention.key(states), block.attention.value(states)
        cache.append((key, value))
        if past is not None:
            key = torch.cat([past[index][0], key], dim=1)
            value = torch.cat([past[index][1], value], dim=1)
        dropout = block.attention.attention_dropout if qformer.training else 0.0
        heads = block.attention.num_attention_heads
        mixed = _attend(block.attention.query(states), key, value, heads, bias, dropout)
        states = block.output(mixed, states)
        parts: list[torch.Tensor] = []
        if num_queries:
            looking = states[:, :num_queries]
            if layer.has_cross_attention:
                assert video is not None
                crossing = layer.crossattention
                mixed = _attend(
                    crossing.attention.query(looking),
                    crossing.attention.key(video),
                    crossing.attention.value(video),
                    heads,
                    None,
                    dropout,
                )
                looking = crossing.output(mixed, looking)
            parts.append(layer.feed_forward_chunk_query(looking))
        if states.shape[1] > num_queries:
            parts.append(layer.feed_forward_chunk(states[:, num_queries:]))
        states = torch.cat(parts, dim=1)
    return states, cache


def _match(model: STGT, tokens: torch.Tensor, text: TextTokens) -> torch.Tensor:
    """Return match logits [N, 2] of pairs of visual tokens [N, M, D] and texts [N, S]."""
    qformer, queries = model.qformer, model.qformer.num_queries
    embedded = qformer.embed_text(text.input_ids)
    states = torch.cat([_queries(qformer, len(text)), embedded], dim=1)
    mask = torch.cat([text.attention_mask.new_ones(len(text), queries), text.attention_mask], dim=1)
    states, _ = _run(qformer, states, queries, _bias(mask), tokens)
    return model.itm_head(states[:, :queries]).mean(dim=1)


def _caption_logits(model: STGT, text: TextTokens, past: Cache) -> torch.Tensor:
    """Return next-token logits [B, S, W] of captions that attend to the cached queries."""
    qformer, length = model.qformer, text.input_ids.shape[1]
    ids = text.input_ids.clone()
    ids[:, 0] = model.config.bos_id
    causal = torch.ones(length, length, dtype=torch.int64, device=ids.device).tril()
    seen = causal * text.attention_mask[:, None]
    seen = torch.cat([seen.new_ones(*seen.shape[:2], qformer.num_queries), seen], dim=2)
    bias = ((1 - seen) * HIDDEN)[:, None]
    states, _ = _run(qformer, qformer.embed_text(ids), 0, bias, None, past)
    return qformer.caption_head(states, qformer.word_embeddings.weight)


def plain_optimizer(model: nn.Module, weight_decay: float, lr: float) -> torch.optim.AdamW:
    """Return torch's AdamW with its defaults, and weight decay for matrices only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=lr,
    )
