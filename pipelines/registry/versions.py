"""Registered models and their versions in MLflow's model registry.

One of the modules that import mlflow: the registry is another part of MLflow than the runs, which
`pipelines.common.tracking` writes.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.common import process_identity, tracking
from pipelines.common.config import TrackingConfig
from pipelines.common.mlflow_errors import MlflowUnavailableError, mlflow_errors
from stgt.errors import SettingError, STGTError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import Model

logger = logging.getLogger(__name__)

IDENTITY = "checkpoint.identity"
"""Tag with the hash of weights and settings, by which a version is found again."""
CHECKPOINT = "checkpoint.uri"
WEIGHTS = "weights"
"""Tag that says whether the version contains its weights or refers to them."""
EVALUATION, EVALUATION_RUN = "evaluation.uri", "evaluation.run_id"
VERSIONS = "mlflow.modelVersions"
"""Tag by which MLflow's page of an uploaded model links to its versions."""
MODEL_TYPE = "video-text-retrieval"
MOST_DESCRIPTION = 5000
"""Longest description of a version, in characters."""
SLOWEST_UPLOAD = 2_000_000
"""Bytes per second that an upload through a tracking server may fall to before it times out."""
UPLOAD_S = 120
PROGRESS_BAR = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
NO_SUCH_MODEL = "RESOURCE_DOES_NOT_EXIST"
NO_REGISTRY = frozenset({"ENDPOINT_NOT_FOUND", "FEATURE_DISABLED", "NOT_IMPLEMENTED"})
RUNS_SEARCHED, EXPERIMENTS_SEARCHED = 20, 1000


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    number: str
    tags: Mapping[str, str]
    run_id: str | None

    @property
    def uri(self) -> str:
        """URI by which MLflow loads the version."""
        return f"models:/{self.name}/{self.number}"

    def __str__(self) -> str:
        return f"version {self.number} of {self.name}"


