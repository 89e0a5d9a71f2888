"""Shared parts of stage configs: validation, serialization, and the settings of MLflow tracking.

Configs are frozen dataclasses whose field docs become command-line help. A config is complete: the
same config and the same input always produce the same output.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Raise a ValueError with the field's name, value and rule unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} = {value!r}: {rule}")


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to nested plain values for JSON."""
    return asdict(config)


def fingerprint(values: Any) -> str:
    """Return a short hash of plain values; the order of keys does not matter."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to one level with dotted names, as used on the command line."""
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
    """Name of the MLflow experiment."""
    artifact_uri: str | None = None
    """Artifact location for a new experiment. None uses MLflow's default."""
