"""Caption generation: transformers' beam search and nucleus sampling over the Q-Former.

Queries do not attend to the text in captioning, so a video's query states are the same for every
word. Their keys and values are computed once (`query_keys_values`), and only text positions run
through the layers afterwards.

Legend: V videos, N texts (V times the beams), Q query tokens, S text tokens, A heads, d head width,
W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_outputs import CausalLMOutput

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


def query_keys_values(qformer: QFormer, video_tokens: torch.Tensor) -> torch.Tensor:
    """Compute the keys and values of V videos' query states, to which text positions attend.

    Args:
        qformer: A Q-Former in eval mode.
        video_tokens: [V, M, D] float.

    Returns:
        [V, layers, 2, A, Q, d] float: keys and values of each layer.
    """
    video = video_keys_values(qformer, video_tokens)
    states = embed(qformer, qformer.query_tokens.expand(len(video_tokens), -1, -1))
    kept = []
    for layer, crossing in zip(layers_of(qformer), video, strict=True):
        own = keys_values(layer.attention, states)
        kept.append(torch.stack([own.keys, own.values], dim=1))
        states = attend(layer.attention, states, own)
        if crossing is not None:
            states = attend(layer.crossattention, states, crossing)
        states = feed_forward_query(layer, states)
    return torch.stack(kept, dim=1)


def next_word_logits(
    qformer: QFormer, input_ids: torch.Tensor, queries: torch.Tensor
) -> torch.Tensor:
    """Compute the logits of the next word of each text. All texts have the same length.

    Args:
        qformer: A Q-Former in eval mode.
        input_ids: [N, S] int64, starting with the captioning start token.
        queries: [N, layers, 2, A, Q, d] float, from `query_keys_values`.

    Returns:
        [N, W] float.
    """
    length, seen_queries = input_ids.shape[1], queries.shape[4]
    mask = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
    mask = torch.cat([mask.new_ones(length, seen_queries), mask], dim=1)
    states = embed(qformer, qformer.embed_text(input_ids))
    for index, layer in enumerate(layers_of(qformer)):
        cached = KeysValues(queries[:, index, 0], queries[:, index, 1])
        seen = cached.followed_by(keys_values(layer.attention, states))
        states = feed_forward_text(layer, attend(layer.attention, states, seen, mask))
    return qformer.caption_head(states[:, -1], qformer.word_embeddings.weight)


class CaptionWriter(PreTrainedModel, GenerationMixin):
    """Adapter that lets transformers' `generate` run the Q-Former."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, qformer: QFormer, bos_id: int, eos_id: int, pad_id: int) -> None:
        super().__init__(
            PretrainedConfig.from_dict(
                {
                    "vocab_size": qformer.word_embeddings.num_embeddings,
                    "num_hidden_layers": len(layers_of(qformer)),
                }
            )
        )
        self.qformer = qformer
        self.generation_config = GenerationConfig(
            bos_token_id=bos_id, eos_token_id=eos_id, pad_token_id=pad_id, use_cache=False
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        queries: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **unused: Any,
    ) -> dict[str, Any]:
        """Pass the whole text at every step: captions are short and padded only at their end."""
        return {"input_ids": input_ids, "queries": queries}

    def forward(
        self, input_ids: torch.Tensor, queries: torch.Tensor, **unused: Any
    ) -> CausalLMOutput:
        """Return next-word logits: [N, S] int64 and [N, layers, 2, A, Q, d] -> [N, 1, W] float."""
        return CausalLMOutput(logits=next_word_logits(self.qformer, input_ids, queries)[:, None])


class SeededDraws(LogitsProcessor):
    """Makes greedy search sample, with a random generator for each text.

    The largest of log-probabilities to which independent Gumbel noise was added is a sample of the
    distribution (Maddison, Tarlow and Minka 2014, "A* sampling", section 2). transformers draws the
    words of all texts of a batch from one generator, so they would depend on the batch.
    """

    def __init__(self, seeds: Sequence[tuple[int, ...]]) -> None:
        """Create the generators.

        Args:
            seeds: N seeds, one for each text.
        """
        self._generators = [np.random.default_rng(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Add noise to the logits [N, W] float of the texts' next words."""
        words = scores.shape[1]
        noise = np.stack([one.gumbel(size=words) for one in self._generators])
        return scores + torch.from_numpy(noise).to(scores)  # type: ignore[return-value]


@torch.no_grad()
def write_captions(
    qformer: QFormer,
    video_tokens: torch.Tensor,
    bos_id: int,
    eos_id: int,
    pad_id: int,
    max_tokens: int,
    min_tokens: int,
    num_beams: int,
    top_p: float | None,
    temperature: float,
    num_captions: int = 1,
    seeds: Sequence[int] | None = None,
) -> torch.Tensor:
    """Generate captions, as token ids, for each of V videos.

    Args:
        qformer: A Q-Former in eval mode.
        video_tokens: [V, M, D] float.
        bos_id: Id of the captioning start token.
        eos_id: Id of the token that ends a caption.
        pad_id: Id of the padding token.
        max_tokens: Maximum caption length in tokens.
        min_tokens: Minimum caption length in tokens.
        num_beams: Width of the beam search; ignored with `top_p`.
        top_p: Instead of beam search, sample from the smallest set of words whose total probability
            reaches this value.
        temperature: Sampling temperature.
        num_captions: Captions for each video: the best ones of the beam search, at most
            `num_beams`, or independent samples.
        seeds: V seeds for sampling. The captions of a video then depend only on its seed, and not
            on the other videos. None draws from torch's global generator.

    Returns:
        [V * num_captions, up to 1 + max_tokens] int64, video by video, each starting with the start
        token and padded at the end.
    """
    writer = CaptionWriter(qformer, bos_id, eos_id, pad_id).eval()
    sampling: dict[str, Any] = {
        "num_beams": num_beams,
        "do_sample": False,
        "num_return_sequences": num_captions,
    }
    queries = query_keys_values(qformer, video_tokens)
    if top_p is not None and seeds is None:
        sampling = {
            "do_sample": True,
            "top_p": top_p,
            "top_k": 0,
            "temperature": temperature,
            "num_return_sequences": num_captions,
        }
    elif top_p is not None and seeds is not None:
        draws = SeededDraws([(seed, number) for seed in seeds for number in range(num_captions)])
        sampling = {
            "do_sample": False,
            "logits_processor": LogitsProcessorList(
                [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p), draws]
            ),
        }
        # Greedy search returns one text per input.
        queries = queries.repeat_interleave(num_captions, dim=0)
    start = torch.full((len(queries), 1), bos_id, device=video_tokens.device)
    return writer.generate(  # type: ignore[attr-defined]
        input_ids=start,
        attention_mask=torch.ones_like(start),
        queries=queries,
        max_new_tokens=max_tokens,
        min_new_tokens=min_tokens,
        **sampling,
    )
