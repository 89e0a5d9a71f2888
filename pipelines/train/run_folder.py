"""Manages the folder of a training run: its checkpoints, the best of them, and its config."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

from pipelines.artifacts.checkpoints import BEST, CHECKPOINTS, COMPLETE, PREFIX
from pipelines.common import storage
from pipelines.common.config import flatten, to_dict
from pipelines.common.output_folder import CONFIG, claim_folder, config_record, settings_of
from pipelines.train import metrics_log
from pipelines.train.config import TrainConfig
from pipelines.train.metrics_log import MeasuredOn, StepRecord
from pipelines.train.recipes import EARLIER_SETTINGS, with_earlier_settings
from stgt.errors import CheckpointError
from stgt.field_marks import (
    FieldMark,
    earlier_values,
    is_below,
    marked_fields,
    with_earlier_values,
)

RESULT = "result.json"
logger = logging.getLogger(__name__)


class _Measured(TypedDict):
    step: int
    metric: str
    value: float


class Best(_Measured, total=False):
    """The checkpoint with the highest validation metric."""

    measured_on: MeasuredOn
    """Missing in runs of earlier versions, whose values are all compared."""


def checkpoint_uri(run_uri: str, step: int) -> str:
    """Return the URI of the checkpoint after `step` steps."""
    return storage.join(run_uri, CHECKPOINTS, f"{PREFIX}{step:08d}")


def encoder_uri(run_uri: str) -> str:
    """Return the folder in which a run keeps its frozen frame encoder.

    Only runs whose initial checkpoint has trained the encoder have one.
    """
    return storage.join(run_uri, "frame_encoder")


def complete_steps(run_uri: str) -> list[int]:
    """Return the steps with a complete checkpoint, in ascending order."""
    folder = storage.join(run_uri, CHECKPOINTS)
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


def record_if_best(config: TrainConfig, row: StepRecord) -> str | None:
    """Record a complete checkpoint as the best if it is better; ties keep the earlier one.

    If the known best was measured on other clips, its value cannot be compared, and the choice
    starts over.

    Args:
        config: Config of the run.
        row: Metrics of the checkpoint's step.

    Returns:
        A message if the choice starts over, else None.
    """
    metric = config.best_metric
    if metric is None or metric not in row["metrics"]:
        return None
    now = Best(step=row["step"], metric=metric, value=row["metrics"][metric])
    if "measured_on" in row:
        now["measured_on"] = row["measured_on"]
    known = best(config.output)
    other_set = known is not None and not _same_set(known, now)
    if known is None or other_set or known["metric"] != metric or now["value"] > known["value"]:
        storage.write_json(storage.join(config.output, BEST), now)
    if known is None or not other_set:
        return None
    message = (
        f"the best checkpoint so far, step {known['step']} with {known['metric']} "
        f"{known['value']:.1f}, was measured on {_named(known)}, and validation now uses "
        f"{_named(now)}; these values cannot be compared, so the best is chosen anew from step "
        f"{now['step']}"
    )
    logger.warning("%s", message)
    return message


def _same_set(one: Best, other: Best) -> bool:
    sets = [best["measured_on"] for best in (one, other) if "measured_on" in best]
    return len(sets) < 2 or sets[0] == sets[1]


def _named(one: Best) -> str:
    measured_on = one.get("measured_on")
    assert measured_on is not None
    return f"{measured_on['clips']} clips ({measured_on['protocol']}; {measured_on['content']})"


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
    known = best(config.output)
    if config.best_metric is None and known is not None:
        # Otherwise the folder would stand for a checkpoint that this run no longer chooses.
        storage.remove(storage.join(config.output, BEST))
        return
    # Checkpoints before the best one were compared already, maybe on another set of clips.
    compared = known["step"] if known and known["metric"] == config.best_metric else 0
    for step in complete_steps(config.output):
        rows = metrics_log.read(config.output, step)
        if rows and step > compared:
            record_if_best(config, rows[-1])


def with_earlier_rules(config: TrainConfig, keep_recipe: bool = True) -> TrainConfig:
    """Return the config under the rules that the run in its output folder began with.

    Settings that the run's version did not have yet take the values that describe what it did, and
    settings that its recipe set otherwise keep their values.

    Args:
        config: Config with an absolute output folder.
        keep_recipe: Whether settings that the recipe set otherwise keep their values.
    """
    uri = storage.join(config.output, CONFIG)
    if latest(config.output) is None or not storage.exists(uri):
        return config
    record = settings_of(storage.read_json(uri))
    earlier = with_earlier_values(config, record)
    if keep_recipe:
        earlier = with_earlier_settings(earlier, record)
    ours = flatten(to_dict(config))
    theirs = flatten(to_dict(earlier))
    # Settings of other kinds of models are in neither.
    names = dict.fromkeys((*earlier_values(TrainConfig), *EARLIER_SETTINGS.get(config.recipe, {})))
    changed = [f"{name} = {theirs[name]}" for name in names if ours.get(name) != theirs.get(name)]
    if changed:
        logger.info(
            "%s was begun by an earlier version, or with its rules, and continues under them: %s; "
            "choose another --output to train under other rules",
            config.output,
            ", ".join(changed),
        )
    return earlier


def claim(config: TrainConfig, digest: str, features: str | None = None) -> bool:
    """Write the run's config, or check that a resumed run has the same settings and clips.

    Args:
        config: Config with absolute paths.
        digest: Digest of the clips. Clips that leave a store's quarantine change its shards, and
            with them the order of clips.
        features: Digest of the stored tokens that take the place of frames. None without them.

    Returns:
        Whether the run is new, or validates in another way than before.

    Raises:
        CheckpointError: The folder contains a run with different settings.
    """
    operational = frozenset(marked_fields(TrainConfig, FieldMark.OPERATIONAL))
    validation = frozenset(marked_fields(TrainConfig, FieldMark.VALIDATION))
    facts = {"data_digest": digest}
    if features is not None:  # what runs without features record stays as it was
        facts["features_digest"] = features
    record = config_record("train", replace(config, allow_changes=False), **facts)
    now = settings_of(record)
    # Settings of other kinds of models are not among them.
    earlier = {name: value for name, value in earlier_values(TrainConfig).items() if name in now}

    def described(found: Mapping[str, Any], differing: Sequence[str]) -> str:
        before = {**earlier, **settings_of(found)}
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
        compared=lambda one: {**earlier, **settings_of(one)},
        ignored=lambda name: is_below(name, operational),
        has_results=latest(config.output) is not None,
        overwrite=config.allow_changes,
    )
    if differing:
        logger.warning("continuing with changed settings: %s", described(found, differing))
        storage.remove(storage.join(config.output, RESULT))
    validates_otherwise = any(is_below(name, validation) for name in differing)
    return not found or validates_otherwise
