"""Match scores of many pairs of videos and texts, with shared computation.

The scores equal those of `STGT.match`, at a lower cost: a video's cross-attention keys and values
are computed once for all its pairs, texts are sorted by length to minimize padding, and the last
layer skips text positions, whose outputs are unused.

Legend: V videos, C texts, N pairs, Q query tokens, S text tokens, M visual tokens, D vision width,
H Q-Former width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from stgt.inputs.tokenizer import TextTokens
from stgt.network.qformer import QFormer
from stgt.network.qformer_steps import (
    KeysValues,
    attend,
    embed,
    feed_forward_query,
    feed_forward_text,
    keys_values,
    layers_of,
    video_keys_values,
)


class MatchingModel(Protocol):
    """The parts of STGT that score pairs."""

    qformer: QFormer
    itm_head: torch.nn.Linear
    training: bool


def batches_by_length(
    texts: torch.Tensor, text: TextTokens, batch_pairs: int
) -> Iterator[tuple[torch.Tensor, int]]:
    """Divide pairs into batches of texts of similar lengths, which need little padding.

    Args:
        texts: [N] int64, the text of each pair.
        text: Ids and mask [C, S].
        batch_pairs: Maximum number of pairs in a batch.

    Yields:
        The rows of a batch [n] int64, and the length of its longest text, in tokens.
    """
    # Lengths up to the last real token, whether padding is on the left or the right.
    places = torch.arange(1, text.attention_mask.shape[1] + 1, device=text.input_ids.device)
    lengths = (text.attention_mask.bool() * places).amax(dim=1)
    order = torch.argsort(lengths[texts] * len(lengths) + texts, stable=True)
    for rows in order.split(batch_pairs):
        yield rows, int(lengths[texts[rows]].max())


class PairScorer:
    """Scores pairs of V videos and arbitrary texts, for inference without gradients."""

    @torch.no_grad()
    def __init__(self, model: MatchingModel, video_tokens: torch.Tensor) -> None:
        """Compute the keys and values that all pairs of a video share.

        Args:
            model: A model in eval mode.
            video_tokens: [V, M, D] float, from `encode_video`.

        Raises:
            ValueError: The model is in training mode, where dropout would differ between pairs.
        """
        if model.training:
            raise ValueError("model is in training mode; call model.eval() first")
        self._model = model
        self._videos = video_keys_values(model.qformer, video_tokens)

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
        logits = torch.empty(len(texts), 2, device=device)
        for rows, longest in batches_by_length(texts, text, batch_pairs):
            logits[rows] = self._batch(
                videos[rows],
                text.input_ids[texts[rows], :longest],
                text.attention_mask[texts[rows], :longest].bool(),
            ).float()
        return logits

    def _batch(
        self, videos: torch.Tensor, input_ids: torch.Tensor, real: torch.Tensor
    ) -> torch.Tensor:
        """Compute match logits [N, 2] for texts padded to the longest in the batch."""
        qformer = self._model.qformer
        count, queries = len(videos), qformer.num_queries
        states = embed(
            qformer,
            torch.cat(
                [qformer.query_tokens.expand(count, -1, -1), qformer.embed_text(input_ids)], dim=1
            ),
        )
        mask = None
        if not real.all():
            mask = torch.cat([real.new_ones(count, queries), real], dim=1)[:, None, None, :]
        layers = layers_of(qformer)
        for index, layer in enumerate(layers):
            seen = keys_values(layer.attention, states)
            last = index == len(layers) - 1
            looking = states[:, :queries] if last else states
            states = attend(layer.attention, looking, seen, mask)
            query_states = states[:, :queries]
            video: KeysValues | None = self._videos[index]
            if video is not None:
                query_states = attend(layer.crossattention, query_states, video.rows(videos))
            query_states = feed_forward_query(layer, query_states)
            if last:
                states = query_states
            else:
                text_states = feed_forward_text(layer, states[:, queries:])
                states = torch.cat([query_states, text_states], dim=1)
        return self._model.itm_head(states).mean(dim=1)
