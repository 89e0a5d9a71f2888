"""What a video-text model offers to the code that stores it, and how it returns encoded videos.

`STGT` is this project's model. Code that saves or loads a model depends on this module and not on
the network.

Legend: B videos, N texts, M visual tokens, Q query tokens, D vision width, E shared embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
