"""Where a checkpoint comes from: its training run, its data, and the checkpoints before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.artifacts import checkpoints
from pipelines.artifacts.locations import find_checkpoint
from pipelines.common import storage, tracking
from pipelines.common.output_folder import CONFIG, RECIPE, RUN, settings_of
from stgt.errors import STGTError

IMPORT_CONFIG = "import_config.json"
MOST_ANCESTORS = 10


@dataclass(frozen=True)
class Lineage:
    """Where a checkpoint comes from, as far as its folders say."""

    checkpoint: str
    step: int
    run: str | None
    """Folder of the training run; None for a checkpoint that lies in none."""
    run_id: str | None
    """Id of the training run in MLflow."""
    recipe: str | None
    data: tuple[str, ...]
    """Data sets that it was trained on."""
    data_digest: str | None
    settings: Mapping[str, Any]
    """Settings of the training run by dotted name; empty if they are unknown."""
    ancestors: tuple[str, ...]
    """What it began with, the latest first: checkpoints, and at the end imported weights."""


def lineage_of(checkpoint: str) -> Lineage:
    """Read where a complete checkpoint comes from."""
    run = _run_of(checkpoint)
    record = _record_of(run)
    settings = settings_of(record)
    data = settings.get("data") or ()
    return Lineage(
        checkpoint=checkpoint,
        step=checkpoints.read_state(checkpoint)["step"],
        run=run,
        run_id=None if run is None else tracking.recorded_run_id(storage.join(run, RUN)),
        recipe=record.get(RECIPE),
        data=(data,) if isinstance(data, str) else tuple(data),
        data_digest=settings.get("data_digest"),
        settings=settings,
        ancestors=tuple(_ancestors(checkpoint, settings)),
    )


def _run_of(checkpoint: str) -> str | None:
    """Return the folder of the training run that a checkpoint lies in; None if it lies in none."""
    parent = checkpoint.rstrip("/").rpartition("/")[0]
    return parent.rpartition("/")[0] if storage.name_of(parent) == checkpoints.CHECKPOINTS else None


def _record_of(run: str | None) -> dict[str, Any]:
    if run is None or not storage.exists(storage.join(run, CONFIG)):
        return {}
    found = storage.read_json(storage.join(run, CONFIG))
    return found if isinstance(found, dict) else {}


def _ancestors(checkpoint: str, settings: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    while len(found) < MOST_ANCESTORS:
        imported = storage.join(checkpoint, IMPORT_CONFIG)
        if storage.exists(imported):
            record = settings_of(storage.read_json(imported))
            files = [
                record[name]
                for name in ("checkpoint", "vision", "qformer", "bert")
                if record.get(name)
            ]
            return [*found, f"imported from {', '.join(map(str, files))}"] if files else found
        before = settings.get("init_from")
        if not before:
            return found
        try:
            checkpoint = find_checkpoint(before)
        except (STGTError, OSError):
            return [*found, f"{before} (not readable from here)"]
        found.append(checkpoint)
        settings = settings_of(_record_of(_run_of(checkpoint)))
    return found
