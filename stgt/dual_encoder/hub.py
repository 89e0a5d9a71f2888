"""Reads dual encoders from folders in the form of the Hugging Face Hub, strictly and safely.

No code of a folder runs, and pickled weights are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stgt.dual_encoder.config import DualEncoderConfig
from stgt.errors import CheckpointError, CheckpointMismatchError, SettingError
from stgt.interface.inputs import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:
    from stgt.dual_encoder.model import DualEncoder
    from stgt.interface.inputs import TextTokenizer

MODEL_TYPES = ("clip", "siglip")
"""Values of `model_type` in config.json. SigLIP 2 of a fixed resolution is `siglip`."""
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TABLES = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
"""Tensors that files of earlier versions of transformers contain and no model needs."""


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); copy the model's folder again"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no settings; copy the model's folder again")
    return values


def read_config(folder: Path) -> DualEncoderConfig:
    """Read the config of a model from config.json and preprocessor_config.json.

    Raises:
        CheckpointError: A file is missing or damaged, or the architecture is not supported.
    """
    from transformers import CLIPConfig, SiglipConfig

    values = _json(folder / CONFIG)
    if not (folder / PREPROCESSOR).is_file():
        raise CheckpointError(
            f"{folder} contains no {PREPROCESSOR}, which says how frames are normalized; copy it "
            "from the model's page"
        )
    images = _json(folder / PREPROCESSOR)
    kind = CLIPConfig if values["model_type"] == "clip" else SiglipConfig
    try:
        complete = kind(**values).to_dict()
        size = int(complete["vision_config"]["image_size"])
        positions = int(complete["text_config"]["max_position_embeddings"])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG} is not a valid config of {values['model_type']}: {error}"
        ) from error
    # The model is built from these values alone, wherever it is built.
    for name in ("transformers_version", "dtype", "torch_dtype", "_name_or_path"):
        for one in (complete, complete["text_config"], complete["vision_config"]):
            one.pop(name, None)
    mean, std = (tuple(images.get(f"image_{name}", default)) for name, default in
                 (("mean", CLIP_MEAN), ("std", CLIP_STD)))  # fmt: skip
    wanted = images.get("crop_size") or images.get("size") or size
    if isinstance(wanted, dict):
        wanted = wanted.get("height") or wanted.get("shortest_edge")
    if wanted != size:
        raise CheckpointError(
            f"{folder}: {PREPROCESSOR} makes frames of {wanted} pixels, but {CONFIG} expects "
            f"{size}; copy both files from the same model"
        )
    return DualEncoderConfig(
        architecture=json.dumps(complete, sort_keys=True),
        image_size=size,
        mean=mean,
        std=std,
        most_text_tokens=positions,
        pads_fully=values["model_type"] == "siglip",
    )


def read_tokenizer(folder: Path) -> TextTokenizer:
    """Load the tokenizer of a model.

    Raises:
        CheckpointError: It is missing or does not belong to the model.
    """
    from stgt.inputs.hub_tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except SettingError as error:
        raise CheckpointError(str(error)) from error
    if (problem := read_config(folder).tokenizer_problem(tokenizer)) is not None:
        raise CheckpointError(
            f"{folder}: {problem}; copy the files of the model's own tokenizer there"
        )
    return tokenizer


def check_weights(folder: Path) -> None:
    """Check that a folder has weights that can be loaded without running code.

    Raises:
        CheckpointError: It has none, or only pickled ones.
    """
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return
    if any((folder / name).is_file() for name in PICKLED):
        raise CheckpointError(
            f"{folder} contains pickled weights only, and unpickling a file can run any code in "
            "it; convert them where you trust the file, with transformers' "
            f"AutoModel.from_pretrained(FOLDER).save_pretrained(OUTPUT), and use {WEIGHTS}"
        )
    raise CheckpointError(
        f"{folder} contains no {WEIGHTS}, so it is not a complete model; copy all of its files"
    )


def load(folder: Path) -> DualEncoder:
    """Load a model with its tokenizer, in eval mode.

    Raises:
        CheckpointError: A file is missing, damaged or pickled.
        CheckpointMismatchError: A tensor is missing, unexpected, or has another shape.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from stgt.dual_encoder.model import DualEncoder
    from stgt.model_folder import unlike, without_initialization

    check_weights(folder)
    config, tokenizer = read_config(folder), read_tokenizer(folder)
    files = [WEIGHTS]
    if not (folder / WEIGHTS).is_file():
        files = sorted(set(_json(folder / INDEX).get("weight_map", {}).values()))
    tensors: dict[str, torch.Tensor] = {}
    try:
        for name in files:
            tensors.update(load_file(folder / name))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} contains a missing or damaged file of weights ({error}); copy the model's "
            "folder again"
        ) from error
    with without_initialization():
        model = DualEncoder(config, tokenizer)
    own = model.hub.state_dict()
    misshapen = [
        f"{name} {difference}"
        for name in sorted(own.keys() & tensors.keys())
        if (difference := unlike(tensors[name], own[name]))
    ]
    missing = sorted(own.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - own.keys() - set(TABLES)) + misshapen
    if missing or unexpected:
        raise CheckpointMismatchError(str(folder), missing, unexpected)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    return model.eval()
