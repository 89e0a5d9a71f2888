"""Reads dual encoders from folders in the form of the Hugging Face Hub, strictly and safely.

No code of a folder runs, and pickled weights are refused.
"""

from __future__ import annotations

import json
from collections.abc import Collection
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
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
"""Files with the settings of the image processor; new versions of transformers write the second."""
HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation of SigLIP."""
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
    """Read the config of a model from config.json and the settings of its image processor.

    Raises:
        CheckpointError: A file is missing or damaged, or the architecture is not supported.
    """
    from transformers import CLIPConfig, SiglipConfig

    values = _json(folder / CONFIG)
    is_clip = values["model_type"] == "clip"
    try:
        complete = (CLIPConfig if is_clip else SiglipConfig)(**values).to_dict()
        size = int(complete["vision_config"]["image_size"])
        positions = int(complete["text_config"]["max_position_embeddings"])
    except Exception as error:  # transformers raises errors of many kinds for wrong values
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder / CONFIG} is not a valid config of {values['model_type']}: {reason}"
        ) from error
    # The model is built from these values alone, wherever it is built.
    for name in ("transformers_version", "dtype", "torch_dtype", "_name_or_path"):
        for one in (complete, complete["text_config"], complete["vision_config"]):
            one.pop(name, None)
    images = _image_settings(folder)
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
        mean=_colors(folder, images, "image_mean", CLIP_MEAN if is_clip else HALF),
        std=_colors(folder, images, "image_std", CLIP_STD if is_clip else HALF),
        most_text_tokens=positions,
        resize="crop" if images.get("do_center_crop", is_clip) else "squash",
        pads_fully=not is_clip,
    )


def _image_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the image processor, in either file that transformers writes."""
    if (folder / PREPROCESSOR).is_file():
        images: Any = _json(folder / PREPROCESSOR)
    elif (folder / PROCESSOR).is_file():
        images = _json(folder / PROCESSOR).get("image_processor")
    else:
        raise CheckpointError(
            f"{folder} contains no {PREPROCESSOR}, which says how frames are normalized; copy it "
            "from the model's page"
        )
    if not isinstance(images, dict) or not images.get("do_normalize", True):
        raise CheckpointError(
            f"{folder}: the settings of the image processor are missing or turn normalization off, "
            "which is not supported; copy the files from the model's page"
        )
    return images


def _colors(
    folder: Path, images: dict[str, Any], name: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    found = images.get(name, default)
    numbers = isinstance(found, (list, tuple)) and all(
        isinstance(one, (int, float)) for one in found
    )
    if not numbers or len(found) != 3 or (name == "image_std" and min(found) <= 0):
        raise CheckpointError(
            f"{folder}: {name} = {found!r} of the image processor: must be three numbers, and "
            "positive for a standard deviation; copy the file from the model's page"
        )
    return float(found[0]), float(found[1]), float(found[2])


def read_tokenizer(folder: Path) -> TextTokenizer:
    """Load the tokenizer of a model.

    Raises:
        CheckpointError: It is missing or does not belong to the model.
    """
    from stgt.inputs.hub_tokenizer import SETTINGS, HubTokenizer

    if not (folder / SETTINGS).is_file():
        raise CheckpointError(
            f"{folder} contains no {SETTINGS}; copy the files of the model's tokenizer there"
        )
    try:
        tokenizer = HubTokenizer(folder)
    except SettingError as error:
        raise CheckpointError(str(error)) from error
    if (problem := read_config(folder).tokenizer_problem(tokenizer)) is not None:
        raise CheckpointError(
            f"{folder}: {problem}; copy the files of the model's own tokenizer there"
        )
    return tokenizer


def check_files(names: Collection[str], where: str) -> None:
    """Check that a folder has weights that can be loaded without running code.

    Args:
        names: Names of its files.
        where: Its location, for errors.

    Raises:
        CheckpointError: It has none, or only pickled ones.
    """
    if WEIGHTS in names or INDEX in names:
        return
    if any(name in names for name in PICKLED):
        raise CheckpointError(
            f"{where} contains pickled weights only, and unpickling a file can run any code in it; "
            "convert them where you trust the file, with transformers' "
            f"AutoModel.from_pretrained(NAME).save_pretrained(OUTPUT), and use {WEIGHTS}"
        )
    raise CheckpointError(
        f"{where} contains no {WEIGHTS}, so it is not a complete model; copy all of its files"
    )


def _parts(folder: Path) -> list[str]:
    """Return the names of the files that hold parts of the weights."""
    found = _json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
        raise CheckpointError(f"{folder / INDEX} lists no files; copy the model's folder again")
    return sorted({Path(one).name for one in found.values()})


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

    check_files([path.name for path in folder.iterdir()], str(folder))
    config, tokenizer = read_config(folder), read_tokenizer(folder)
    files = [WEIGHTS]
    if not (folder / WEIGHTS).is_file():
        files = _parts(folder)
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
