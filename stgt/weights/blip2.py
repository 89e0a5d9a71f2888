"""BLIP-2's pre-trained Q-Former, from LAVIS's files and from checkpoints of transformers.

The authors start from the Q-Former that BLIP-2 was pre-trained with (Li et al. 2023): BERT's layers
with trained cross-attention in every second layer, and 32 queries. The normalization of its input
(`ln_vision`) belongs to it. All other parts of BLIP-2 are left out, including its heads, which the
authors do not use either.

The Q-Former of BLIP-2's second stage reads no texts. Files of that stage (T5, OPT) therefore lack
the text parts (`TEXT_PARTS`), each of which a file contains completely or not at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from stgt.config import QFormerConfig
from stgt.errors import CheckpointError, CheckpointMismatchError, SettingError
from stgt.model_folder import unlike
from stgt.weights.released import (
    ImportReport,
    State,
    count_blocks,
    head_count,
    our_name,
    published_name,
    read_pickle,
    shape_of,
    state_of,
    without_copies,
)

TRANSFORMERS_PREFIXES = (
    ("qformer.", "qformer.bert."),
    ("embeddings.word_embeddings.", "qformer.word_embeddings."),
    ("embeddings.position_embeddings.", "qformer.position_embeddings."),
    ("vision_model.post_layernorm.", "ln_vision."),
    ("query_tokens", "qformer.query_tokens"),
)
"""Prefixes of tensor names: of transformers, ours."""
TRANSFORMERS_POSITION_IDS = ("embeddings.position_ids", "qformer.embeddings.position_ids")
"""Constant tensors that earlier versions of transformers saved."""
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Weights in a folder of transformers. Large ones are divided, with an index beside them."""
PARTS = ("qformer.", "ln_vision.")
"""Prefixes of our tensors that are taken from BLIP-2."""
WORDS = "qformer.word_embeddings.weight"
POSITIONS = "qformer.position_embeddings.weight"
GROWN = (WORDS, "qformer.caption_head.bias")
"""Tensors with one row per vocabulary entry. A file may lack the last row, that of [DEC]."""
LAYER = "qformer.bert.encoder.layer"
OPTIONAL_PARTS = {
    "text embeddings": r"qformer\.(word|position)_embeddings\.",
    "text feed-forward layers": r"qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\.",
    "caption head": r"qformer\.caption_head\.",
    "ln_vision": r"ln_vision\.",
}
"""Parts that a file may lack as a whole, by the pattern of our tensor names."""
TEXT_PARTS = ("text embeddings", "text feed-forward layers", "caption head")
"""Parts that BERT has as well."""


class _Naming(NamedTuple):
    """How a kind of file names its tensors."""

    owns: Callable[[str], bool]
    """Whether a tensor of the file belongs to the Q-Former or to its input's normalization."""
    ours: Callable[[str], str]
    theirs: Callable[[str], str]


def _is_of_lavis(name: str) -> bool:
    return name == "query_tokens" or name.startswith(("Qformer.", "ln_vision."))


def _is_of_transformers(name: str) -> bool:
    return name == "query_tokens" or name.startswith(
        ("qformer.", "embeddings.", "vision_model.post_layernorm.")
    )


