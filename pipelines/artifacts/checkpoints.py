"""Checkpoints of a training run: whole or absent, found and pruned by their step.

Layout below the run's folder:
    checkpoints/step-00000100/   model, vocabulary, optimizer, state.json; COMPLETE, written last
    best.json                    which of them has the highest validation metric
    mlflow_run.json              the run in MLflow
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

NO_VOCABULARY = (
    "{uri} holds no {name}; copy the model's vocabulary there, or import the weights again with "
    "--vocab"
)


class State(TypedDict):
    """What a checkpoint knows beside tensors."""

    step: int
    frame_encoder: str | None
    """Where the frozen frame encoder lies that this checkpoint leaves out."""
    scaler: dict[str, float]
    """State of fp16's loss scale; empty in other precisions."""
    skipped: int
    """Clips so far that could not be used."""
    vocabulary: str | None
    """Fingerprint of the vocabulary that the model was trained with; None when it came without."""


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
    """Write a checkpoint, its completion marker last; a frozen frame encoder is left out.

    Args:
        uri: the checkpoint's folder.
        model: its model.
        tokenizer: the vocabulary that goes with it.
        step: steps trained.
        optimizer: its state, to resume from.
        frame_encoder: the checkpoint that holds the frozen encoder.
        scaler: state of fp16's loss scale.
        skipped: clips so far that could not be used.
    """
    from stgt.model_folder import save_model, save_optimizer

    storage.remove(uri)  # what an interrupted run left there
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
    """A fingerprint of a tokenizer's vocabulary."""
    return fingerprint(tokenizer.entries())


def require(uri: str) -> None:
    """Check that a checkpoint is there and complete.

    Raises:
        CheckpointError: it is missing or has no completion marker.
    """
    if not storage.exists(storage.join(uri, COMPLETE)):
        raise CheckpointError(
            f"{uri} has no {COMPLETE} marker: it is no checkpoint, or was not written to its end; "
            f"give a folder {PREFIX}NNNNNNNN that holds the marker"
        )


def fetch(uri: str, scratch: Path) -> Path:
    """A complete checkpoint as a local folder.

    Raises:
        CheckpointError: it is missing or has no completion marker.
    """
    require(uri)
    return storage.download_folder(uri, scratch)


def fetch_with_encoder(uri: str, encoder: str | None, scratch: Path) -> tuple[Path, Path | None]:
    """A complete checkpoint and the one that holds its frozen frame encoder, as local folders.

    Args:
        uri: the checkpoint.
        encoder: the checkpoint that holds the frozen frame encoder, as `frame_encoder_of` gives it.
        scratch: folder for copies of remote checkpoints.

    Returns:
        The checkpoint's folder, and the encoder's when it is another one.

    Raises:
        CheckpointError: one of them is missing or has no completion marker.
    """
    folder = fetch(uri, scratch / "checkpoint")
    if encoder is None or encoder == uri:
        return folder, None
    return folder, fetch(encoder, scratch / "frame_encoder")


def read_state(uri: str) -> State:
    """What a complete checkpoint knows beside tensors."""
    return storage.read_json(storage.join(uri, STATE))


def frame_encoder_of(uri: str) -> str | None:
    """The checkpoint that holds a checkpoint's frozen frame encoder; None when it has none."""
    if storage.exists(storage.join(uri, FRAME_ENCODER)):
        return uri
    return read_state(uri)["frame_encoder"]


def load(uri: str) -> tuple[STGT, Tokenizer]:
    """The model and the tokenizer of a checkpoint.

    Raises:
        CheckpointError: it is not complete, or holds no vocabulary or another one.
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
    """Check that a complete checkpoint holds the vocabulary that its model was trained with.

    Raises:
        CheckpointError: it holds none, or another one.
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
    trained_with = read_state(uri).get("vocabulary")  # older checkpoints do not say
    if len(tokenizer) != words:
        raise CheckpointError(
            f"{uri}: {VOCAB} has {len(tokenizer) - 1} entries, the model {words - 1}: it is not "
            "the vocabulary that the model was trained with; put that one there"
        )
    if trained_with is not None and trained_with != vocabulary_of(tokenizer):
        raise CheckpointError(
            f"{uri}: {VOCAB} is not the vocabulary that the model was trained with (other entries, "
            "or another order); put that one there"
        )