class ModelRegistry:
    """The model registry of an MLflow server or file.

    Every method raises `MlflowUnavailableError` if MLflow cannot do what it is asked.
    """

    def __init__(self, client: MlflowClient, config: TrackingConfig) -> None:
        assert config.uri is not None
        self.uri = config.uri
        self._config = config
        self._client = client

    def aliases(self, name: str) -> dict[str, str]:
        """Return the version of each alias of a registered model; empty if there is no such model.

        Raises:
            STGTError: The server has no model registry.
        """
        from mlflow.exceptions import MlflowException

        with mlflow_errors(self.uri):
            try:
                found = self._client.get_registered_model(name)
            except MlflowException as error:
                if error.error_code == NO_SUCH_MODEL:
                    return {}
                if error.error_code in NO_REGISTRY or error.get_http_status_code() == 404:
                    raise STGTError(
                        f"MLflow at {self.uri} has no model registry; set --tracking.uri to a "
                        "server or database that has one"
                    ) from error
                raise
        return {alias: str(version) for alias, version in found.aliases.items()}

    def versions(self, name: str) -> list[Version]:
        """Return all versions of a registered model, the newest first."""
        with mlflow_errors(self.uri):
            found: list[Version] = []
            token: str | None = None
            while True:
                page = self._client.search_model_versions(f"name = '{name}'", page_token=token)
                found += [_version(one) for one in page]
                token = page.token
                if not token:
                    return sorted(found, key=lambda one: -int(one.number))

    def with_alias(self, name: str, alias: str) -> Version:
        """Return the version that an alias of a registered model refers to.

        Raises:
            STGTError: There is no such model or no such alias.
        """
        aliases = self.aliases(name)
        number = aliases.get(alias)
        if number is None:
            has = ", ".join(f"{one} (version {number})" for one, number in sorted(aliases.items()))
            raise STGTError(
                f"the registered model {name} in {self.uri} has no alias {alias}"
                f"{f'; it has {has}' if has else ''}; register a checkpoint under this name first"
            )
        with mlflow_errors(self.uri):
            return _version(self._client.get_model_version(name, number))

    def signature_of(self, version: Version) -> dict[str, Any] | None:
        """Return the signature of a version as plain values; None if it has none."""
        import mlflow.artifacts
        from mlflow.models import Model

        with mlflow_errors(self.uri), tempfile.TemporaryDirectory() as folder:
            place = mlflow.artifacts.download_artifacts(f"{version.uri}/MLmodel", dst_path=folder)
            found = Model.load(place).signature
        return None if found is None else found.to_dict()

    def set_alias(self, version: Version, alias: str) -> None:
        """Let an alias refer to a version."""
        with mlflow_errors(self.uri):
            self._client.set_registered_model_alias(version.name, alias, version.number)

    def describe(self, version: Version, description: str, tags: Mapping[str, str]) -> None:
        """Replace the description of a version and set some of its tags."""
        with mlflow_errors(self.uri):
            self._client.update_model_version(version.name, version.number, _shortened(description))
            for key, value in tags.items():
                if version.tags.get(key) != value:
                    self._client.set_model_version_tag(version.name, version.number, key, value)

    def knows_run(self, run_id: str) -> bool:
        """Return whether this MLflow has a run."""
        from mlflow.exceptions import MlflowException

        with mlflow_errors(self.uri):
            try:
                return self._client.get_run(run_id).info.lifecycle_stage == "active"
            except MlflowException as error:
                if error.error_code in (NO_SUCH_MODEL, "INVALID_PARAMETER_VALUE"):
                    return False
                raise

    def params_of(self, run_id: str) -> dict[str, str]:
        """Return the params of a run."""
        with mlflow_errors(self.uri):
            return dict(self._client.get_run(run_id).data.params)

    def latest_evaluation(self, checkpoint: str) -> str | None:
        """Return the id of the latest finished evaluation of a checkpoint; None without one."""
        quote = '"' if "'" in checkpoint else "'"
        with mlflow_errors(self.uri):
            experiments = self._client.search_experiments(max_results=EXPERIMENTS_SEARCHED)
            runs = self._client.search_runs(
                [one.experiment_id for one in experiments],
                f"params.checkpoint = {quote}{checkpoint}{quote} and "
                "attributes.status = 'FINISHED'",
                max_results=RUNS_SEARCHED,
                order_by=["attributes.start_time DESC"],
            )
            for run in runs:
                if {"metrics.json", "ranks.parquet"} <= {
                    one.path for one in self._client.list_artifacts(run.info.run_id)
                }:
                    return run.info.run_id
        return None

    def add(
        self,
        name: str,
        *,
        write: Callable[[Path, Model], None],
        run_id: str | None,
        step: int,
        tags: Mapping[str, str],
        params: Mapping[str, str],
        description: str,
        about: str,
    ) -> Version:
        """Upload a model and register it as a new version.

        The version is created after the upload, so that an interrupted upload leaves none. The next
        call for the same checkpoint removes what such an upload left, and goes on from a complete
        one.

        Args:
            name: Name of the registered model, which is created if it does not exist.
            write: Writes the folder of the model, given the folder and its description for MLflow.
            run_id: Training run that made the checkpoint, if this MLflow has it.
            step: Step of the checkpoint.
            tags: Tags of the version. IDENTITY identifies it.
            params: Facts about the model, for its page.
            description: Description of the version, in Markdown.
            about: Description of a new registered model.
        """
        from mlflow.exceptions import MlflowException

        with mlflow_errors(self.uri):
            if run_id is None:
                experiment = tracking.experiment_id(self._client, self._config)
            else:
                experiment = self._client.get_run(run_id).info.experiment_id
            model = self._uploaded(experiment, tags[IDENTITY])
        if model is None:
            model = self._upload(name, experiment, write, run_id, step, tags, params)
        with mlflow_errors(self.uri):
            try:
                self._client.create_registered_model(name, description=_shortened(about))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            version = _version(
                self._client.create_model_version(
                    name,
                    source=f"models:/{model.model_id}",
                    run_id=run_id,
                    tags=dict(tags),
                    description=_shortened(description),
                    model_id=model.model_id,
                )
            )
            link = [{"name": version.name, "version": version.number}]
            self._client.set_logged_model_tags(model.model_id, {VERSIONS: json.dumps(link)})
        return version

    def _uploaded(self, experiment: str, identity: str) -> LoggedModel | None:
        """Return a complete upload that has no version, and delete those that were cut off."""
        from mlflow.entities import LoggedModelStatus

        found = self._client.search_logged_models([experiment], f"tags.`{IDENTITY}` = '{identity}'")
        for model in found:
            if model.status == LoggedModelStatus.READY:
                return model
            if process_identity.judge(model.tags) == "dead":
                logger.info("removing an upload of this checkpoint that was interrupted")
                self._client.delete_logged_model(model.model_id)
        return None

    def _upload(
        self,
        name: str,
        experiment: str,
        write: Callable[[Path, Model], None],
        run_id: str | None,
        step: int,
        tags: Mapping[str, str],
        params: Mapping[str, str],
    ) -> LoggedModel:
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        with mlflow_errors(self.uri):
            model = self._client.create_logged_model(
                experiment,
                name,
                source_run_id=run_id,
                tags={**tags, **process_identity.own_identity()},
                params=dict(params),
                model_type=MODEL_TYPE,
            )
        try:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "model"
                write(
                    folder,
                    Model(
                        artifact_path=model.artifact_location,
                        model_uuid=model.model_id,
                        run_id=run_id,
                        model_id=model.model_id,
                    ),
                )
                size = sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())
                with mlflow_errors(self.uri), _patience_for(size):
                    self._client.log_model_artifacts(model.model_id, str(folder))
            with mlflow_errors(self.uri):
                model = self._client.finalize_logged_model(model.model_id, "READY")
                if run_id is not None:
                    self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
        except BaseException:
            self._discard(model)
            raise
        return model

    def _discard(self, model: LoggedModel) -> None:
        """Delete an upload that failed, as far as MLflow can be used."""
        try:
            with mlflow_errors(self.uri):
                self._client.delete_logged_model(model.model_id)
        except MlflowUnavailableError as error:
            logger.warning(
                "the incomplete upload %s could not be deleted (%s); it belongs to no version, and "
                "the next registration of this checkpoint deletes it",
                model.model_id,
                error.reason,
            )


