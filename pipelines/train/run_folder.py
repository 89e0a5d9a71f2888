"""Manages the folder of a training run: its checkpoints, the best of them, and its config."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

from pipelines.artifacts.checkpoints import COMPLETE, PREFIX
from pipelines.common import storage
from pipelines.common.output_folder import CONFIG, claim_folder, config_record, settings_of
from pipelines.train import metrics_log
from pipelines.train.config import TrainConfig
from stgt.errors import CheckpointError
from stgt.field_marks import FieldMark, is_below, marked_fields

BEST = "best.json"

RUN = "mlflow_run.json"
RESULT = "result.json"
logger = logging.getLogger(__name__)


class Best(TypedDict):
    """The checkpoint with the highest validation metric."""

    step: int
    metric: str
    value: float


def checkpoint_uri(run_uri: str, step: int) -> str:
    """Return the URI of the checkpoint after `step` steps."""
    return storage.join(run_uri, "checkpoints", f"{PREFIX}{step:08d}")


def complete_steps(run_uri: str) -> list[int]:
    """Return the steps with a complete checkpoint, in ascending order."""
    folder = storage.join(run_uri, "checkpoints")
    return [
        int(name.removeprefix(PREFIX))
        for name in storage.list_names(folder)
        if name.startswith(PREFIX) and storage.exists(storage.join(folder, name, COMPLETE))
    ]


def latest(run_uri: str) -> int | None:
    """Return the step of the latest complete checkpoint; None without one."""
    steps = complete_steps(run_uri)
    return steps[-1] if steps else None


def best(run_uri: str) -> Best | None:
    """Return the best checkpoint so far; None before the first validation."""
    uri = storage.join(run_uri, BEST)
    return storage.read_json(uri) if storage.exists(uri) else None


def record_if_best(run_uri: str, step: int, metric: str, value: float) -> None:
    """Record a complete checkpoint as the best if it is better; ties keep the earlier one."""
    known = best(run_uri)
    if known is None or known["metric"] != metric or value > known["value"]:
        storage.write_json(storage.join(run_uri, BEST), Best(step=step, metric=metric, value=value))


def prune(run_uri: str, keep: int) -> None:
    """Delete all complete checkpoints except the latest `keep` and the best."""
    known = best(run_uri)
    for step in complete_steps(run_uri)[: -max(1, keep)]:
        if known is not None and step == known["step"]:
            continue
        uri = checkpoint_uri(run_uri, step)
        # The marker first, so that a partly deleted checkpoint does not count as complete.
        storage.remove(storage.join(uri, COMPLETE))
        storage.remove(uri)


def record_best(config: TrainConfig) -> None:
    """Record the best of the complete checkpoints that were validated."""
    metric = config.best_metric
    for step in complete_steps(config.output):
        rows = metrics_log.read(config.output, step)
        if rows and metric in rows[-1]["metrics"]:
            record_if_best(config.output, step, metric, rows[-1]["metrics"][metric])


def claim(config: TrainConfig, digest: str) -> None:
    """Write the run's config, or check that a resumed run has the same settings and clips.

    Args:
        config: Config with absolute paths.
        digest: Digest of the clips. Clips that leave a store's quarantine change its shards, and
            with them the order of clips.

    Raises:
        CheckpointError: The folder contains a run with different settings.
    """
    operational = frozenset(marked_fields(TrainConfig, FieldMark.OPERATIONAL))
    validation = frozenset(marked_fields(TrainConfig, FieldMark.VALIDATION))
    record = config_record("train", replace(config, allow_changes=False), data_digest=digest)
    now = settings_of(record)

    def described(found: Mapping[str, Any], differing: Sequence[str]) -> str:
        before = settings_of(found)
        return "; ".join(
            f"{name}{' (validation)' if is_below(name, validation) else ''}: "
            f"{before.get(name)!r} -> {now.get(name)!r}"
            for name in differing
        )

    def refuse(found: Mapping[str, Any], differing: list[str]) -> CheckpointError:
        return CheckpointError(
            f"{config.output} contains a run with different settings "
            f"({described(found, differing)}); choose another --output, or add --allow-changes to "
            "continue with the new settings"
        )

    uri = storage.join(config.output, CONFIG)
    found = storage.read_json(uri) if storage.exists(uri) else {}
    differing = claim_folder(
        config.output,
        CONFIG,
        record,
        refuse,
        ignored=lambda name: is_below(name, operational),
        has_results=latest(config.output) is not None,
        overwrite=config.allow_changes,
    )
    if differing:
        logger.warning("continuing with changed settings: %s", described(found, differing))
        storage.remove(storage.join(config.output, RESULT))
