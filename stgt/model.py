"""STGT: frames -> frame tokens -> graph transformer -> Q-Former, with no losses in it.

Paper: Video-Language Alignment via Spatio-Temporal Graph Transformer.

Legend: B videos, N texts or pairs, T frames, D vision width, M visual tokens, Q query tokens,
H Q-Former width, E shared embedding, S text tokens, W words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from stgt.config import ModelConfig
from stgt.graph import GraphTransformer
from stgt.qformer import QFormer
from stgt.text import TextTokens
from stgt.vision import FrameEncoder

LN_VISION_EPS = 1e-5


@dataclass(frozen=True)
class VideoEncoding:
    """What the model knows of B videos."""

    tokens: torch.Tensor
    """[B, M, D] float: visual tokens, what cross-attention reads."""
    embeds: torch.Tensor
    """[B, Q, E] float: unit-length embeddings of the query tokens, for cosine similarity."""


class STGT(nn.Module):
    """The video-language model. Weights are random until a checkpoint is loaded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.vision.width
        self.frame_encoder = FrameEncoder(config.vision)
        self.graph = GraphTransformer(width, config.vision.grid, config.num_frames, config.graph)
        self.ln_vision = nn.LayerNorm(width, eps=LN_VISION_EPS)
        self.qformer = QFormer(config)
        self.video_proj = nn.Linear(config.qformer.width, config.embed_dim)
        self.text_proj = nn.Linear(config.qformer.width, config.embed_dim)
        self.itm_head = nn.Linear(config.qformer.width, 2)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))

    def video_tokens(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames to visual tokens.

        Args:
            frames: [B, T, 3, H, W] float, normalized.

        Returns:
            [B, M, D] float.

        Raises:
            ValueError: the shape or dtype is not that of normalized frames of this model's size.
        """
        size = self.config.vision.image_size
        if frames.ndim != 5 or frames.shape[2:] != (3, size, size):
            raise ValueError(
                f"frames: expected [B, T, 3, {size}, {size}], got {list(frames.shape)}"
            )
        if not frames.is_floating_point():
            raise ValueError(f"frames: expected normalized float, got {frames.dtype}")
        frame_tokens = self.frame_encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return self.ln_vision(self.graph(frame_tokens))

    def project_video(self, query_states: torch.Tensor) -> torch.Tensor:
        """Query states [B, Q, H] -> unit-length embeddings [B, Q, E]."""
        return F.normalize(self.video_proj(query_states), dim=-1)

    def encode_video(self, frames: torch.Tensor) -> VideoEncoding:
        """Encode clips for retrieval.

        Args:
            frames: [B, T, 3, H, W] float, normalized; T = 1 for images.

        Returns:
            Visual tokens [B, M, D] and embeddings [B, Q, E].
        """
        tokens = self.video_tokens(frames)
        return VideoEncoding(
            tokens=tokens, embeds=self.project_video(self.qformer.encode_queries(tokens))
        )

    def encode_text(self, text: TextTokens) -> torch.Tensor:
        """Encode captions for retrieval.

        Args:
            text: ids and mask [N, S].

        Returns:
            [N, E] float, unit length, from the first token of each text.
        """
        states = self.qformer.encode_text(text.input_ids, text.attention_mask)
        return F.normalize(self.text_proj(states[:, 0]), dim=-1)

    def match(self, video_tokens: torch.Tensor, text: TextTokens) -> torch.Tensor:
        """Score pairs: does text n describe video n?

        Args:
            video_tokens: [N, M, D] float, from `encode_video`.
            text: ids and mask [N, S].

        Returns:
            [N, 2] float logits, mean over the queries; index 1 = they match.
        """
        states = self.qformer.encode_pairs(video_tokens, text.input_ids, text.attention_mask)
        return self.itm_head(states).mean(dim=1)

    def caption_logits(
        self, video_tokens: torch.Tensor, text: TextTokens
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Next-token logits of captions given their videos, and the videos' query states.

        The first token of each text is replaced by the captioning start token.

        Args:
            video_tokens: [N, M, D] float.
            text: ids and mask [N, S].

        Returns:
            Query states [N, Q, H] float (those of the queries alone) and logits [N, S, W] float.
        """
        input_ids = text.input_ids.clone()
        input_ids[:, 0] = self.config.bos_id
        return self.qformer.encode_causal(video_tokens, input_ids, text.attention_mask)