@contextmanager
def open_registry(config: TrackingConfig) -> Iterator[ModelRegistry]:
    """Open the model registry of an MLflow server or file.

    Raises:
        MlflowUnavailableError: MLflow cannot be used.
        TrackingSettingError: MLflow cannot record at this URI.
    """
    os.environ.setdefault(PROGRESS_BAR, "false")  # it writes to standard error
    with tracking.connected(config) as (client, resolved):
        yield ModelRegistry(client, resolved)


@contextmanager
def _patience_for(size_bytes: int) -> Iterator[None]:
    """Raise the time limit of requests for an upload of some size.

    A server answers only after it has stored a file, so the usual limit is too short for gigabytes.
    """
    before = os.environ.get(TIMEOUT)
    needed = UPLOAD_S + size_bytes // SLOWEST_UPLOAD
    os.environ[TIMEOUT] = str(max(needed, int(before or 0)))
    try:
        yield
    finally:
        if before is None:
            del os.environ[TIMEOUT]
        else:
            os.environ[TIMEOUT] = before


def _version(found: ModelVersion) -> Version:
    return Version(found.name, str(found.version), dict(found.tags), found.run_id or None)


def _shortened(text: str) -> str:
    """Return a text in the length that MLflow allows."""
    cut = "\n\n(The model's README.md has the rest.)"
    if len(text) <= MOST_DESCRIPTION:
        return text
    return f"{text[: MOST_DESCRIPTION - len(cut)]}{cut}"


def require_same_signature(
    version: Version, known: Mapping[str, Any] | None, own: Mapping[str, Any]
) -> None:
    """Check that a new version may stand beside an existing one.

    Raises:
        SettingError: The existing version takes other inputs, parameters or outputs.
    """
    if known is None:
        raise SettingError(
            f"name = {version.name!r}: {version} has no signature, so it is another kind of model; "
            "register under another name"
        )
    parts = [part for part in ("inputs", "outputs", "params") if known.get(part) != own.get(part)]
    if parts:
        raise SettingError(
            f"name = {version.name!r}: {version} has another signature (its {', '.join(parts)} "
            "differ); register under another name, so that callers of this one keep working"
        )
