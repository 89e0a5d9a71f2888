"""The spatio-temporal graph transformer, in which similar patches of adjacent frames interact.

Legend: B videos, T frames, G patches along each edge, P = G*G patches per frame, L = 1 + P tokens
per frame, D width, M visual tokens = T*(1 + 2G), or L if T is 1.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from stgt.compilation import compile_each
from stgt.config import GraphConfig
from stgt.network.graph_attention import GraphAttention, edges, patch_similarity

LAYER_NORM_EPS = 1e-5
TIME_EMBED_STD = 0.6
"""Initial scale of the time embedding, close to that of the position table (0.7). The published
D**-0.5 is small in comparison: after 200 steps on the quickstart's clips R@1 was 20 % with it, and
31 % with this value."""


QUICK_GELU_SLOPE = 1.702


class QuickGELU(nn.Module):
    """The activation x * sigmoid(1.702 x) of the CLIP models."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the activation elementwise."""
        # silu(y) = y * sigmoid(y). As a fused operation it stores one tensor for the backward pass
        # instead of two.
        return F.silu(QUICK_GELU_SLOPE * x) * (1 / QUICK_GELU_SLOPE)


class ResidualAttention(nn.Module):
    """Pre-norm self-attention and a QuickGELU MLP (ratio 4), each with a residual connection."""

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
        """Attend within each sequence of tokens: [N, L, D] float -> [N, L, D] float."""
        normed = self.ln_1(tokens)
        tokens = tokens + self.attn(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(self.ln_2(tokens))


class GraphBlock(nn.Module):
    """Attention among CLS tokens, then along the patch graph, then within each frame."""

    def __init__(self, width: int, config: GraphConfig) -> None:
        super().__init__()
        self.threshold = config.similarity_threshold
        self.proj_fc = nn.Linear(width, width)
        self.message_attn = ResidualAttention(width, config.heads)
        self.graphattn = GraphAttention(width, config.heads, config.attention_dropout)
        self.frame_attn = ResidualAttention(width, config.heads)

    def compile_parts(self) -> None:
        """Compile what the block consists of with torch.compile."""
        compile_each((self.message_attn, self.frame_attn))
        self.graphattn.compiled = True

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run the block: [B, T, L, D] float -> [B, T, L, D] float."""
        tokens = self.proj_fc(tokens)
        cls_BTD, patches_BTPD = tokens[:, :, 0], tokens[:, :, 1:]
        # The published model applies this block twice with the same weights.
        cls_BTD = self.message_attn(self.message_attn(cls_BTD))
        similarity = patch_similarity(patches_BTPD.detach())
        patches_BTPD = self.graphattn(patches_BTPD, similarity, edges(similarity, self.threshold))
        tokens = torch.cat([cls_BTD[:, :, None], patches_BTPD], dim=2)
        return self.frame_attn(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])


def sine_cosine_table(grid: int, width: int) -> torch.Tensor:
    """Compute the 2D sine-cosine position table of a grid of patches.

    Returns:
        [1 + grid*grid, width] float: a zero row for CLS, then one row per patch with a quarter of
        the width each for sin(y), cos(y), sin(x) and cos(x).
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
    """Turns the frame tokens of a clip into spatio-temporal visual tokens for cross-attention."""

    def __init__(self, width: int, grid: int, num_frames: int, config: GraphConfig) -> None:
        super().__init__()
        self.grid = grid
        self.gradient_checkpointing = False
        self.time_embed = nn.Parameter(torch.randn(num_frames, width) * TIME_EMBED_STD)
        # A fixed table: the published code neither trains nor saves it.
        self.pos_2D_embed = nn.Buffer(sine_cosine_table(grid, width))
        self.resblocks = nn.ModuleList([GraphBlock(width, config) for _ in range(config.layers)])
        self.ln_post = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.proj = nn.Parameter(torch.randn(width, width) * width**-0.5)

    def compile_blocks(self) -> None:
        """Compile what the blocks consist of with torch.compile."""
        for block in self.resblocks:
            assert isinstance(block, GraphBlock)
            block.compile_parts()

    def time_embedding(self, frames: int) -> torch.Tensor:
        """Return the time embedding [T, D] float, resized by nearest neighbor for other lengths."""
        if frames == self.time_embed.shape[0]:
            return self.time_embed
        resized = F.interpolate(self.time_embed.T[None], size=frames, mode="nearest")
        return resized[0].T

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """Keep CLS and max-pool the patches' rows and columns: [B, T, L, D] -> [B, M, D] float."""
        cls_BT1D, patches_BTPD = tokens[:, :, :1], tokens[:, :, 1:]
        grid_BTGGD = patches_BTPD.unflatten(2, (self.grid, self.grid))
        pooled = torch.cat([cls_BT1D, grid_BTGGD.amax(dim=2), grid_BTGGD.amax(dim=3)], dim=2)
        return pooled.flatten(1, 2)

    def forward(self, frame_tokens: torch.Tensor) -> torch.Tensor:
        """Run the graph blocks and pool their output.

        Args:
            frame_tokens: [B, T, L, D] float, from the frame encoder.

        Returns:
            [B, M, D] float; M = T*(1 + 2G), or L for a single frame.
        """
        frames = frame_tokens.shape[1]
        tokens = frame_tokens + self.time_embedding(frames)[:, None] + self.pos_2D_embed
        for block in self.resblocks:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        pooled = tokens[:, 0] if frames == 1 else self.pool(tokens)
        return self.ln_post(pooled) @ self.proj
