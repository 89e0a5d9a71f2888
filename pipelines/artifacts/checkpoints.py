"""Reads and writes the checkpoints of a training run.

Layout of the run's folder:
    checkpoints/step-00000100/   model.safetensors, config.json, vocab.txt, optimizer.safetensors,
                                 state.json; COMPLETE, written last
    best.json                    the checkpoint with the highest validation metric
    mlflow_run.json              the run's id in MLflow

Models that others trained are read where they lie: in folders that `save_pretrained` of this
project or of transformers wrote, and by their names on the Hugging Face Hub, as `hf:NAME`.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from pipelines.common import storage
from pipelines.common.config import fingerprint
from stgt.errors import CheckpointError, SettingError

if TYPE_CHECKING:
    import torch

    from stgt.interface.inputs import TextTokenizer, VideoTextConfig
    from stgt.interface.model import VideoTextModel


COMPLETE = "COMPLETE"

OPTIMIZER = "optimizer.safetensors"

VOCAB = "vocab.txt"

WEIGHTS = "model.safetensors"

FRAME_ENCODER = "frame_encoder.safetensors"

STATE = "state.json"

CONFIG = "config.json"

PREFIX = "step-"

STEP = re.compile(r"step-\d{8}")

CHECKPOINTS = "checkpoints"

BEST = "best.json"

HUB = "hf:"
"""Beginning of the name of a model on the Hugging Face Hub."""

HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
"""Files of a model on the hub that are downloaded: no code and no pickled weights."""

SAFE = ".safetensors"

SMALL_HUB_FILES = ("*.json", "*.txt", "*.model")

NO_VOCABULARY = (
    "{uri} contains no {name}; copy the model's vocabulary there, or import the weights again with "
    "--vocab"
)


class State(TypedDict):
    """Contents of a checkpoint other than tensors."""

    step: int
    frame_encoder: str | None
    """Checkpoint that stores the frozen frame encoder, if this one omits it."""
    scaler: dict[str, float]
    """State of the fp16 loss scaler; empty for other precisions."""
    skipped: int
    """Number of clips skipped so far because they could not be used."""
    vocabulary: str | None
    """Fingerprint of the vocabulary that the model was trained with; None if unknown."""


def save(
    uri: str,
    model: VideoTextModel,
    tokenizer: TextTokenizer,
    step: int,
    optimizer: torch.optim.Optimizer | None = None,
    frame_encoder: str | None = None,
    scaler: Mapping[str, float] | None = None,
    skipped: int = 0,
) -> None:
    """Write a checkpoint without a frozen frame encoder, and its completion marker last.

    Args:
        uri: the checkpoint's folder.
        model: the model.
        tokenizer: the model's tokenizer, whose vocabulary is saved.
        step: number of steps trained.
        optimizer: the optimizer whose state is saved; None if training will not be resumed.
        frame_encoder: the checkpoint that stores the frozen encoder.
        scaler: state of the fp16 loss scaler.
        skipped: number of clips skipped so far because they could not be used.
    """
    from stgt.model_folder import save_model, save_optimizer

    storage.remove(uri)  # remains of an interrupted run
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(model, folder)
        tokenizer.save_to(folder)
        if optimizer is not None:
            save_optimizer(optimizer, folder / OPTIMIZER)
        state = State(
            step=step,
            frame_encoder=frame_encoder,
            scaler=dict(scaler or {}),
            skipped=skipped,
            vocabulary=vocabulary_of(tokenizer),
        )
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
        storage.upload_folder(folder, uri, COMPLETE)


def save_frozen_encoder(uri: str, model: VideoTextModel) -> None:
    """Write the frozen frame encoder of a model into a folder of its own, once for all checkpoints.

    Args:
        uri: The folder.
        model: The model, with weights in the precision in which they were loaded.
    """
    from stgt.model_folder import save_model

    storage.remove(uri)  # remains of an interrupted run
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(model, folder, with_frozen=True)
        (folder / WEIGHTS).unlink()  # the trained tensors are in each checkpoint
        storage.upload_folder(folder, uri, COMPLETE)


def vocabulary_of(tokenizer: TextTokenizer) -> str:
    """Return a fingerprint of a tokenizer's vocabulary."""
    return fingerprint(tokenizer.entries())


