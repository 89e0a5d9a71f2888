"""Reads and writes the checkpoints of a training run.

Layout of the run's folder:
    checkpoints/step-00000100/   model, vocabulary, optimizer, state.json; COMPLETE, written last
    best.json                    the checkpoint with the highest validation metric
    mlflow_run.json              the run's id in MLflow
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from pipelines.common import storage
from pipelines.common.config import fingerprint
from stgt.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from stgt.inputs.tokenizer import Tokenizer
    from stgt.model import STGT


COMPLETE = "COMPLETE"

OPTIMIZER = "optimizer.safetensors"

VOCAB = "vocab.txt"

WEIGHTS = "model.safetensors"

FRAME_ENCODER = "frame_encoder.safetensors"

STATE = "state.json"

PREFIX = "step-"

CHECKPOINTS = "checkpoints"

BEST = "best.json"

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
    model: STGT,
    tokenizer: Tokenizer,
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
        tokenizer.save(folder / VOCAB)
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


def vocabulary_of(tokenizer: Tokenizer) -> str:
    """Return a fingerprint of a tokenizer's vocabulary."""
    return fingerprint(tokenizer.entries())


def require(uri: str) -> None:
    """Check that a checkpoint exists and is complete.

    Raises:
        CheckpointError: The checkpoint is missing or has no completion marker.
    """
    if not storage.exists(storage.join(uri, COMPLETE)):
        raise CheckpointError(
            f"{uri} has no {COMPLETE} marker: it is not a checkpoint, or it was not written "
            f"completely; give a folder {PREFIX}NNNNNNNN that contains the marker"
        )


def fetch(uri: str, scratch: Path) -> Path:
    """Provide a complete checkpoint as a local folder.

    Raises:
        CheckpointError: The checkpoint is missing or has no completion marker.
    """
    require(uri)
    return storage.download_folder(uri, scratch)


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
    if storage.exists(storage.join(uri, FRAME_ENCODER)):
        return uri
    return read_state(uri)["frame_encoder"]


def load(uri: str) -> tuple[STGT, Tokenizer]:
    """Load the model and the tokenizer of a checkpoint.

    Raises:
        CheckpointError: The checkpoint is incomplete, or its vocabulary is missing or wrong.
    """
    from stgt.model import load_model

    uri = storage.resolve(uri)
    with tempfile.TemporaryDirectory() as scratch:
        folder, encoder_folder = fetch_with_encoder(uri, frame_encoder_of(uri), Path(scratch))
        model = load_model(folder, encoder_folder)
        if model.tokenizer is None:
            raise CheckpointError(NO_VOCABULARY.format(uri=uri, name=VOCAB))
        _check_vocabulary(uri, model.tokenizer, model.config.vocab_size)
        return model, model.tokenizer


def check_vocabulary(uri: str) -> None:
    """Check that a complete checkpoint contains the vocabulary that its model was trained with.

    Raises:
        CheckpointError: The vocabulary is missing, or it is a different one.
    """
    from stgt.inputs.tokenizer import Tokenizer

    vocab = storage.join(uri, VOCAB)
    if not storage.exists(vocab):
        raise CheckpointError(NO_VOCABULARY.format(uri=uri, name=VOCAB))
    words = storage.read_json(storage.join(uri, "config.json"))["model"]["vocab_size"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / VOCAB
        path.write_bytes(storage.read_bytes(vocab))
        _check_vocabulary(uri, Tokenizer(path), int(words))


def _check_vocabulary(uri: str, tokenizer: Tokenizer, words: int) -> None:
    trained_with = read_state(uri).get("vocabulary")  # older checkpoints lack this entry
    if len(tokenizer) != words:
        raise CheckpointError(
            f"{uri}: {VOCAB} has {len(tokenizer) - 1} entries, but the model has {words - 1}; "
            "replace the file with the vocabulary that the model was trained with"
        )
    if trained_with is not None and trained_with != vocabulary_of(tokenizer):
        raise CheckpointError(
            f"{uri}: {VOCAB} is not the vocabulary that the model was trained with (its entries or "
            "their order differ); replace the file with that vocabulary"
        )
