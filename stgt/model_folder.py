"""Saving and strict loading of models in folders of safetensors files.

A model folder contains
    model.safetensors           the trained tensors
    frame_encoder.safetensors   the frozen tensors. Training checkpoints store only their
                                fingerprint, so that a different frozen encoder is detected
    config.json                 the model's config and that fingerprint
    vocab.txt                   the vocabulary, if the model has one
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stgt.config import ModelConfig
from stgt.errors import CheckpointError, CheckpointMismatchError
from stgt.interface import StorableModel

WEIGHTS_FILE = "model.safetensors"
FROZEN_FILE = "frame_encoder.safetensors"
CONFIG_FILE = "config.json"
VOCAB_FILE = "vocab.txt"
FILES = (WEIGHTS_FILE, FROZEN_FILE, CONFIG_FILE, VOCAB_FILE)
ENCODER_PREFIX = "frame_encoder."

State = Mapping[str, torch.Tensor]


def _divide(model: StorableModel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the trained tensors, and the frozen tensors named relative to the frame encoder."""
    never = {ENCODER_PREFIX + name for name in model.frame_encoder.frozen_names()}
    trained, frozen = {}, {}
    for name, tensor in model.state_dict().items():
        if name in never:
            frozen[name.removeprefix(ENCODER_PREFIX)] = tensor.detach()
        else:
            trained[name] = tensor.detach()
    return trained, frozen


def fingerprint(tensors: State) -> str:
    """Return a short hash of tensor names and values. The floating-point dtype does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().float().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def save_model(model: StorableModel, folder: Path, with_frozen: bool = False) -> None:
    """Write a model's config, its trained tensors and its vocabulary.

    Args:
        model: The model to save.
        folder: Output folder, created if it does not exist.
        with_frozen: Also write the frozen tensors, so that the folder is self-contained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained, frozen = _divide(model)
    config: dict[str, object] = {"model": model.config.to_dict()}
    if frozen and not model.frame_encoder.missing:
        if model.frame_encoder.fingerprint is None or with_frozen:
            model.frame_encoder.fingerprint = fingerprint(frozen)
        config["frame_encoder_fingerprint"] = model.frame_encoder.fingerprint
    _save(trained, folder / WEIGHTS_FILE)
    if frozen and with_frozen:
        _save(frozen, folder / FROZEN_FILE)
    if model.tokenizer is not None:
        model.tokenizer.save(folder / VOCAB_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")


def _save(tensors: State, path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _load(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} contains no {path.name}, so it is not a model checkpoint"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged or truncated ({error}); download or save the checkpoint again"
        ) from error


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} contains no {CONFIG_FILE}, so it is not a model checkpoint"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["model"] = ModelConfig.from_dict(config["model"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a valid config of an STGT model: {error}") from error
    return config


def read_model_config(folder: Path) -> ModelConfig:
    """Read the config of a saved model.

    Raises:
        CheckpointError: The folder contains no valid model config.
    """
    return _read_config(folder)["model"]


def unlike(tensor: torch.Tensor, expected: torch.Tensor) -> str:
    """Describe how a tensor's shape or dtype differs from the model's; empty if it does not."""
    if tensor.shape != expected.shape:
        return f"{list(tensor.shape)} (model {list(expected.shape)})"
    if tensor.is_floating_point() != expected.is_floating_point():
        return f"{tensor.dtype} (model {expected.dtype})"
    return ""


def _copy_strictly(tensors: State, into: State, where: Path) -> None:
    misshapen = [
        f"{name} {difference}"
        for name in sorted(into.keys() & tensors.keys())
        if (difference := unlike(tensors[name], into[name]))
    ]
    missing = sorted(into.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - into.keys()) + misshapen
    if missing or unexpected:
        raise CheckpointMismatchError(str(where), missing, unexpected)
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(tensors[name])


