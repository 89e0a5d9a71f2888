"""The spatio-temporal graph transformer: patches of neighbouring frames exchange what they share.

Legend: B videos, T frames, G patches along an edge, P = G*G patches per frame, L = 1 + P tokens
per frame, D width, A heads, d = D / A, M visual tokens = T*(1 + 2G) (L when T is 1), K = 3P
patches of the previous, same and next frame.

The graph of a video has its T*P patches as nodes. Two of them share an edge when their frames are
at most one apart and their cosine similarity reaches a threshold, so a patch never needs a score
beyond the three frames around it: all that is dense here is [P, 3P] a frame, not [TP, TP].
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from stgt.config import GraphConfig

LAYER_NORM_EPS = 1e-5
TIME_EMBED_STD = 0.6
"""Initial scale of the time embedding: near that of the position table (0.7). The published
D**-0.5 hardly shows beside it: 200 steps on the quickstart's clips gave 31 % R@1 against 20 %."""


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of the CLIP family."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the activation elementwise."""
        return x * torch.sigmoid(1.702 * x)


class ResidualAttention(nn.Module):
    """Pre-norm self-attention and QuickGELU MLP (ratio 4), each with a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=QuickGELU(),
                c_proj=nn.Linear(4 * width, width),
            )
        )
        self.ln_2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [N, L, D] float -> [N, L, D] float."""
        normed = self.ln_1(tokens)
        tokens = tokens + self.attn(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(self.ln_2(tokens))


def temporal_window(x_BTPC: torch.Tensor) -> torch.Tensor:
    """The patches of the previous, same and next frame beside each frame: [B,T,P,C] -> [B,T,3P,C].

    Beyond the first and last frame the window holds zeros, which `edges` rules out.
    """
    padded = F.pad(x_BTPC, (0, 0, 0, 0, 1, 1))
    frames = x_BTPC.shape[1]
    return torch.cat([padded[:, i : i + frames] for i in range(3)], dim=2)


def patch_similarity(patches_BTPD: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of each patch with those of its temporal window.

    Args:
        patches_BTPD: [B, T, P, D] float.

    Returns:
        [B, T, P, 3P] float in [-1, 1]; zero beyond the first and last frame.
    """
    unit_BTPD = F.normalize(patches_BTPD, dim=-1)
    return unit_BTPD @ temporal_window(unit_BTPD).transpose(-1, -2)


def edges(similarity_BTPK: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which pairs share an edge: inside the clip and similar enough; a patch always with itself.

    The self-edge is stated because rounding can put a patch's similarity with itself below a
    threshold of 1, and a node without any edge has no softmax.

    Args:
        similarity_BTPK: [B, T, P, 3P] float, from `patch_similarity`.
        threshold: least similarity of an edge.

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


class GraphAttention(nn.Module):
    """Multi-head attention along the edges of the patch graph, scores weighted by similarity."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.W_Q = nn.Linear(width, width)
        self.W_K = nn.Linear(width, width)
        self.W_V = nn.Linear(width, width)
        self.W_O = nn.Linear(width, width)

    def forward(
        self, patches: torch.Tensor, similarity: torch.Tensor, edge: torch.Tensor
    ) -> torch.Tensor:
        """Softmax over edges of (Q K^T / sqrt(d)) * similarity, applied to V.

        Args:
            patches: [B, T, P, D] float.
            similarity: [B, T, P, 3P] float, constant (no gradient).
            edge: [B, T, P, 3P] bool, True = may attend.

        Returns:
            [B, T, P, D] float.
        """
        batch, frames, count, width = patches.shape
        head_width = width // self.heads

        def split_heads(x_BTKD: torch.Tensor) -> torch.Tensor:
            # [B, T, K, D] -> [B, T, A, K, d]
            return x_BTKD.unflatten(-1, (self.heads, head_width)).transpose(2, 3)

        query = split_heads(self.W_Q(patches))
        key = split_heads(temporal_window(self.W_K(patches)))
        value = split_heads(temporal_window(self.W_V(patches)))
        scores_BTAPK = query @ key.transpose(-1, -2) / math.sqrt(head_width)
        scores_BTAPK = scores_BTAPK * similarity[:, :, None]
        scores_BTAPK = scores_BTAPK.masked_fill(~edge[:, :, None], -math.inf)
        weights = F.dropout(scores_BTAPK.softmax(dim=-1), self.dropout, self.training)
        # [B, T, A, P, d] -> [B, T, P, D]
        mixed = (weights @ value).transpose(2, 3).reshape(batch, frames, count, width)
        return self.W_O(mixed)


class GraphBlock(nn.Module):
    """One block: CLS tokens exchange messages, patches follow the graph, frames attend within."""

    def __init__(self, width: int, config: GraphConfig) -> None:
        super().__init__()
        self.threshold = config.similarity_threshold
        self.proj_fc = nn.Linear(width, width)
        self.message_attn = ResidualAttention(width, config.heads)
        self.graphattn = GraphAttention(width, config.heads, config.attention_dropout)
        self.frame_attn = ResidualAttention(width, config.heads)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [B, T, L, D] float -> [B, T, L, D] float."""
        tokens = self.proj_fc(tokens)
        cls_BTD, patches_BTPD = tokens[:, :, 0], tokens[:, :, 1:]
        # The published model runs this block twice with the same weights.
        cls_BTD = self.message_attn(self.message_attn(cls_BTD))
        similarity = patch_similarity(patches_BTPD.detach())
        patches_BTPD = self.graphattn(patches_BTPD, similarity, edges(similarity, self.threshold))
        tokens = torch.cat([cls_BTD[:, :, None], patches_BTPD], dim=2)
        return self.frame_attn(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])


def sine_cosine_table(grid: int, width: int) -> torch.Tensor:
    """Two-dimensional sine-cosine position table of a grid of patches, a zero row for CLS first.

    Returns:
        [1 + grid*grid, width] float; a quarter of the width each for sin(y), cos(y), sin(x),
        cos(x).
    """
    quarter = width // 4
    frequency = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / max(quarter, 1))
    position = torch.arange(grid, dtype=torch.float64)
    angle = position[:, None] * frequency
    row = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows = row[:, None].expand(grid, grid, 2 * quarter)
    columns = row[None, :].expand(grid, grid, 2 * quarter)
    table = torch.zeros(1 + grid * grid, width)
    table[1:, : 4 * quarter] = torch.cat([rows, columns], dim=2).flatten(0, 1).float()
    return table


class GraphTransformer(nn.Module):
    """Frame tokens of a clip -> visual tokens that carry its motion, for cross-attention."""

    def __init__(self, width: int, grid: int, num_frames: int, config: GraphConfig) -> None:
        super().__init__()
        self.grid = grid
        self.time_embed = nn.Parameter(torch.randn(num_frames, width) * TIME_EMBED_STD)
        # A fixed table; the published code never trains it, nor saves it.
        self.pos_2D_embed = nn.Buffer(sine_cosine_table(grid, width))
        self.resblocks = nn.ModuleList([GraphBlock(width, config) for _ in range(config.layers)])
        self.ln_post = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.proj = nn.Parameter(torch.randn(width, width) * width**-0.5)

    def time_embedding(self, frames: int) -> torch.Tensor:
        """[T, D] float: the learned time embedding, by nearest neighbour for other clip lengths."""
        if frames == self.time_embed.shape[0]:
            return self.time_embed
        resized = F.interpolate(self.time_embed.T[None], size=frames, mode="nearest")
        return resized[0].T

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """CLS and the maxima along rows and columns of each frame: [B, T, L, D] -> [B, M, D]."""
        cls_BT1D, patches_BTPD = tokens[:, :, :1], tokens[:, :, 1:]
        grid_BTGGD = patches_BTPD.unflatten(2, (self.grid, self.grid))
        pooled = torch.cat([cls_BT1D, grid_BTGGD.amax(dim=2), grid_BTGGD.amax(dim=3)], dim=2)
        return pooled.flatten(1, 2)

    def forward(self, frame_tokens: torch.Tensor) -> torch.Tensor:
        """Run the graph blocks and pool.

        Args:
            frame_tokens: [B, T, L, D] float, from the frame encoder.

        Returns:
            [B, M, D] float: M = T*(1 + 2G), or L for a single frame.
        """
        frames = frame_tokens.shape[1]
        tokens = frame_tokens + self.time_embedding(frames)[:, None] + self.pos_2D_embed
        for block in self.resblocks:
            tokens = block(tokens)
        pooled = tokens[:, 0] if frames == 1 else self.pool(tokens)
        return self.ln_post(pooled) @ self.proj
