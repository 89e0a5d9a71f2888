"""Shared parts of stage configs: validation, serialization, and the settings of MLflow tracking.

Configs are frozen dataclasses whose field docs become command-line help. A config is complete: the
same config and the same input always produce the same output.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode

from stgt.errors import SettingError


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Raise a ValueError with the field's name, value and rule unless the condition holds."""
    if not condition:
        raise SettingError(f"{name} = {value!r}: {rule}")


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


def with_settings(config: Any, values: Mapping[str, Any]) -> Any:
    """Return a config with some settings replaced.

    Args:
        config: A config dataclass.
        values: New values by dotted name, such as `optim.lr`.

    Raises:
        SettingError: The config has no such setting, or refuses the combination.
    """
    changes = {name: value for name, value in values.items() if "." not in name}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        first, dot, rest = name.partition(".")
        if dot:
            nested.setdefault(first, {})[rest] = value
    for name in (*changes, *nested):
        if not hasattr(config, name):
            kind = getattr(config, "kind", None)
            what = "the config" if kind is None else f"a model of the kind {kind}"
            raise SettingError(f"{name}: {what} has no such setting")
    for first, below in nested.items():
        changes[first] = with_settings(getattr(config, first), below)
    return replace(config, **changes)


_USERINFO = re.compile(r"(?<=://)(?:[^:/?#\s\[]*:(?![0-9]{1,5}(?:[/?#]|$))\S*@|[^/?#\s]*@)")
"""User and password. A password may contain slashes, but a number before a slash is a port."""
_SECRET_PARAMETERS = re.compile(r"(?i)pass|pwd|secret|token|credential|signature|^user$|^sig$|key")
_PATH_PARAMETER = re.compile(r";([^;/=]*)=[^;/]*")
_QUERY_PARAMETER = re.compile(r";([^;&=]*)=[^;&]*")
_SECRET_VALUES = re.compile(
    r"(?i)((?:(?<=[?&;#])[\w.-]*(?:pass|pwd|secret|token|credential|signature|key)[\w.-]*|"
    r"\b(?:\w*[_-])?(?:password|passwd|pwd|secret|token|credential|signature|sig|access_?key|"
    r"api_?key|secret_?key))=)[^&\s'\"]+"
)
"""Values of secret parameters in any text: whatever resembles one in the parameters of a URI, and
whole words elsewhere, since settings such as `max_text_tokens` are no secrets. Parameters of URIs
that are known may have other names."""
_full_uris: dict[str, str] = {}
"""URIs of this process that contain credentials, by the same URI without them."""


def without_credentials(uri: str) -> str:
    """Return a URI without user name, password and secret parameters.

    Those of an address on the web may also stand in its path, after a semicolon, or after a #.
    """
    bare, hash_mark, fragment = _USERINFO.sub("", uri), "", ""
    if is_web := uri.lower().startswith(("http://", "https://")):
        bare, hash_mark, fragment = bare.partition("#")
    path, query_mark, query = bare.partition("?")
    if is_web:
        path = _PATH_PARAMETER.sub(_unless_secret, path)
    return _appended(_appended(path, query_mark, query), hash_mark, fragment)


def _unless_secret(parameter: re.Match[str]) -> str:
    return "" if _SECRET_PARAMETERS.search(parameter[1]) else parameter[0]


def _appended(uri: str, mark: str, parameters: str) -> str:
    """Return a URI with those of its parameters that are not secret, after a mark."""
    public = _QUERY_PARAMETER.sub(_unless_secret, parameters)
    pairs = parse_qsl(public, True)
    kept = [pair for pair in pairs if not _SECRET_PARAMETERS.search(pair[0])]
    if len(kept) < len(pairs):
        public = urlencode(kept)
    return f"{uri}{mark}{public}" if public or not parameters else uri


def with_credentials(uri: str) -> str:
    """Return the URI as it was given in this process, with its credentials if it has any."""
    return _full_uris.get(uri, uri)


def keep_credentials(uri: str) -> str:
    """Return a URI without its credentials, which `with_credentials` gives back."""
    bare = without_credentials(uri)
    if bare != uri:
        _full_uris[bare] = uri
    return bare


def hide_credentials(text: str) -> str:
    """Return a text, such as a library's message, with *** in place of all credentials."""
    for full in _full_uris.values():
        if found := _USERINFO.search(full):
            text = text.replace(found.group(), "***@")
        for pair in full.partition("?")[2].split("&"):
            name, _, value = pair.partition("=")
            if value and _SECRET_PARAMETERS.search(name):
                text = text.replace(pair, f"{name}=***")
    text = re.sub(r"(?<=://)[^/\s'\"]*@", "***@", text)
    return _SECRET_VALUES.sub(r"\1***", text)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs are recorded.

    Credentials in a URI, as in `http://user:password@host`, are kept in the memory of the process.
    The config itself never contains them, so they reach no file, log line or other process.
    """

    uri: str | None = None
    """MLflow server, http(s)://HOST, or local file, sqlite:///FILE. None takes MLFLOW_TRACKING_URI,
    or sqlite:///mlflow.db if that is not set."""
    experiment: str | None = None
    """Name of the MLflow experiment. None takes MLFLOW_EXPERIMENT_NAME, or stgt if that is not
    set."""
    experiment_id: str | None = None
    """Id of an existing MLflow experiment, instead of a name. None takes MLFLOW_EXPERIMENT_ID
    unless a name is set."""
    artifact_uri: str | None = None
    """Artifact location for a new experiment. None uses MLflow's default."""
    send_every_s: float = 30.0
    """Seconds between sending metrics to MLflow during training. They are also sent at every
    checkpoint."""
    system_metrics_every_s: float | None = None
    """Seconds that a value of the system metrics (CPU, memory, disk, network, GPUs) is the mean
    of; 0 turns them off. None takes MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL, or 30 if that is not
    set, unless MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING is false."""

    def __post_init__(self) -> None:
        require(
            self.send_every_s > 0, "tracking.send_every_s", self.send_every_s, "must be positive"
        )
        require(
            self.system_metrics_every_s is None or self.system_metrics_every_s >= 0,
            "tracking.system_metrics_every_s",
            self.system_metrics_every_s,
            "must not be negative",
        )
        require(
            self.experiment is None or self.experiment_id is None,
            "tracking.experiment_id",
            self.experiment_id,
            "must not be set together with tracking.experiment",
        )
        for name in ("uri", "artifact_uri"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, keep_credentials(value))