def require(uri: str) -> None:
    """Check that a checkpoint exists and is complete.

    Raises:
        CheckpointError: The checkpoint is missing or has no completion marker.
    """
    if is_hub_name(uri) or storage.exists(storage.join(uri, COMPLETE)):
        return
    # Models that others saved have no marker. A checkpoint whose writing was interrupted has none
    # either, and is known by its name or by the files that only checkpoints have.
    names = storage.list_names(uri)
    is_ours = STATE in names or OPTIMIZER in names or bool(STEP.fullmatch(storage.name_of(uri)))
    if CONFIG not in names or is_ours:
        raise CheckpointError(
            f"{uri} has no {COMPLETE} marker: it is not a checkpoint, or it was not written "
            f"completely; give a folder {PREFIX}NNNNNNNN that contains the marker"
        )
    values = _config_of(uri)
    if "model" not in values:
        _hub_module(uri, values).check_files(names, uri)


def fetch(uri: str, scratch: Path) -> Path:
    """Provide a complete checkpoint as a local folder.

    Raises:
        CheckpointError: The checkpoint is missing or has no completion marker.
    """
    require(uri)
    if is_hub_name(uri):
        return _snapshot(uri, HUB_FILES)
    if storage.is_local(uri) or not is_of_hub(uri):
        return storage.download_folder(uri, scratch)
    # Folders of the hub also contain the same weights in other forms, and folders.
    scratch.mkdir(parents=True, exist_ok=True)
    for name in storage.list_names(uri):
        if any(fnmatch.fnmatch(name, pattern) for pattern in HUB_FILES):
            storage.fetch_file(storage.join(uri, name), scratch / name)
    return scratch


def pinned(uri: str) -> str:
    """Return the name of a model on the hub with its commit, which all processes then read.

    Raises:
        CheckpointError: The hub cannot be reached, or has no model of this name.
    """
    name, _, _ = uri.removeprefix(HUB).partition("@")
    return f"{HUB}{name}@{_snapshot(uri, SMALL_HUB_FILES).name}"


def is_hub_name(uri: str) -> bool:
    """Return whether a model is given by its name on the Hugging Face Hub."""
    return uri.startswith(HUB)


