"""Initialization for training: EVA frame encoder, the Q-Former of BLIP-2 or BERT, the rest random.

The authors start from the Q-Former that BLIP-2 was pre-trained with (see `blip2`). A Q-Former from
BERT starts as BLIP-2's own did (Li et al. 2023): texts and queries share BERT's self-attention, the
queries' feed-forward layers start as copies of the texts', and cross-attention starts at random.
With both, BERT fills the text parts that BLIP-2's file lacks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BertConfig, BertForMaskedLM

from stgt.config import ModelConfig, stgt_g
from stgt.errors import CheckpointError, CheckpointMismatchError, SettingError
from stgt.inputs.tokenizer import Tokenizer
from stgt.model import STGT
from stgt.model_folder import unlike
from stgt.weights.blip2 import TEXT_PARTS, PretrainedQFormer, describe_lacking, read_qformer
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
"""Marks the queries' own feed-forward layers, which start as copies of the texts'."""
GROWN = ("qformer.word_embeddings.weight", "qformer.caption_head.bias")
"""Tensors with one row per vocabulary entry, to which [DEC] was added."""
NOT_RANDOM = {
    "temperature": "its initial value",
    "ln_vision": "initial values, ones and zeros",
}
"""Parts of a new model that do not start at random."""
AT_RANDOM = ("qformer.query_tokens", "crossattention")
"""Parts of the Q-Former that BERT lacks, which start at random."""


def begin(
    vision: Path | str,
    tokenizer: Tokenizer,
    embed_dim: int,
    bert: str | None = None,
    heads: HeadCounts | None = None,
    image_size: int | None = None,
    qformer: Path | None = None,
) -> tuple[STGT, ImportReport]:
    """Build a model for pre-training. Random parts are drawn from torch's global generator.

    Args:
        vision: File of the frozen encoder, or "timm" for timm's pre-trained weights.
        tokenizer: Tokenizer of the vocabulary, including the start token.
        embed_dim: Width of the shared embedding.
        bert: Saved BERT (a folder, or a name on the hub) to initialize the Q-Former from; None
            initializes it at random.
        heads: Numbers of attention heads, which cannot be inferred from the files.
        image_size: Edge length of a frame, in pixels. If it differs from the encoder's, the
            encoder's position embedding is resized.
        qformer: BLIP-2 checkpoint to start the Q-Former from, as for `blip2.read_qformer`. It
            precedes `bert`, which then only fills the text parts that the checkpoint lacks.

    Returns:
        The model in eval mode, and a report on the imported tensors.

    Raises:
        CheckpointError: A file cannot be used.
        CheckpointMismatchError: A tensor is missing or has a different shape.
        SettingError: The sizes are inconsistent.
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
    pretrained = None
    if qformer is not None:
        known = config.qformer.heads if language is not None else heads.qformer
        pretrained = read_qformer(qformer, known, report)
        config = _sized_by_qformer(pretrained, config, bert)
    model = STGT(config, tokenizer).eval()
    tensors = encoder_tensors(encoder, config.vision, report)
    if language is not None and bert is not None:
        tensors |= _qformer_tensors(language, model, bert)
    state = model.state_dict()
    if pretrained is not None:
        tensors |= pretrained.fitted_to(state, config.vocab_size, report)
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
    report.initial_values = [name for name in state if name not in tensors]
    for part in dict.fromkeys(name.partition(".")[0] for name in report.initial_values):
        report.neutral[part] = NOT_RANDOM.get(part, "random initial values")
    if pretrained is not None:
        _report_lacking(pretrained, bert, report)
    elif bert is not None:
        report.neutral["qformer"] = f"{bert}; its cross-attention and queries start at random"
    return model, report


def _report_lacking(pretrained: PretrainedQFormer, bert: str | None, report: ImportReport) -> None:
    """Report how the parts that BLIP-2's checkpoint lacks are filled."""
    report.neutral.pop("qformer", None)
    lacking = [part for part in pretrained.lacking if part in TEXT_PARTS]
    for part in lacking:
        report.neutral[f"qformer ({part})"] = describe_lacking(bert)
    if bert is not None and not lacking:
        report.notes.append(
            f"nothing is taken from BERT {bert}, because {pretrained.path} contains the whole "
            "Q-Former"
        )


def _read_bert(bert: str) -> BertForMaskedLM:
    try:
        config = AutoConfig.from_pretrained(bert)
        loaded: Any = BertForMaskedLM.from_pretrained(bert, output_loading_info=True)
    except Exception as error:  # the hub's client may raise anything
        raise CheckpointError(
            f"BERT {bert} cannot be read: {str(error).splitlines()[0][:200]}; pass a folder with "
            "its config.json and model.safetensors, or a name on the hub"
        ) from error
    model, loading = loaded
    missing = sorted(loading["missing_keys"])
    if not isinstance(config, BertConfig) or missing:
        lacks = f", and lacks {', '.join(missing[:5])}" if missing else ""
        raise CheckpointError(
            f"{bert} is a {config.model_type} model{lacks}; the Q-Former requires a complete BERT, "
            "including its masked-language-modeling head"
        )
    return model


def _sized_by(bert: BertConfig, config: ModelConfig) -> ModelConfig:
    """Return the config with a Q-Former of BERT's sizes."""
    if bert.vocab_size != config.vocab_size - 1:
        raise SettingError(
            f"BERT has {bert.vocab_size} words, but the vocabulary has {config.vocab_size - 1} "
            "without the start token; use the vocabulary of this BERT"
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


def _sized_by_qformer(
    pretrained: PretrainedQFormer, config: ModelConfig, bert: str | None
) -> ModelConfig:
    """Return the config with a Q-Former of a pre-trained one's sizes, which BERT must share."""
    found, before = pretrained.sizes, config.qformer
    if bert is not None:
        for name in ("width", "layers", "heads", "mlp_width"):
            ours, theirs = getattr(before, name), getattr(found, name)
            if ours != theirs:
                raise SettingError(
                    f"BERT {bert} has {name} {ours}, but the Q-Former in {pretrained.path} has "
                    f"{theirs}; use the BERT that this Q-Former was made from, or omit --bert"
                )
    positions = found.max_position
    if "text embeddings" in pretrained.lacking:
        positions = before.max_position
    return replace(
        config,
        max_text_tokens=min(config.max_text_tokens, positions),
        qformer=replace(
            before,
            width=found.width,
            layers=found.layers,
            heads=found.heads,
            mlp_width=found.mlp_width,
            cross_attention_every=found.cross_attention_every,
            query_tokens=found.query_tokens,
            max_position=positions,
        ),
    )


def _qformer_tensors(language: BertForMaskedLM, model: STGT, bert: str) -> dict[str, torch.Tensor]:
    """Return BERT's tensors under the Q-Former's names, extended to the model's vocabulary."""
    theirs = {our_name(f"Qformer.{name}"): t for name, t in language.state_dict().items()}
    tensors, missing = {}, []
    for name, own in model.state_dict().items():
        if not name.startswith(QFORMER) or any(part in name for part in AT_RANDOM):
            continue
        tensor = theirs.get(name.replace(OF_QUERIES, ""))
        if tensor is None:
            missing.append(name)
        elif name in GROWN:  # BERT lacks the start token
            tensors[name] = torch.cat([tensor, own[len(tensor) :]])
        else:
            tensors[name] = tensor
    if missing:
        raise CheckpointMismatchError(bert, missing, [])
    return tensors
