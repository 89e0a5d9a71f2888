"""Checkpoint contents: trainable tensors as safetensors, loaded strictly.

A model folder holds `model.safetensors` and `model_config.json`. A frozen frame encoder is left
out of it; its fingerprint is kept instead, so that other frozen weights are noticed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stgt.config import ModelConfig
from stgt.errors import CheckpointError, CheckpointMismatchError
from stgt.model import STGT

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "model_config.json"
FROZEN_PREFIX = "frame_encoder."


def _saved_state(model: STGT) -> dict[str, torch.Tensor]:
    frozen = model.config.vision.frozen
    return {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if not (frozen and name.startswith(FROZEN_PREFIX))
    }


def fingerprint(module: nn.Module) -> str:
    """A short hash of all tensors of a module, by name and value."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_model(model: STGT, folder: Path) -> None:
    """Write the model's config and its weights, without a frozen frame encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, object] = {"model": model.config.to_dict()}
    if model.config.vision.frozen:
        config["frame_encoder_fingerprint"] = fingerprint(model.frame_encoder)
    save_file(_saved_state(model), folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")


def read_model_config(folder: Path) -> ModelConfig:
    """The config of a saved model.

    Raises:
        CheckpointError: the folder holds no model config.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {CONFIG_FILE}: it is not a model checkpoint")
    return ModelConfig.from_dict(json.loads(path.read_text(encoding="utf-8"))["model"])


def load_weights(model: STGT, folder: Path) -> None:
    """Load a saved model's weights into a model of the same config, strictly.

    Raises:
        CheckpointError: the file is missing, or was trained on another frozen frame encoder.
        CheckpointMismatchError: a tensor is missing, left over, or of another shape.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {WEIGHTS_FILE}: it is not a model checkpoint")
    state = load_file(path)
    expected = _saved_state(model)
    misshapen = [
        f"{name} {list(state[name].shape)} (model {list(expected[name].shape)})"
        for name in sorted(expected.keys() & state.keys())
        if state[name].shape != expected[name].shape
    ]
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys()) + misshapen
    if missing or unexpected:
        raise CheckpointMismatchError(str(path), missing, unexpected)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in state:
                tensor.copy_(state[name])
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    wanted = config.get("frame_encoder_fingerprint")
    if wanted is not None and wanted != fingerprint(model.frame_encoder):
        raise CheckpointError(
            f"{folder} was trained on another frozen frame encoder (fingerprint {wanted}); "
            "load that encoder's weights into the model first"
        )


def load_model(folder: Path) -> STGT:
    """Build a model from a saved folder and load its weights."""
    model = STGT(read_model_config(folder))
    load_weights(model, folder)
    return model


def save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Write an optimizer's state tensors as safetensors; its settings come from the config."""
    state = optimizer.state_dict()["state"]
    tensors = {
        f"{index}.{name}": torch.as_tensor(value).detach().contiguous()
        for index, values in state.items()
        for name, value in values.items()
    }
    save_file(tensors, path)


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Load what `save_optimizer` wrote into an optimizer of the same parameters.

    Raises:
        CheckpointMismatchError: the state does not belong to these parameters.
    """
    tensors = load_file(path)
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
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})