def _snapshot(uri: str, patterns: Sequence[str]) -> Path:
    """Download files of a model on the hub to its local cache, unless they are there.

    Raises:
        CheckpointError: The hub cannot be reached, or has no model of this name.
    """
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    name, _, revision = uri.removeprefix(HUB).partition("@")
    try:
        found = snapshot_download(name, revision=revision or None, allow_patterns=list(patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{uri} cannot be downloaded from the Hugging Face Hub ({reason}); check the name and "
            "the connection, or give a folder with the model's files"
        ) from error
    names = [path.name for path in Path(found).iterdir()]
    if not any(name.endswith(SAFE) for name in names) and any(SAFE in one for one in patterns):
        with contextlib.suppress(HfHubHTTPError, OfflineModeIsEnabled):  # the files that are there
            names += list_repo_files(name, revision=revision or None)
    if (Path(found) / CONFIG).is_file():
        values = _parsed(uri, (Path(found) / CONFIG).read_bytes())
        if "model" not in values and any(SAFE in one for one in patterns):
            _hub_module(uri, values).check_files(names, uri)
    return Path(found)


@contextlib.contextmanager
def small_files(uri: str) -> Iterator[Path]:
    """Provide a model's configs and tokenizer as a local folder, without its weights."""
    if is_hub_name(uri):
        yield _snapshot(uri, SMALL_HUB_FILES)
        return
    if storage.is_local(uri):
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory() as name:
        for one in storage.list_names(uri):
            if one.endswith((".json", ".txt", ".model")):
                (Path(name) / one).write_bytes(storage.read_bytes(storage.join(uri, one)))
        yield Path(name)


def is_of_hub(uri: str) -> bool:
    """Return whether a model is in the form of the hub, and not in a folder of this project."""
    return "model" not in _config_of(uri)


def _config_of(uri: str) -> dict[str, Any]:
    if is_hub_name(uri):
        path = _snapshot(uri, SMALL_HUB_FILES) / CONFIG
        if not path.is_file():
            raise CheckpointError(
                f"{uri} contains no {CONFIG}, so it is no model in the form of transformers; give "
                "another name"
            )
        return _parsed(uri, path.read_bytes())
    return _parsed(uri, storage.read_bytes(storage.join(uri, CONFIG)))


def _parsed(uri: str, content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except ValueError as error:
        raise CheckpointError(
            f"{uri}: {CONFIG} is not JSON ({error}); copy the model's folder again"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{uri}: {CONFIG} holds no settings; copy the model's folder again")
    return values


def model_config(uri: str) -> VideoTextConfig:
    """Read the config of a model: of a checkpoint, or of one that others trained.

    Raises:
        CheckpointError: The config cannot be used, or the architecture is not supported.
    """
    from stgt.interface.kinds import config_from_dict

    values = _config_of(uri)
    if "model" not in values:
        with small_files(uri) as folder:
            return _hub_module(uri, values).read_config(folder)
    try:
        return config_from_dict(values["model"], uri)
    except (TypeError, KeyError, AttributeError, SettingError) as error:
        raise CheckpointError(
            f"{storage.join(uri, CONFIG)} is not a valid config of a model: {error}"
        ) from error


def _hub_module(uri: str, values: Mapping[str, Any]) -> Any:
    """Return the module that reads a model in the form of the hub.

    Raises:
        CheckpointError: The architecture is not supported.
    """
    from stgt.interface.kinds import hub_module, known_hub_types

    name = values.get("model_type")
    if name == "siglip2":
        raise CheckpointError(
            f"{uri} is a SigLIP 2 of the NaFlex variant, whose frames have no fixed resolution and "
            "which is not supported; use a variant with a fixed resolution, such as "
            "siglip2-base-patch16-224"
        )
    if (module := hub_module(name)) is None:
        raise CheckpointError(
            f"{uri} holds a model of the type {name!r}, which is not supported; models of the hub "
            f"may be {', '.join(known_hub_types())}"
        )
    return module


def open_tokenizer_of(uri: str) -> TextTokenizer:
    """Load the tokenizer of a model.

    Raises:
        CheckpointError: It is missing, or it is not the one that the model was trained with.
    """
    from stgt.inputs.hub_tokenizer import load_tokenizer

    values = _config_of(uri)
    with small_files(uri) as folder:
        if "model" not in values:
            return _hub_module(uri, values).read_tokenizer(folder)
        try:
            tokenizer = load_tokenizer(folder)
        except SettingError as error:
            if not (folder / VOCAB).exists():
                raise CheckpointError(NO_VOCABULARY.format(uri=uri, name=VOCAB)) from error
            raise
    _check_tokenizer(uri, tokenizer, model_config(uri))
    return tokenizer


def fetch_with_encoder(uri: str, encoder: str | None, scratch: Path) -> tuple[Path, Path | None]:
    """Provide a complete checkpoint and the one with its frozen frame encoder as local folders.

    Args:
        uri: the checkpoint.
        encoder: the checkpoint with the frozen frame encoder, as returned by `frame_encoder_of`.
        scratch: folder for copies of remote checkpoints.

    Returns:
        The checkpoint's folder and the encoder's folder, which is None if it is the same one.

    Raises:
        CheckpointError: One of the checkpoints is missing or has no completion marker.
    """
    folder = fetch(uri, scratch / "checkpoint")
    if encoder is None or encoder == uri:
        return folder, None
    return folder, fetch(encoder, scratch / "frame_encoder")


def read_state(uri: str) -> State:
    """Read the state of a complete checkpoint."""
    return storage.read_json(storage.join(uri, STATE))


def frame_encoder_of(uri: str) -> str | None:
    """Return the checkpoint that stores a checkpoint's frozen frame encoder; None if not frozen."""
    if is_hub_name(uri):
        return None
    if storage.exists(storage.join(uri, FRAME_ENCODER)):
        return uri
    if not storage.exists(storage.join(uri, STATE)):
        return None  # a model that others saved
    return read_state(uri)["frame_encoder"]


def weights_version(uri: str) -> str:
    """Return a text that changes when the weights of a model change."""
    if is_hub_name(uri):
        return _snapshot(uri, SMALL_HUB_FILES).name  # the commit
    weights = storage.join(uri, WEIGHTS)
    names = [WEIGHTS] if storage.exists(weights) else sorted(storage.list_names(uri))
    if names == [WEIGHTS]:
        return storage.version(weights)
    parts = [name for name in names if name.endswith(".safetensors")]
    return fingerprint([storage.version(storage.join(uri, name)) for name in parts])


def _weight_files(uri: str) -> list[str]:
    """Return the files with a model's weights, including those of its frozen frame encoder."""
    names = [name for name in storage.list_names(uri) if name in (WEIGHTS, FRAME_ENCODER)]
    if not names:  # a model that others saved may have several files
        names = sorted(name for name in storage.list_names(uri) if name.endswith(SAFE))
    files = [storage.join(uri, name) for name in names]
    encoder = frame_encoder_of(uri)
    if encoder is not None and encoder != uri:
        files.append(storage.join(encoder, FRAME_ENCODER))
    return files


def weights_bytes(uri: str) -> int:
    """Return the size of a model's weights, including its frozen frame encoder, in bytes."""
    folder = str(_snapshot(uri, HUB_FILES)) if is_hub_name(uri) else uri
    return sum(storage.size_bytes(file) for file in _weight_files(folder))


def weights_digest(uri: str) -> str:
    """Return a short hash of the contents of a model's weights, which copies share.

    The files are read completely.
    """
    folder = str(_snapshot(uri, HUB_FILES)) if is_hub_name(uri) else uri
    return fingerprint([storage.digest(file) for file in _weight_files(folder)])


def load(uri: str) -> tuple[VideoTextModel, TextTokenizer]:
    """Load the model and the tokenizer of a checkpoint, or of a model that others trained.

    Raises:
        CheckpointError: The checkpoint is incomplete, or its vocabulary is missing or wrong.
    """
    from stgt.model_folder import load_model

    if not is_hub_name(uri):
        uri = storage.resolve(uri)
    with tempfile.TemporaryDirectory() as scratch:
        folder, encoder_folder = fetch_with_encoder(uri, frame_encoder_of(uri), Path(scratch))
        if is_of_hub(uri):
            model = _hub_module(uri, _config_of(uri)).load(folder)
            return model, model.tokenizer
        model = load_model(folder, encoder_folder)
        if model.tokenizer is None:
            raise CheckpointError(NO_VOCABULARY.format(uri=uri, name=VOCAB))
        _check_tokenizer(uri, model.tokenizer, model.config)
        return model, model.tokenizer


def check_vocabulary(uri: str) -> None:
    """Check that a complete checkpoint contains the vocabulary that its model was trained with.

    Raises:
        CheckpointError: The vocabulary is missing, or it is a different one.
    """
    open_tokenizer_of(uri)


def describe(uri: str) -> str:
    """Say which model a location holds, such as `CLIP (dual_encoder), in the form of the hub`."""
    config = model_config(uri)
    form = ", in the form of the hub" if is_of_hub(uri) else ""
    return f"{config.title} ({config.kind}){form}"


def _check_tokenizer(uri: str, tokenizer: TextTokenizer, config: VideoTextConfig) -> None:
    if (problem := config.tokenizer_problem(tokenizer)) is not None:
        raise CheckpointError(
            f"{uri}: {problem}; replace the file with the vocabulary that the model was trained "
            "with"
        )
    if is_hub_name(uri) or not storage.exists(storage.join(uri, STATE)):
        return
    trained_with = read_state(uri).get("vocabulary")  # older checkpoints lack this entry
    if trained_with is not None and trained_with != vocabulary_of(tokenizer):
        raise CheckpointError(
            f"{uri}: {VOCAB} is not the vocabulary that the model was trained with (its entries or "
            "their order differ); replace the file with that vocabulary"
        )
