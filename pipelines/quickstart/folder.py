"""The quickstart's output folder: its files, and how it is claimed and emptied."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipelines.common import storage
from pipelines.common.config import to_dict
from pipelines.common.output_folder import (
    CONFIG,
    RUN,
    claim_folder,
    config_record,
    differing_names,
    settings_of,
)
from pipelines.quickstart.config import EARLIER_SIZES, QuickstartConfig
from stgt.errors import STGTError
from stgt.field_marks import earlier_values, with_earlier_values

logger = logging.getLogger(__name__)

CLAIM = "quickstart.json"
RESULT = "result.json"
PENDING = "mlflow_pending.json"
"""Exists while MLflow lacks some results (`recording`)."""
MADE = (
    RESULT,
    "side_by_side.json",
    RUN,
    PENDING,
    "comparison",
    "evaluation",
    "stage1_alpro",
    "stage1_clip",
    "stage2",
    "stage1",
    "untrained",
    "clips",
    "manifests",
    "annotations",
    "videos",
    "vocab.txt",
    "mlflow.db",
    "mlartifacts",
    CONFIG,
    CLAIM,
)
"""Files and folders that the quickstart creates, in the order in which --fresh deletes them.

The result is deleted first and the claim last: if --fresh is killed, no result remains without its
inputs, and the folder still counts as the quickstart's."""
FREE_BYTES = 500 * 1024**2


def with_earlier_settings(config: QuickstartConfig, folder: str) -> QuickstartConfig:
    """Return the config with the settings that an earlier version began the quickstart with.

    They replace today's defaults only: settings that were asked for are a change.
    """
    uri = storage.join(folder, CLAIM)
    if config.fresh or not storage.exists(uri):
        return config
    found = settings_of(storage.read_json(uri))
    defaults, continued = QuickstartConfig(), with_earlier_values(config, found)
    for sizes in EARLIER_SIZES:
        if all(
            found.get(name) == size and getattr(config, name) == getattr(defaults, name)
            for name, size in sizes.items()
        ):
            continued = replace(continued, **sizes)
    if earlier := differing_names(to_dict(config), to_dict(continued), ().__contains__):
        logger.info(
            "%s was begun with other settings than today's defaults and continues with them: %s; "
            "add --fresh, or choose another --output, for the defaults",
            folder,
            ", ".join(f"{name} = {getattr(continued, name)}" for name in earlier),
        )
    return continued


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a record, with those that the version that wrote it did not have."""
    return earlier_values(QuickstartConfig) | settings_of(record)


def claim(config: QuickstartConfig, folder: str) -> None:
    """Claim the folder, after emptying it with `fresh`.

    Raises:
        STGTError: The folder holds a run with other settings, was not made by the quickstart, or
            has too little free space.
    """
    uri = storage.join(folder, CLAIM)
    values = to_dict(config)
    for name in ("fresh", "side_by_side"):  # may differ from run to run
        values.pop(name)
    values["output"] = folder
    if config.fresh:
        names = storage.list_names(folder)
        for name in names:
            if name.endswith(storage.GONE):  # half deleted by a killed run
                storage.remove(storage.join(folder, name))
        # Hidden files are ignored because the lock file is one of them.
        if not storage.exists(uri) and any(not name.startswith(".") for name in names):
            raise STGTError(
                f"{folder} was not made by the quickstart (it holds no {CLAIM}), so --fresh "
                "does not delete its files; choose another --output"
            )
        for name in MADE:
            storage.remove(storage.join(folder, name))
    is_new = not storage.exists(uri)

    def refuse(found: Mapping[str, Any], differing: list[str]) -> STGTError:
        return STGTError(
            f"{folder} holds a quickstart with other settings ({', '.join(differing)}); "
            "add --fresh to start over, or choose another --output"
        )

    # --fresh is asked for once: the recorded config must not empty the folder when it is used.
    record = config_record("quickstart", replace(config, fresh=False))
    if not is_new:
        claim_folder(folder, CLAIM, values, refuse, compared=_settings)
        storage.write_json(storage.join(folder, CONFIG), record)
        return
    free = storage.free_bytes(folder)
    if free is not None and free < FREE_BYTES:
        raise STGTError(
            f"{folder} has {free / 1024**2:.0f} MB of free space, but the quickstart needs "
            f"{FREE_BYTES / 1024**2:.0f} MB; free up space or choose another --output"
        )
    claim_folder(folder, CLAIM, values, refuse)
    storage.write_json(storage.join(folder, CONFIG), record)
