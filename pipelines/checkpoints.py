"""Checkpoints of a training run: whole or absent, found and pruned by their step.

Layout below the run's folder:
    checkpoints/step-00000100/   model, vocabulary, optimizer, state.json; COMPLETE, written last
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from pipelines import storage
from stgt.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from stgt.model import STGT
    from stgt.text import Tokenizer

# torch and the model are imported where they are used: the data stage asks for the latest step
# only, in several processes that would each spend seconds and half a gigabyte on them.

COMPLETE = "COMPLETE"
OPTIMIZER = "optimizer.safetensors"
VOCAB = "vocab.txt"
WEIGHTS = "model.safetensors"
FRAME_ENCODER = "frame_encoder.safetensors"
STATE = "state.json"
PREFIX = "step-"


class StepMetrics(TypedDict):
    """Metrics of one step."""

    step: int
    time_ms: int
    """When they were measured. Kept with them: what is sent again after a crash is then the same,
    and MLflow enters it once."""
    metrics: dict[str, float]


class State(TypedDict):
    """What a checkpoint knows beside tensors."""

    step: int
    history: list[StepMetrics]
    """Metrics of the steps since the checkpoint before."""
    frame_encoder: str | None
    """Where the frozen frame encoder lies that this checkpoint leaves out."""


def checkpoint_uri(run_uri: str, step: int) -> str:
    """Where the checkpoint after `step` steps lies."""
    return storage.join(run_uri, "checkpoints", f"{PREFIX}{step:08d}")


def complete_steps(run_uri: str) -> list[int]:
    """Steps that have a complete checkpoint, ascending."""
    folder = storage.join(run_uri, "checkpoints")
    return [
        int(name.removeprefix(PREFIX))
        for name in storage.list_names(folder)
        if name.startswith(PREFIX) and storage.exists(storage.join(folder, name, COMPLETE))
    ]


def latest(run_uri: str) -> int | None:
    """Step of the latest complete checkpoint."""
    steps = complete_steps(run_uri)
    return steps[-1] if steps else None


def save(
    uri: str,
    model: STGT,
    tokenizer: Tokenizer,
    step: int,
    optimizer: torch.optim.Optimizer | None = None,
    history: Sequence[StepMetrics] = (),
    frame_encoder: str | None = None,
) -> None:
    """Write a checkpoint, its completion marker last; a frozen frame encoder is left out.

    Args:
        uri: the checkpoint's folder.
        model: its model.
        tokenizer: the vocabulary that goes with it.
        step: steps trained.
        optimizer: its state, to resume from.
        history: metrics of the steps since the checkpoint before.
        frame_encoder: the checkpoint that holds the frozen encoder.
    """
    from stgt.checkpoint import save_model, save_optimizer

    storage.remove(uri)  # what an interrupted run left there
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(model, folder)
        tokenizer.save(folder / VOCAB)
        if optimizer is not None:
            save_optimizer(optimizer, folder / OPTIMIZER)
        (folder / STATE).write_text(
            json.dumps({"step": step, "history": list(history), "frame_encoder": frame_encoder}),
            encoding="utf-8",
        )
        storage.upload_folder(folder, uri, COMPLETE)


def prune(run_uri: str, keep: int) -> None:
    """Delete all but the latest `keep` complete checkpoints."""
    for step in complete_steps(run_uri)[: -max(1, keep)]:
        uri = checkpoint_uri(run_uri, step)
        # The marker goes first: a half-deleted checkpoint must not count as one.
        storage.remove(storage.join(uri, COMPLETE))
        storage.remove(uri)


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


def read_state(uri: str) -> State:
    """Step and metrics of a complete checkpoint."""
    return storage.read_json(storage.join(uri, STATE))


def frame_encoder_of(uri: str) -> str | None:
    """The checkpoint that holds a checkpoint's frozen frame encoder; None when it has none."""
    if storage.exists(storage.join(uri, FRAME_ENCODER)):
        return uri
    return read_state(uri)["frame_encoder"]


def last_metrics(state: State) -> dict[str, float]:
    """Metrics of a checkpoint's own step."""
    return state["history"][-1]["metrics"] if state["history"] else {}


def load(uri: str) -> tuple[STGT, Tokenizer]:
    """The model and the tokenizer of a checkpoint.

    Raises:
        CheckpointError: it is not complete, or holds no vocabulary.
    """
    from stgt.checkpoint import load_model

    uri = storage.resolve(uri)
    with tempfile.TemporaryDirectory() as scratch:
        folder = fetch(uri, Path(scratch) / "checkpoint")
        encoder = frame_encoder_of(uri)
        encoder_folder = None
        if encoder is not None and encoder != uri:
            encoder_folder = fetch(encoder, Path(scratch) / "frame_encoder")
        model = load_model(folder, encoder_folder)
        if model.tokenizer is None:
            raise CheckpointError(
                f"{uri} holds no {VOCAB}; copy the model's vocabulary there, or import the weights "
                "again with --vocab"
            )
        return model, model.tokenizer