def _renamed(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _from_transformers(name: str) -> str:
    return _renamed(name, TRANSFORMERS_PREFIXES)


def _to_transformers(name: str) -> str:
    return _renamed(name, tuple((ours, theirs) for theirs, ours in TRANSFORMERS_PREFIXES))


LAVIS = _Naming(_is_of_lavis, our_name, published_name)
TRANSFORMERS = _Naming(_is_of_transformers, _from_transformers, _to_transformers)


@dataclass(frozen=True)
class PretrainedQFormer:
    """The Q-Former of a BLIP-2 checkpoint."""

    path: str
    tensors: dict[str, torch.Tensor]
    """Its tensors, by our names."""
    sizes: QFormerConfig
    """Sizes of the Q-Former. Without position embeddings, the maximum position is the default."""
    lacking: tuple[str, ...]
    """Which of `OPTIONAL_PARTS` the checkpoint lacks."""
    theirs: Callable[[str], str]
    """Returns the checkpoint's name of one of our tensors, for error messages."""

    def fitted_to(
        self, own: State, vocab_size: int, report: ImportReport
    ) -> dict[str, torch.Tensor]:
        """Return the tensors for a model of the same sizes, after comparing them with its own.

        Args:
            own: Tensors of the model, by name.
            vocab_size: Number of vocabulary entries of the model, including [DEC].
            report: Receives a line if the embedding of [DEC] is not in the checkpoint.

        Raises:
            CheckpointMismatchError: A tensor is missing or unexpected, or has another shape.
            SettingError: The checkpoint is for another vocabulary.
        """
        words = self.tensors.get(WORDS)
        if words is not None and words.ndim == 2 and len(words) not in (vocab_size - 1, vocab_size):
            raise SettingError(
                f"{self.theirs(WORDS)} of {self.path} has {len(words)} words, but the vocabulary "
                f"has {vocab_size} with the start token; use the vocabulary of this Q-Former, "
                "which is bert-base-uncased for BLIP-2"
            )
        tensors = dict(self.tensors)
        for name in GROWN:
            tensor = tensors.get(name)
            if tensor is not None and list(tensor.shape[:1]) == [vocab_size - 1]:
                tensors[name] = torch.cat([tensor, own[name][-1:].to(tensor.dtype)])
                report.neutral[f"the row of [DEC] in {name}"] = "a random initial value"
        lacking = re.compile("|".join(OPTIONAL_PARTS[part] for part in self.lacking) or r"(?!)")
        missing = [
            self.theirs(name)
            for name in own
            if name.startswith(PARTS) and name not in tensors and not lacking.match(name)
        ]
        unexpected = []
        for name, tensor in tensors.items():
            difference = unlike(tensor, own[name]) if name in own else "is not in the model"
            if difference:
                unexpected.append(f"{self.theirs(name)} {difference}")
        if missing or unexpected:
            raise CheckpointMismatchError(self.path, missing, sorted(unexpected))
        return tensors


def read_qformer(path: Path, heads: int | None, report: ImportReport) -> PretrainedQFormer:
    """Read the Q-Former of a BLIP-2 checkpoint, without reading the tensors of other parts.

    Args:
        path: A file of LAVIS (blip2_pretrained*.pth), or a checkpoint of transformers: its folder,
            or one of its files (.safetensors or .bin).
        heads: Number of attention heads. None takes it from the config of transformers, or derives
            it from the published width of a head.
        report: Receives the names of tensors that are left out.

    Raises:
        CheckpointError: The checkpoint cannot be read safely, or contains no Q-Former.
        CheckpointMismatchError: A tensor that is needed to infer a size is missing or malformed.
        SettingError: The sizes are inconsistent.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; pass LAVIS's .pth file, or a BLIP-2 model of transformers: "
            "its folder, or its .safetensors or .bin file"
        )
    owned: dict[str, torch.Tensor] = {}
    others: list[str] = []
    for file in _weight_files(path):
        for name, tensor in _tensors(file):
            if tensor is None:
                others.append(name)
            else:
                owned[name] = tensor
    naming = LAVIS if any(name.startswith("Qformer.") for name in owned) else TRANSFORMERS
    if naming is TRANSFORMERS and not any(name.startswith("qformer.") for name in owned):
        raise CheckpointError(
            f"{path} contains no Q-Former: none of its tensors is named Qformer.* (LAVIS) or "
            "qformer.* (transformers)"
        )
    state = {name: tensor for name, tensor in owned.items() if naming.owns(name)}
    report.not_used += sorted([*others, *(owned.keys() - state.keys())])
    report.qformer = str(path)
    state = _without_constants(state, naming, str(path), report)
    if heads is None and naming is TRANSFORMERS:
        heads = _recorded_heads(path)
    sizes = _sizes(state, naming, str(path), heads)
    tensors = {naming.ours(name): tensor for name, tensor in state.items()}
    lacking = tuple(
        part
        for part, pattern in OPTIONAL_PARTS.items()
        if not any(re.match(pattern, name) for name in tensors)
    )
    return PretrainedQFormer(str(path), tensors, sizes, lacking, naming.theirs)


def _weight_files(path: Path) -> list[Path]:
    """Return the files that contain the weights of a checkpoint."""
    if not path.is_dir():
        return [path]
    for name in WEIGHT_FILES:
        index = path / f"{name}.index.json"
        if index.is_file():
            return [path / part for part in _indexed(index)]
        if (path / name).is_file():
            return [path / name]
    raise CheckpointError(
        f"{path} contains no {' or '.join(WEIGHT_FILES)}; pass the folder of a BLIP-2 model of "
        "transformers, or a file"
    )


def _indexed(index: Path) -> list[str]:
    """Return the names of the files that an index refers to."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(found.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of weights; download it again") from error
    if strange := [name for name in names if Path(str(name)).name != name]:
        raise CheckpointError(f"{index} refers to files outside of its folder: {strange[:5]}")
    return names


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield the names in a file, with tensors if they may belong to a Q-Former."""

    def is_wanted(name: str) -> bool:
        return LAVIS.owns(name) or TRANSFORMERS.owns(name)

    if file.suffix != ".safetensors":
        for name, tensor in state_of(read_pickle(file), file).items():
            yield name, tensor if is_wanted(name) else None
        return
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; download the checkpoint again")
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                yield name, opened.get_tensor(name) if is_wanted(name) else None
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is damaged or truncated ({error}); download the checkpoint again"
        ) from error


def _without_constants(
    state: dict[str, torch.Tensor], naming: _Naming, path: str, report: ImportReport
) -> dict[str, torch.Tensor]:
    """Return the tensors without constants and copies, after checking that they are such."""
    if naming is LAVIS:
        return without_copies(state, path, report)
    state = dict(state)
    for name in TRANSFORMERS_POSITION_IDS:
        ids = state.pop(name, None)
        if ids is None:
            continue
        if not torch.equal(ids.flatten().long(), torch.arange(ids.numel())):
            raise CheckpointError(f"{path}: {name} does not count from 0 to {ids.numel() - 1}")
        report.constant.append(name)
    return state


def _recorded_heads(path: Path) -> int | None:
    """Return the number of heads in the config beside a checkpoint of transformers, if any."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    if not config.is_file():
        return None
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        heads = values.get("qformer_config", {}).get("num_attention_heads")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{config} is not a config of transformers") from error
    if heads is not None and (not isinstance(heads, int) or heads < 1):
        raise CheckpointError(f"{config}: num_attention_heads = {heads!r} is not a number of heads")
    return heads


