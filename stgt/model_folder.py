"""Saving and strict loading of models in folders of safetensors files.

A model folder contains
    model.safetensors           the trained tensors
    frame_encoder.safetensors   the frozen tensors. Training checkpoints store only their
                                fingerprint, so that a different frozen encoder is detected
    config.json                 the model's config and that fingerprint
    answers.json                the answer vocabulary of a model that answers questions
    vocab.txt                   the vocabulary, if the model has one; models of the hub have the
                                files of their tokenizer instead
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from stgt.errors import CheckpointError, CheckpointMismatchError, SettingError
from stgt.inputs.hub_tokenizer import load_tokenizer
from stgt.interface.inputs import HUB_TOKENIZER_FILES, VOCAB_FILE, VideoTextConfig
from stgt.interface.kinds import build, config_from_dict
from stgt.interface.model import VideoTextModel
from stgt.question_answering.vocabulary import FILE as ANSWERS_FILE
from stgt.question_answering.vocabulary import AnswerVocabulary
from stgt.training.optimizer import state_shapes

WEIGHTS_FILE = "model.safetensors"
FROZEN_FILE = "frame_encoder.safetensors"
CONFIG_FILE = "config.json"
FILES = (WEIGHTS_FILE, FROZEN_FILE, CONFIG_FILE, VOCAB_FILE, ANSWERS_FILE, *HUB_TOKENIZER_FILES)
ENCODER_PREFIX = "frame_encoder."
CLASSIFIER_PREFIX = "classifier."
"""Beginning of the names of the tensors that answer questions."""

State = Mapping[str, torch.Tensor]


def _divide(model: VideoTextModel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the trained tensors, and the frozen tensors named relative to the frame encoder."""
    never = model.frozen_names()
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


def save_model(model: VideoTextModel, folder: Path, with_frozen: bool = False) -> None:
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
        model.tokenizer.save_to(folder)
    if model.answers is not None:
        (folder / ANSWERS_FILE).write_text(model.answers.to_json(), encoding="utf-8")
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
        config["model"] = config_from_dict(config["model"], str(path))
    except (json.JSONDecodeError, KeyError, TypeError, SettingError) as error:
        raise CheckpointError(f"{path} is not a valid config of a model: {error}") from error
    return config


def read_model_config(folder: Path) -> VideoTextConfig:
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
    model: VideoTextModel,
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
    model: VideoTextModel, folder: Path, frame_encoder: Path | None = None
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
    for name in model.time_tables:
        if name in tensors and name in everything:
            tensors[name] = resized_times(tensors[name], everything[name].shape[-2])
    if not any(name.startswith(CLASSIFIER_PREFIX) for name in tensors):
        # A new classifier of answers begins with random weights.
        everything = {n: t for n, t in everything.items() if not n.startswith(CLASSIFIER_PREFIX)}
    _copy_strictly(tensors, everything, folder)
    if frozen:
        model.frame_encoder.fingerprint = fingerprint(frozen)


def resized_times(table: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Resize time embeddings [..., T, D] to another number of frames, by nearest neighbor.

    This is how the authors of ALPRO answer questions about 16 frames with a model of 8.
    """
    if table.shape[-2] == num_frames:
        return table
    flat = table.reshape(-1, *table.shape[-2:]).transpose(1, 2)
    resized = F.interpolate(flat, size=num_frames, mode="nearest").transpose(1, 2)
    return resized.reshape(*table.shape[:-2], num_frames, table.shape[-1])


class _NoRandomValues(TorchFunctionMode):
    """Skip the random initialization of weights, by far the slowest part of building a model."""

    DRAWING = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        if func in self.DRAWING:
            return args[0]
        return func(*args, **(kwargs or {}))


def without_initialization() -> AbstractContextManager[Any]:
    """Return a context in which models are built with uninitialized weights, to be loaded."""
    return _NoRandomValues()


def load_model(
    folder: Path, frame_encoder: Path | None = None, needs_frame_encoder: bool = True
) -> VideoTextModel:
    """Build a model from a saved folder and load its weights and its tokenizer.

    Args:
        folder: Folder of a saved model.
        frame_encoder: See `load_weights`.
        needs_frame_encoder: See `load_weights`.

    Raises:
        CheckpointError: See `load_weights`.
    """
    config = read_model_config(folder)
    has_tokenizer = any((folder / name).is_file() for name in (VOCAB_FILE, *HUB_TOKENIZER_FILES))
    tokenizer = load_tokenizer(folder) if has_tokenizer else None
    with without_initialization():
        model = build(config, tokenizer)
    load_weights(model, folder, frame_encoder, needs_frame_encoder)
    answers = folder / ANSWERS_FILE
    if answers.is_file():
        model.answers = AnswerVocabulary.from_json(answers.read_bytes(), str(answers))
    return model


def copy_weights(source: VideoTextModel, model: VideoTextModel, where: str) -> None:
    """Copy the weights of a model to another one of the same architecture, strictly.

    Raises:
        CheckpointMismatchError: A tensor is missing, unexpected, or has a different shape.
    """
    _copy_strictly(dict(source.state_dict()), dict(model.state_dict()), Path(where))


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
    wanted_states = [
        state_shapes(group, parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    indices = [index for group in current["param_groups"] for index in group["params"]]
    for index, wanted in zip(indices, wanted_states, strict=True):
        if {name: tensor.shape for name, tensor in state[index].items()} != wanted:
            raise CheckpointMismatchError(str(path), [], [f"shapes of parameter {index}"])
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})
