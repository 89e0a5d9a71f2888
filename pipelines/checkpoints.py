"""Checkpoints of a training run: whole or absent, found and pruned by their step.

Layout below the run's folder:
    checkpoints/step-00000100/   model, vocabulary, optimizer, state.json; COMPLETE, written last
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
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
STATE = "state.json"
PREFIX = "step-"


History = Sequence[tuple[int, Mapping[str, float]]]
"""Metrics of steps: (step, {name: value})."""


class State(TypedDict):
    """What a checkpoint knows beside tensors."""

    step: int
    history: list[tuple[int, dict[str, float]]]
    """Metrics of the steps since the checkpoint before."""


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
    history: History = (),
) -> None:
    """Write a checkpoint, its completion marker last."""
    from stgt.checkpoint import save_model, save_optimizer

    storage.remove(uri)  # what an interrupted run left there
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(model, folder)
        tokenizer.save(folder / VOCAB)
        if optimizer is not None:
            save_optimizer(optimizer, folder / OPTIMIZER)
        (folder / STATE).write_text(
            json.dumps({"step": step, "history": list(history)}), encoding="utf-8"
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


def load(uri: str) -> tuple[STGT, Tokenizer]:
    """The model and the tokenizer of a checkpoint."""
    from stgt.checkpoint import load_model
    from stgt.text import Tokenizer

    with tempfile.TemporaryDirectory() as scratch:
        folder = fetch(storage.resolve(uri), Path(scratch) / "checkpoint")
        return load_model(folder), Tokenizer(folder / VOCAB)
