"""A model to pre-train: EVA's frame encoder, BERT's layers in the Q-Former, the rest at random.

As BLIP-2 begins (Li et al. 2023): text and queries share BERT's self-attention, the queries'
feed-forward starts as a copy of the texts', cross-attention at random.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BertConfig, BertForMaskedLM

from stgt.config import ModelConfig, stgt_g
from stgt.errors import CheckpointError, CheckpointMismatchError
from stgt.inputs.tokenizer import Tokenizer
from stgt.model import STGT
from stgt.model_folder import unlike
from stgt.weights.released import (
    ENCODER,
    HeadCounts,
    ImportReport,
    encoder_tensors,
    our_name,
    read_encoder,
    vision_config,
)

QFORMER = "qformer."
OF_QUERIES = "_query"
"""Marks the queries' own feed-forward, which begins as the texts'."""
GROWN = ("qformer.word_embeddings.weight", "qformer.caption_head.bias")
"""Tensors with one row for each entry of the vocabulary, to which [DEC] was added."""
AT_RANDOM = ("qformer.query_tokens", "crossattention")
"""Parts of the Q-Former that BERT lacks."""


def begin(
    vision: Path | str,
    tokenizer: Tokenizer,
    embed_dim: int,
    bert: str | None = None,
    heads: HeadCounts | None = None,
    image_size: int | None = None,
) -> tuple[STGT, ImportReport]:
    """A model to pre-train, its random parts drawn from torch's generator.

    Args:
        vision: the frozen encoder's file, or "timm" for timm's pre-trained weights.
        tokenizer: the vocabulary, with the start token added.
        embed_dim: width of the shared embedding.
        bert: a saved BERT (a folder, or a name on the hub) that the Q-Former begins with; None
            leaves it at random.
        heads: numbers of attention heads, which the encoder's file does not tell.
        image_size: pixels along an edge of a frame; other than the encoder's, its position
            embedding is resized.

    Returns:
        The model in eval mode, and what became of the tensors.

    Raises:
        CheckpointError: a file cannot be used.
        CheckpointMismatchError: a tensor is missing, or of another shape.
        ValueError: the sizes do not go together.
    """
    heads = heads or HeadCounts()
    report = ImportReport("none", str(vision))
    encoder = read_encoder(vision)
    frames = vision_config(encoder, heads, str(vision))
    if image_size is not None:
        frames = replace(frames, image_size=image_size)
    config = stgt_g(embed_dim)
    config = replace(
        config,
        vision=frames,
        graph=replace(config.graph, heads=heads.graph),
    ).for_vocabulary(tokenizer.bos_id, len(tokenizer), tokenizer.pad_id)
    language = None if bert is None else _read_bert(bert)
    if language is not None:
        config = _sized_by(language.config, config)
    model = STGT(config, tokenizer).eval()
    tensors = encoder_tensors(encoder, config.vision, report)
    if language is not None and bert is not None:
        tensors |= _qformer_tensors(language, model, bert)
    state = model.state_dict()
    needed = [name for name in state if name.startswith(ENCODER)]
    missing = [name.removeprefix(ENCODER) for name in needed if name not in tensors]
    unexpected = []
    for name, tensor in tensors.items():
        difference = unlike(tensor, state[name]) if name in state else "is not in the model"
        if difference:
            unexpected.append(f"{name.removeprefix(ENCODER)} {difference}")
    if missing or unexpected:
        raise CheckpointMismatchError(str(vision), missing, sorted(unexpected))
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
            report.read += 1
            report.parameters += tensor.numel()
    model.frame_encoder.missing = False
    for part in {name.partition(".")[0] for name in state if name not in tensors}:
        report.neutral[part] = "random initial values"
    if bert is not None:
        report.neutral["qformer"] = f"{bert}, its cross-attention and queries with random values"
    return model, report


def _read_bert(bert: str) -> BertForMaskedLM:
    try:
        config = AutoConfig.from_pretrained(bert)
        loaded: Any = BertForMaskedLM.from_pretrained(bert, output_loading_info=True)
    except Exception as error:  # whatever the hub's client raises
        raise CheckpointError(
            f"BERT {bert} cannot be read: {str(error).splitlines()[0][:200]}; give a folder with "
            "its config.json and model.safetensors, or a name on the hub"
        ) from error
    model, loading = loaded
    missing = sorted(loading["missing_keys"])
    if not isinstance(config, BertConfig) or missing:
        lacks = f", and lacks {', '.join(missing[:5])}" if missing else ""
        raise CheckpointError(
            f"{bert} is a {config.model_type} model{lacks}: the Q-Former begins with a whole BERT, "
            "its head for masked words included"
        )
    return model


def _sized_by(bert: BertConfig, config: ModelConfig) -> ModelConfig:
    """The config with a Q-Former of BERT's sizes."""
    if bert.vocab_size != config.vocab_size - 1:
        raise ValueError(
            f"the BERT has {bert.vocab_size} words, the vocabulary {config.vocab_size - 1} without "
            "the start token: they do not belong together"
        )
    return replace(
        config,
        max_text_tokens=min(config.max_text_tokens, bert.max_position_embeddings),
        qformer=replace(
            config.qformer,
            width=bert.hidden_size,
            layers=bert.num_hidden_layers,
            heads=bert.num_attention_heads,
            mlp_width=bert.intermediate_size,
            max_position=bert.max_position_embeddings,
        ),
    )


def _qformer_tensors(language: BertForMaskedLM, model: STGT, bert: str) -> dict[str, torch.Tensor]:
    """Tensors of the Q-Former that BERT has, under our names, for the model's vocabulary."""
    theirs = {our_name(f"Qformer.{name}"): t for name, t in language.state_dict().items()}
    tensors, missing = {}, []
    for name, own in model.state_dict().items():
        if not name.startswith(QFORMER) or any(part in name for part in AT_RANDOM):
            continue
        tensor = theirs.get(name.replace(OF_QUERIES, ""))
        if tensor is None:
            missing.append(name)
        elif name in GROWN:  # the start token is new
            tensors[name] = torch.cat([tensor, own[len(tensor) :]])
        else:
            tensors[name] = tensor
    if missing:
        raise CheckpointMismatchError(bert, missing, [])
    return tensors
