"""What every video-text model offers to training, evaluation and storage.

A model encodes videos and texts into one embedding space and, optionally, scores pairs. `STGT` is
the model of this project. Code that only stores, loads or scores a model depends on this module
and not on the model's network.

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
    """[B, M, D] float: visual tokens, which cross-attention reads."""
    embeds: torch.Tensor
    """[B, Q, E] float: unit-length embeddings of the query tokens, for cosine similarity."""

    def similarity(self, text_embeds: torch.Tensor) -> torch.Tensor:
        """Cosine of each video's best query token with texts [N, E], as [B, N]."""
        return video_text_similarity(self.embeds, text_embeds)


class FrozenEncoder(Protocol):
    """A frame encoder, some of whose tensors training never changes."""

    missing: bool
    """The frozen tensors have not been loaded; the model cannot encode videos."""
    fingerprint: str | None
    """Hash of the frozen tensors; None until it has been computed."""

    def frozen_names(self) -> set[str]:
        """Names of the tensors that training never changes."""
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
        """All tensors by name, as `torch.nn.Module.state_dict`."""
        ...


class VideoTextModel(StorableModel, Protocol):
    """A model that retrieval can train and evaluate."""

    def encode_video(self, frames: torch.Tensor) -> VideoEncoding:
        """Encode frames [B, T, 3, H, W] float, normalized, or [B, T, H, W, 3] uint8."""
        ...

    def encode_text(self, texts: Texts) -> torch.Tensor:
        """Encode N texts as [N, E] float, unit length."""
        ...

    def match(self, videos: VideoEncoding | torch.Tensor, texts: Texts) -> torch.Tensor:
        """Score pairs of videos and texts: logits [N, 2], index 1 means that they match."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """All parameters, as `torch.nn.Module.parameters`."""
        ...
