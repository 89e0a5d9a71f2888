"""Match scores of many pairs of videos and texts by ALPRO, with shared computation.

The scores equal those of `Alpro.match`, at a lower cost: each text is encoded once for all its
pairs, and texts are sorted by length to minimize padding.

Legend: V videos, C texts, N pairs, S text tokens, M visual tokens, D width.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from stgt.inputs.tokenizer import TextTokens
from stgt.retrieval.pair_scorer import batches_by_length


class FusionModel(Protocol):
    """What the scorer needs of `Alpro`."""

    training: bool
    itm_head: Any

    def text_states(self, text: TextTokens) -> torch.Tensor:
        """Encode texts alone; see `Alpro.text_states`."""
        ...

    def fuse_states(
        self, text_states: torch.Tensor, attention_mask: torch.Tensor, video_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Fuse text and video tokens; see `Alpro.fuse_states`."""
        ...


class AlproPairScorer:
    """Scores pairs of V videos and arbitrary texts, for inference without gradients."""

    def __init__(self, model: FusionModel, video_tokens: torch.Tensor) -> None:
        """Store the videos.

        Args:
            model: A model in eval mode.
            video_tokens: [V, M, D] float, from `encode_video`.

        Raises:
            ValueError: The model is in training mode, where dropout would differ between pairs.
        """
        if model.training:
            raise ValueError("model is in training mode; call model.eval() first")
        self._model = model
        self._videos = video_tokens

    @torch.no_grad()
    def __call__(
        self, videos: torch.Tensor, texts: torch.Tensor, text: TextTokens, batch_pairs: int = 32
    ) -> torch.Tensor:
        """Compute the match logits of pairs.

        Args:
            videos: [N] int64, the video of each pair.
            texts: [N] int64, the text of each pair.
            text: Ids and mask [C, S].
            batch_pairs: Number of pairs computed at a time.

        Returns:
            [N, 2] float logits, in the order of the pairs; index 1 = match.
        """
        device = text.input_ids.device
        if len(videos) == 0:
            return torch.empty(0, 2, device=device)
        all_texts = torch.arange(len(text), device=device)
        states = torch.cat(
            [self._model.text_states(text.select(rows)) for rows in all_texts.split(batch_pairs)]
        )
        logits = torch.empty(len(texts), 2, device=device)
        for rows, longest in batches_by_length(texts, text, batch_pairs):
            fused = self._model.fuse_states(
                states[texts[rows], :longest],
                text.attention_mask[texts[rows], :longest],
                self._videos[videos[rows]],
            )
            logits[rows] = self._model.itm_head(fused).float()
        return logits