def load_weights(
    model: StorableModel,
    folder: Path,
    frame_encoder: Path | None = None,
    needs_frame_encoder: bool = True,
) -> None:
    """Load a saved model's weights into a model of the same config, strictly.

    Args:
        model: The model to load into.
        folder: Folder of a saved model.
        frame_encoder: Folder that contains the frozen encoder, for a model saved without it.
        needs_frame_encoder: If False, a model saved without its frozen encoder is loaded without
            it, and cannot encode videos.

    Raises:
        CheckpointError: A file is missing or damaged, or belongs to a different frozen encoder.
        CheckpointMismatchError: A tensor is missing, unexpected, or has a different shape.
    """
    trained, frozen = _divide(model)
    _copy_strictly(_load(folder / WEIGHTS_FILE), trained, folder / WEIGHTS_FILE)
    if not frozen:
        return
    unfrozen = {name.removeprefix(ENCODER_PREFIX) for name in trained}
    source = folder if (folder / FROZEN_FILE).is_file() or frame_encoder is None else frame_encoder
    wanted = _read_config(folder).get("frame_encoder_fingerprint")
    if (source / FROZEN_FILE).is_file():
        # The file may include blocks that the model trains and stores with its trained tensors.
        kept = {n: t for n, t in _load(source / FROZEN_FILE).items() if n not in unfrozen}
        _copy_strictly(kept, frozen, source / FROZEN_FILE)
    elif wanted is None or not needs_frame_encoder:
        model.frame_encoder.missing = True
        return
    model.frame_encoder.fingerprint = fingerprint(frozen)
    if wanted is not None and wanted != model.frame_encoder.fingerprint:
        raise CheckpointError(
            f"{folder} was trained on a different frozen frame encoder (fingerprint {wanted}) "
            f"than the one in {source}; pass a folder that contains its {FROZEN_FILE}"
        )


def load_initial_weights(
    model: StorableModel, folder: Path, frame_encoder: Path | None = None
) -> None:
    """Load a saved model's weights into a model that may train different blocks of the encoder.

    Args:
        model: The model to load into, of the same sizes as the saved model.
        folder: Folder of a saved model.
        frame_encoder: See `load_weights`.

    Raises:
        CheckpointError: See `load_weights`.
    """
    trained, frozen = _divide(model)
    tensors = _load(folder / WEIGHTS_FILE)
    source = folder if (folder / FROZEN_FILE).is_file() or frame_encoder is None else frame_encoder
    wanted = _read_config(folder).get("frame_encoder_fingerprint")
    if (source / FROZEN_FILE).is_file():
        theirs = _load(source / FROZEN_FILE)
        # Blocks stored among the trained tensors replace those in the encoder's file.
        theirs = {n: t for n, t in theirs.items() if ENCODER_PREFIX + n not in tensors}
        if wanted is not None and wanted != fingerprint(theirs):
            raise CheckpointError(
                f"{folder} was trained on a different frozen frame encoder (fingerprint {wanted}) "
                f"than the one in {source}; pass a folder that contains its {FROZEN_FILE}"
            )
        tensors |= {ENCODER_PREFIX + name: tensor for name, tensor in theirs.items()}
    everything = {**trained, **{ENCODER_PREFIX + name: t for name, t in frozen.items()}}
    _copy_strictly(tensors, everything, folder)
    if frozen:
        model.frame_encoder.fingerprint = fingerprint(frozen)


def save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Write an optimizer's state tensors as safetensors. Hyperparameters come from the config."""
    state = optimizer.state_dict()["state"]
    tensors = {
        f"{index}.{name}": torch.as_tensor(value).detach().contiguous()
        for index, values in state.items()
        for name, value in values.items()
    }
    save_file(tensors, path)


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Load a file written by `save_optimizer` into an optimizer of the same parameters.

    Raises:
        CheckpointMismatchError: The state does not belong to these parameters.
    """
    tensors = _load(path)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    current = optimizer.state_dict()
    expected = {index for group in current["param_groups"] for index in group["params"]}
    if state.keys() != expected:
        missing = sorted(str(index) for index in expected - state.keys())
        unexpected = sorted(str(index) for index in state.keys() - expected)
        raise CheckpointMismatchError(str(path), missing, unexpected)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in current["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        wanted = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        if {name: tensor.shape for name, tensor in state[index].items()} != wanted:
            raise CheckpointMismatchError(str(path), [], [f"shapes of parameter {index}"])
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})
