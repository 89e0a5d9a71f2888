"""The querying transformer (Q-Former) with its three attention masks, and the caption head.

Built on `Blip2QFormerModel` of transformers (BLIP-2, Li et al. 2023). Queries and texts share
self-attention layers and have separate feed-forward layers. Only queries cross-attend to the video.

Legend: B videos, N texts or pairs, Q query tokens, S text tokens, M visual tokens, H width, W
words.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from stgt.compilation import BlockGroup, compiled_groups
from stgt.config import ModelConfig

QUERY_INIT_STD = 0.5
"""Large enough for queries to differ from the start. The first layer normalizes their scale."""
WORD_INIT_STD = 0.02
"""Word embeddings are tied to the caption head. A larger value would make its initial predictions
overconfident."""


class CaptionHead(nn.Module):
    """BERT's language-modeling head: dense, GELU, norm, and logits from tied word embeddings."""

    def __init__(self, width: int, vocab_size: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, states: torch.Tensor, word_embeddings: torch.Tensor) -> torch.Tensor:
        """Map states [N, S, H] and word embeddings [W, H], float, to logits [N, S, W] float."""
        states = self.norm(nn.functional.gelu(self.dense(states)))
        return nn.functional.linear(states, word_embeddings, self.bias)


class QFormer(nn.Module):
    """Transformers' Q-Former with learned queries and word embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes = config.qformer
        self.bert = Blip2QFormerModel(
            Blip2QFormerConfig(
                vocab_size=config.vocab_size,
                hidden_size=sizes.width,
                num_hidden_layers=sizes.layers,
                num_attention_heads=sizes.heads,
                intermediate_size=sizes.mlp_width,
                hidden_dropout_prob=sizes.dropout,
                attention_probs_dropout_prob=sizes.dropout,
                max_position_embeddings=sizes.max_position,
                cross_attention_frequency=sizes.cross_attention_every,
                encoder_hidden_size=config.vision.width,
                initializer_range=sizes.init_std,
                use_qformer_text_input=True,
                attn_implementation="sdpa",  # type: ignore[call-arg]
            )
        )
        self._groups: list[BlockGroup] = []
        """The layers in groups, if they are compiled."""
        self.query_tokens = nn.Parameter(
            torch.randn(1, sizes.query_tokens, sizes.width) * QUERY_INIT_STD
        )
        self.word_embeddings = nn.Embedding(
            config.vocab_size, sizes.width, padding_idx=config.pad_id
        )
        self.position_embeddings = nn.Embedding(sizes.max_position, sizes.width)
        for table in (self.word_embeddings, self.position_embeddings):
            nn.init.normal_(table.weight, std=WORD_INIT_STD)
        self.caption_head = CaptionHead(
            sizes.width, config.vocab_size, self.bert.config.layer_norm_eps
        )

    @property
    def num_queries(self) -> int:
        """Number Q of learned queries."""
        return self.query_tokens.shape[1]

    def embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Add word and position embeddings: [N, S] int64 -> [N, S, H] float."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.word_embeddings(input_ids) + self.position_embeddings(positions)

    def _queries(self, batch: int) -> torch.Tensor:
        return self.query_tokens.expand(batch, -1, -1)

    def compile_layers(self) -> None:
        """Compile the layers with torch.compile."""
        self._groups = compiled_groups(list(self.bert.encoder.layer))

    def _run(
        self,
        embeddings: torch.Tensor,
        num_queries: int,
        may_attend: torch.Tensor | None,
        video_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run the layers over queries and text: [N, S, H] float -> [N, S, H] float.

        Args:
            embeddings: [N, S, H] float, of which the first are queries.
            num_queries: Number of queries among them.
            may_attend: [N, 1, S, S] bool; None if every position attends to all.
            video_tokens: [N, M, D] float, for queries to attend to.
        """
        if not self._groups:
            return self.bert(
                query_embeds=embeddings,
                query_length=num_queries,
                attention_mask=may_attend,
                encoder_hidden_states=video_tokens,
            ).last_hidden_state
        # What transformers does around its loop over the layers.
        states = self.bert.dropout(self.bert.layernorm(embeddings))
        for group in self._groups:
            states = group(states, may_attend, video_tokens, query_length=num_queries)
        return states

    def encode_queries(self, video_tokens: torch.Tensor) -> torch.Tensor:
        """Encode videos by queries alone: [B, M, D] float -> query states [B, Q, H] float."""
        return self._run(self._queries(video_tokens.shape[0]), self.num_queries, None, video_tokens)

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Encode texts alone, with bidirectional attention.

        Args:
            input_ids: [N, S] int64.
            attention_mask: [N, S] int64 or bool, 1 = real token.

        Returns:
            [N, S, H] float; values at padded positions are undefined.
        """
        return self._run(self.embed_text(input_ids), 0, _may_attend(attention_mask), None)

    def encode_pairs(
        self, video_tokens: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Encode queries and text jointly, attending to each other, for matching.

        Args:
            video_tokens: [N, M, D] float.
            input_ids: [N, S] int64.
            attention_mask: [N, S] int64, 1 = real token.

        Returns:
            Query states [N, Q, H] float.
        """
        count = input_ids.shape[0]
        seen = torch.cat([attention_mask.new_ones(count, self.num_queries), attention_mask], dim=1)
        states = self._run(
            torch.cat([self._queries(count), self.embed_text(input_ids)], dim=1),
            self.num_queries,
            _may_attend(seen),
            video_tokens,
        )
        return states[:, : self.num_queries]

    def encode_causal(
        self, video_tokens: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode for captioning: text tokens attend to all queries and to earlier text.

        Queries attend only to queries, so the query states equal those of `encode_queries`, and one
        pass serves both the contrastive and the caption loss.

        Args:
            video_tokens: [N, M, D] float.
            input_ids: [N, S] int64, starting with the captioning start token.
            attention_mask: [N, S] int64, 1 = real token.

        Returns:
            Query states [N, Q, H] float and next-token logits [N, S, W] float.
        """
        count, length = input_ids.shape
        queries = self.num_queries
        total = queries + length
        # may_attend[n, i, j]: True = position i may attend to position j
        may_attend = torch.zeros(count, total, total, dtype=torch.bool, device=input_ids.device)
        may_attend[:, :, :queries] = True
        causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        may_attend[:, queries:, queries:] = causal & attention_mask.bool()[:, None, :]
        states = self._run(
            torch.cat([self._queries(count), self.embed_text(input_ids)], dim=1),
            queries,
            may_attend[:, None],
            video_tokens,
        )
        logits = self.caption_head(states[:, queries:], self.word_embeddings.weight)
        return states[:, :queries], logits


def _may_attend(mask: torch.Tensor) -> torch.Tensor:
    """Return which positions each may attend to, [N, 1, S, S] bool, for real positions [N, S].

    With a mask [N, S], transformers asks the device whether all positions are real, and a GPU would
    have to finish the whole forward pass so far before it answers.
    """
    return mask.bool()[:, None, None, :].expand(-1, -1, mask.shape[1], -1)
