"""The quickstart's folder: what it holds, whose it is, and how it is emptied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.common import storage
from pipelines.common.config import to_dict
from pipelines.common.output_folder import CONFIG, claim_folder, config_record
from pipelines.quickstart.config import QuickstartConfig
from stgt.errors import STGTError

CLAIM = "quickstart.json"
RESULT = "result.json"
RUN = "mlflow_run.json"
MADE = (
    RESULT,
    RUN,
    "evaluation",
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
"""What the quickstart makes in its folder, which --fresh deletes: the result first, and last what
says whose folder it is, so that a kill between them leaves no result without what it came from."""
FREE_BYTES = 500 * 1024**2


def claim(config: QuickstartConfig, folder: str) -> None:
    """Start over when asked to; refuse a folder that holds a run with other settings."""
    uri = storage.join(folder, CLAIM)
    values = to_dict(config)
    values.pop("fresh")
    values["output"] = folder
    if config.fresh:
        names = storage.list_names(folder)
        for name in names:
            if name.endswith(storage.GONE):  # left by a kill
                storage.remove(storage.join(folder, name))
        # Hidden files are no one's work: the lock is one.
        if not storage.exists(uri) and any(not name.startswith(".") for name in names):
            raise STGTError(
                f"{folder} was not made by the quickstart (it holds no {CLAIM}), so --fresh does "
                "not empty it; choose another --output"
            )
        for name in MADE:
            storage.remove(storage.join(folder, name))
    is_new = not storage.exists(uri)

    def refuse(found: Mapping[str, Any], differing: list[str]) -> STGTError:
        return STGTError(
            f"{folder} holds a quickstart with other settings ({', '.join(differing)}); "
            "add --fresh to start over, or choose another --output"
        )

    if not is_new:
        claim_folder(folder, CLAIM, values, refuse)
        return
    free = storage.free_bytes(folder)
    if free is not None and free < FREE_BYTES:
        raise STGTError(
            f"{folder} has {free / 1024**2:.0f} MB of free space, the quickstart needs "
            f"{FREE_BYTES / 1024**2:.0f} MB; free some or choose another --output"
        )
    claim_folder(folder, CLAIM, values, refuse)
    storage.write_json(storage.join(folder, CONFIG), config_record("quickstart", config))