def _sizes(
    state: dict[str, torch.Tensor], naming: _Naming, path: str, heads: int | None
) -> QFormerConfig:
    """Infer the sizes of a Q-Former from the shapes of its tensors."""

    def shape(ours: str, dimensions: int) -> list[int]:
        return shape_of(state, naming.theirs(ours), path, dimensions)

    _, queries, width = shape("qformer.query_tokens", 3)
    mlp_width = shape(f"{LAYER}.0.intermediate_query.dense.weight", 2)[0]
    names = [naming.ours(name) for name in state]
    layers = count_blocks(names, rf"{re.escape(LAYER)}\.(\d+)\.")
    crossing = sorted(
        {int(found[1]) for name in names if (found := re.match(rf"{LAYER}\.(\d+)\.crossatt", name))}
    )
    every = min((b - a for a, b in zip(crossing, crossing[1:], strict=False)), default=layers)
    sizes = QFormerConfig(
        width=width,
        layers=layers,
        heads=head_count(heads, "qformer", width),
        mlp_width=mlp_width,
        cross_attention_every=every,
        query_tokens=queries,
    )
    if width == QFormerConfig.width:
        # At BLIP-2's width its other sizes are known, so a file cut short is noticed.
        sizes = replace(
            sizes,
            layers=max(layers, QFormerConfig.layers),
            cross_attention_every=QFormerConfig.cross_attention_every,
        )
    if naming.theirs(POSITIONS) in state:
        sizes = replace(sizes, max_position=shape(POSITIONS, 2)[0])
    return sizes


def describe_lacking(bert: str | None) -> str:
    """Describe how a text part that a checkpoint lacks is filled: by BERT, or at random."""
    if bert is not None:
        return f"those of {bert}"
    return "random initial values; --bert bert-base-uncased starts them from BERT"
