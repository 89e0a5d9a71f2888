"""Decides where runs are recorded: settings, MLflow's environment variables, and defaults."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from pipelines.common import storage
from pipelines.common.config import TrackingConfig, keep_credentials, without_credentials
from pipelines.common.mlflow_errors import TrackingSettingError

logger = logging.getLogger(__name__)

DEFAULT_URI = "sqlite:///mlflow.db"
DEFAULT_EXPERIMENT = "stgt"
SQLITE = "sqlite:///"
SQLITE_HEADER = b"SQLite format 3\0"
SERVERS = frozenset({"http", "https", "databricks"})
DATABASES = frozenset({"sqlite", "postgresql", "mysql", "mssql"})
FILES = frozenset({"", "file"})
PLUGINS = "mlflow.tracking_store"
"""Group of entry points by which installed packages add support for a scheme to MLflow."""


def resolve(config: TrackingConfig) -> TrackingConfig:
    """Return the config with what the environment and the defaults add, for use in any process.

    A setting takes precedence over the environment, and the environment over the default. MLflow
    itself reads MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN and its
    variables for TLS.

    Raises:
        TrackingSettingError: MLflow cannot record at this URI.
    """
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    keep_credentials(uri)
    uri = absolute(uri)
    _check_uri(uri)
    experiment, experiment_id = config.experiment, config.experiment_id
    if experiment is None and experiment_id is None:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or None
        if experiment is None:
            experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID") or None
        if experiment is None and experiment_id is None:
            experiment = DEFAULT_EXPERIMENT
    return replace(config, uri=uri, experiment=experiment, experiment_id=experiment_id)


@functools.cache
def say_what_is_not_used(uri: str) -> None:
    """Log which of MLflow's variables do not apply, once per tracking URI."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given and absolute(given) != uri:
        logger.info(
            "runs are recorded in %s, since tracking.uri is set; MLFLOW_TRACKING_URI is not used",
            uri,
        )
    if os.environ.get("MLFLOW_RUN_ID"):
        logger.warning("MLFLOW_RUN_ID is not used, since every stage records a run of its own")


def absolute(uri: str) -> str:
    """Return a tracking URI without credentials and with an absolute path, if it has a path."""
    bare = without_credentials(uri)
    if bare.startswith(SQLITE):
        return f"{SQLITE}{storage.resolve(bare.removeprefix(SQLITE))}"
    if scheme_of(bare) in FILES and bare:
        return Path(storage.resolve(bare)).as_uri()
    return bare


def scheme_of(uri: str) -> str:
    """Return the kind of store that a tracking URI names; empty for a path."""
    if uri == "databricks":
        return uri
    return uri.partition("://")[0].partition("+")[0].lower() if "://" in uri else ""


def _check_uri(uri: str) -> None:
    """Check what can be checked of a tracking URI without connecting to it."""
    scheme = scheme_of(uri)
    if scheme in FILES and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in (
        "true",
        "1",
    ):
        raise TrackingSettingError(
            f"tracking.uri = {uri!r}: MLflow no longer records to folders by default; use "
            "sqlite:///FILE, or set the environment variable MLFLOW_ALLOW_FILE_STORE to true"
        )
    if scheme == "sqlite":
        if not uri.startswith(SQLITE):
            raise TrackingSettingError(f"tracking.uri = {uri!r}: write it as sqlite:///FILE")
        _check_database(Path(uri.removeprefix(SQLITE).partition("?")[0]))
    elif scheme not in SERVERS | DATABASES | FILES and not _has_plugin(scheme):
        raise TrackingSettingError(
            f"tracking.uri = {uri!r}: MLflow does not support {scheme}://; use a server's http(s) "
            "address, or sqlite:///FILE for a local file"
        )


def _check_database(path: Path) -> None:
    if path.is_dir():
        raise TrackingSettingError(
            f"tracking.uri: {path} is a folder; give a file, such as {path / 'mlflow.db'}"
        )
    try:
        with path.open("rb") as file:
            header = file.read(len(SQLITE_HEADER))
    except OSError:
        return  # it does not exist yet, or opening the run will report why it cannot be read
    if header not in (b"", SQLITE_HEADER):
        raise TrackingSettingError(
            f"tracking.uri: {path} is not an SQLite database; give another file"
        )


def _has_plugin(scheme: str) -> bool:
    """Return whether an installed plugin of MLflow adds support for a scheme."""
    return bool(metadata.entry_points(group=PLUGINS, name=scheme))
