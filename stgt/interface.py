"""Protocols that a video-text model implements for training, evaluation and storage.

A model encodes videos and texts into one embedding space and, optionally, scores pairs. `STGT` is
this project's model. Code that only stores, loads or scores a model depends on this module and not
on the network.

Legend: B videos, N texts, M visual tokens, Q query tokens, D vision width, E shared embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

from stgt.config import ModelConfig
from stgt.inputs.tokenizer import TextTokens, Tokenizer
from stgt.network.similarity import video_text_similarity

Texts: TypeAlias = Sequence[str] | TextTokens
"""N texts, as strings or as tokens [N, S]."""


@dataclass(frozen=True)
class VideoEncoding:
    """The encodings of B videos."""

    tokens: torch.Tensor
    """[B, M, D] float: visual tokens, the input to cross-attention."""
    embeds: torch.Tensor
    """[B, Q, E] float: unit-length embeddings of the query tokens, for cosine similarity."""

    def similarity(self, text_embeds: torch.Tensor) -> torch.Tensor:
        """Return [B, N] float32: cosine of each video's best query token with texts [N, E]."""
        return video_text_similarity(self.embeds, text_embeds)


class FrozenEncoder(Protocol):
    """A frame encoder with tensors that training may leave frozen."""

    missing: bool
    """True if the frozen tensors were not loaded, so the model cannot encode videos."""
    fingerprint: str | None
    """Hash of the frozen tensors; None until it has been computed."""

    def frozen_names(self) -> set[str]:
        """Return the names of the frozen tensors."""
        ...


class StorableModel(Protocol):
    """A model that `stgt.model_folder` can save and load."""

    config: ModelConfig
    tokenizer: Tokenizer | None

    @property
    def frame_encoder(self) -> Any:
        """The frame encoder, a `FrozenEncoder`."""
        ...

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        """Return all tensors by name, like `torch.nn.Module.state_dict`."""
        ...


class VideoTextModel(StorableModel, Protocol):
    """A model that can be trained and evaluated for retrieval."""

    def encode_video(self, frames: torch.Tensor) -> VideoEncoding:
        """Encode frames [B, T, 3, H, W] float, normalized, or [B, T, H, W, 3] uint8."""
        ...

    def encode_text(self, texts: Texts) -> torch.Tensor:
        """Encode N texts as [N, E] float, unit length."""
        ...

    def match(self, videos: VideoEncoding | torch.Tensor, texts: Texts) -> torch.Tensor:
        """Score pairs of videos and texts as logits [N, 2] float; index 1 means a match."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Return all parameters, like `torch.nn.Module.parameters`."""
        ...
