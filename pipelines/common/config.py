"""Configs of all stages: frozen dataclasses whose field docs become the command line's help.

A config is complete: with the same config and the same input a stage gives the same output.
Those of training are in `pipelines.train_config`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Refuse a value of a field, in one sentence."""
    if not condition:
        raise ValueError(f"{name} = {value!r}: {rule}")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain values, for JSON."""
    return asdict(config)


def fingerprint(values: Any) -> str:
    """A short hash of plain values, independent of the order of keys."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one level with dotted names, the names of the command line."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs are recorded."""

    uri: str = "sqlite:///mlflow.db"
    """MLflow tracking URI: a server's http(s) address, or sqlite:///FILE for a local file."""
    experiment: str = "stgt"
    """MLflow experiment."""
    artifact_uri: str | None = None
    """Where a new experiment keeps its artifacts; None leaves it to MLflow."""
