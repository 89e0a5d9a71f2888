"""MLflow's runs: configs, metrics, checkpoints, pictures, and where they come from.

One process at a time writes to a run. A run's id is kept beside its output, so that a resumed stage
continues the same run. Stages use `recording`, which continues when MLflow cannot be used.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from filelock import FileLock

from pipelines.common import process_identity, run_details, storage
from pipelines.common.config import (
    TrackingConfig,
    fingerprint,
    flatten,
    keep_credentials,
    with_credentials,
    without_credentials,
)
from pipelines.common.logged_checkpoints import Checkpoint, log_checkpoint
from pipelines.common.mlflow_errors import (
    REASON_CHARACTERS,
    TrackingSettingError,
    mlflow_errors,
)
from pipelines.common.provenance import About
from pipelines.common.redaction import without_secrets
from pipelines.common.tracking_uri import (
    DEFAULT_EXPERIMENT,
    SQLITE,
    absolute,
    resolve,
    scheme_of,
)
from stgt.errors import STGTError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities import Run as MlflowRun

# MLflow takes more than a second to import, so it is imported where it is used. A command with a
# wrong setting then fails without that delay.

logger = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
DESCRIPTION_TAG = "mlflow.note.content"
LOGGED_STEP_TAG = "logged_step"
LOGGED_LATE_TAG = "logged_late_step"
REASON_TAG = "end_reason"
DESCRIBED_TAG = "description_digest"
"""Digest of the description that we wrote. One that somebody edited has another, and is kept."""
START_KEY_TAG = "start_key"
"""Tag by which a run is found again whose creation the server did not confirm."""
LATE_PREFIXES = ("val/", "test/", "data/skipped", "samples/skipped")
METRICS_PER_CALL = 900
PARAMS_PER_CALL = 90
DESCRIPTION_CHARACTERS = 7500
"""Longest description. MLflow itself would cut it off at 8,000 characters."""
RUNNING_RUNS_READ = 200
RUNS_NAMED = 5
NOT_FOUND = "RESOURCE_DOES_NOT_EXIST"
ALREADY_EXISTS = "RESOURCE_ALREADY_EXISTS"
REPORTED_AGAIN = ("mlflow.store.db.utils", "mlflow.store.tracking.sqlalchemy_store")
"""Loggers that print a traceback of an error that MLflow raises as well."""
MLFLOW_DEFAULTS = {
    # By default MLflow retries for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # Otherwise it prints two lines for every run that is closed on a server, where programs that
    # read a job's standard output expect its JSON line alone.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

Status = Literal["FINISHED", "FAILED", "KILLED"]


class StepMetrics(TypedDict):
    """Metrics of one step."""

    step: int
    time_ms: int
    """Time of measurement. Metrics that are sent again after a crash carry the same time, so MLflow
    records them once."""
    metrics: dict[str, float]


class LoggedSteps(TypedDict):
    """How far the metrics of a run have been sent."""

    step: int
    """The last step whose own metrics have been sent; 0 before the first."""
    late: int
    """The last step whose late metrics have been sent: those that validation and checkpoints add to
    a step after it was measured."""


def is_late(metric: str) -> bool:
    """Return whether a metric is added to a step by validation or by a checkpoint."""
    return metric.startswith(LATE_PREFIXES)


def _client(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    for name, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(name, value)
    for name in REPORTED_AGAIN:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    connections = logging.getLogger("urllib3.connectionpool")
    if _is_not_about_mlflow not in connections.filters:
        connections.addFilter(_is_not_about_mlflow)
    return MlflowClient(tracking_uri=_full_uri(uri))


def _is_not_about_mlflow(record: logging.LogRecord) -> bool:
    """Drop urllib3's line for each retry of a request to MLflow, which may contain credentials."""
    return "/api/2.0/mlflow" not in record.getMessage()


def _full_uri(uri: str) -> str:
    """Return the tracking URI with its credentials, from the setting or from the environment."""
    from_environment = os.environ.get("MLFLOW_TRACKING_URI", "")
    if with_credentials(uri) == uri and absolute(from_environment) == uri:
        keep_credentials(from_environment)
    return with_credentials(uri)


def share_credentials(config: TrackingConfig) -> None:
    """Let processes that this one starts use the credentials in the tracking URI, if it has any."""
    if config.uri is not None and (full := with_credentials(config.uri)) != config.uri:
        os.environ["MLFLOW_TRACKING_URI"] = full


def experiment_id(client: MlflowClient, config: TrackingConfig) -> str:
    """Return the id of a resolved config's experiment, which is created if it does not exist.

    Raises:
        TrackingSettingError: The experiment of a given id does not exist, or it is deleted.
    """
    from mlflow.exceptions import MlflowException

    assert config.uri is not None
    if config.experiment_id is not None:
        try:
            experiment = client.get_experiment(config.experiment_id)
        except MlflowException as error:
            if error.error_code != NOT_FOUND:
                raise
            raise TrackingSettingError(
                f"tracking.experiment_id = {config.experiment_id!r}: {config.uri} has no such "
                "experiment; give the id of another one, or set --tracking.experiment to a name"
            ) from error
    else:
        experiment = client.get_experiment_by_name(config.experiment or DEFAULT_EXPERIMENT)
    if experiment is not None:
        if experiment.lifecycle_stage == "deleted":
            raise TrackingSettingError(
                f"the MLflow experiment {experiment.name!r} in {config.uri} is deleted; restore it "
                f"with `mlflow experiments restore -x {experiment.experiment_id}`, or set "
                "--tracking.experiment to another name"
            )
        run_details.mark_as_training(client, experiment)
        return experiment.experiment_id
    artifact_uri = config.artifact_uri
    if artifact_uri is None and config.uri.startswith(SQLITE):
        # Beside the database; the default is below the working directory of the process.
        database = Path(storage.resolve(config.uri.removeprefix(SQLITE)))
        artifact_uri = (database.parent / "mlartifacts").as_uri()
    try:
        return client.create_experiment(
            config.experiment or DEFAULT_EXPERIMENT,
            artifact_location=None if artifact_uri is None else with_credentials(artifact_uri),
            tags={run_details.EXPERIMENT_KIND: run_details.MODEL_TRAINING},
        )
    except MlflowException as error:
        if error.error_code != ALREADY_EXISTS:
            raise
        return experiment_id(client, config)  # another process has just created it


def _prepare_database(path: Path) -> None:
    """Create a sqlite file with MLflow's tables atomically, unless it exists.

    MLflow creates the tables in many steps, and a database left in between by a kill or a full disk
    cannot be repaired. The file is therefore created under another name and then renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        for left in path.parent.glob(f".{path.name}.*.tmp*"):
            left.unlink()
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        _client(f"{SQLITE}{temporary}").search_experiments()
        temporary.replace(path)


@contextmanager
def connected(config: TrackingConfig) -> Iterator[tuple[MlflowClient, TrackingConfig]]:
    """Provide MLflow's client for work that is not about a run, such as the model registry.

    Meanwhile, MLflow's global tracking URI is that of the config, since some of its functions know
    no other.

    Args:
        config: The MLflow server or file. A file that does not exist is created.

    Yields:
        The client and the resolved config.

    Raises:
        MlflowUnavailableError: MLflow cannot be used. Errors of the client's calls need
            `mlflow_errors` around them.
        TrackingSettingError: MLflow cannot record at this URI.
    """
    import mlflow

    config = resolve(config)
    uri = config.uri
    assert uri is not None
    before = os.environ.get("MLFLOW_TRACKING_URI")
    with mlflow_errors(uri):
        if uri.startswith(SQLITE):
            _prepare_database(Path(uri.removeprefix(SQLITE)))
        client = _client(uri)
        mlflow.set_tracking_uri(_full_uri(uri))
    try:
        yield client, config
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def read_files(
    config: TrackingConfig, run_id: str, names: Sequence[str]
) -> tuple[str, dict[str, bytes]]:
    """Return the name of a run and the contents of small files stored with it.

    Args:
        config: The MLflow server or file.
        run_id: Id of the run.
        names: Names of the files.

    Raises:
        STGTError: The run does not exist, or it lacks a file.
        MlflowUnavailableError: MLflow cannot be used.
    """
    config = resolve(config)
    uri = config.uri
    assert uri is not None
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
        raise STGTError(f"{uri} does not exist; set --tracking.uri to the MLflow server or file")
    with mlflow_errors(uri):
        client = _client(uri)
        run = _existing(client, run_id)
        there = set() if run is None else {one.path for one in client.list_artifacts(run_id)}
    if run is None:
        raise STGTError(f"{run_id} is neither an evaluation folder nor the id of a run in {uri}")
    if lacking := [name for name in names if name not in there]:
        raise STGTError(
            f"run {run_id} in {uri} lacks {', '.join(lacking)}; it is not an evaluation, or "
            "the evaluation has not finished"
        )
    with mlflow_errors(uri), tempfile.TemporaryDirectory() as folder:
        files = {
            name: Path(client.download_artifacts(run_id, name, folder)).read_bytes()
            for name in names
        }
    return run.info.run_name or run_id, files


def _existing(client: MlflowClient, run_id: str) -> MlflowRun | None:
    """Return a run; None if it does not exist or is deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        # MLflow calls an id of another form invalid.
        if error.error_code in (NOT_FOUND, "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


class Run:
    """One MLflow run, written by one process at a time.

    Every method raises `MlflowUnavailableError` if MLflow cannot do what it is asked.
    """

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self.tracking_uri = keep_credentials(tracking_uri)
        self.run_id = run_id
        self._start_ms: int | None = None
        self._description_end = ""
        self._model_id: str | None = None
        with mlflow_errors(self.tracking_uri):
            self._client = _client(self.tracking_uri)

    @classmethod
    def open(
        cls,
        config: TrackingConfig,
        name: str,
        record_uri: str,
        parent_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        start_key: str | None = None,
        start_ms: int | None = None,
    ) -> Run:
        """Create a run, or continue the one recorded at `record_uri`.

        Args:
            config: The MLflow server or file.
            name: Name of a new run.
            record_uri: JSON file that keeps the run's id.
            parent_id: Parent run of a new run.
            tags: Further tags, which replace those of earlier starts.
            start_key: Identifies this start. A run that an earlier attempt created with the same
                key, without the server's answer reaching us, is used instead of a new one.
            start_ms: When the work of a new run began, in milliseconds since 1970; None for now.

        Raises:
            MlflowUnavailableError: MLflow cannot be used.
            TrackingSettingError: The experiment does not exist or is deleted.
        """
        config = resolve(config)
        uri = config.uri
        assert uri is not None
        record = storage.read_json(record_uri) if storage.exists(record_uri) else None
        with mlflow_errors(uri):
            if uri.startswith(SQLITE):
                _prepare_database(Path(uri.removeprefix(SQLITE)))
            client = _client(uri)
            if record is not None and without_credentials(record["tracking_uri"]) == uri:
                found = _existing(client, record["run_id"])
                if found is not None:
                    _continue(client, found, tags or {})
                    return cls(uri, record["run_id"])
            all_tags = {**(tags or {}), **process_identity.own_identity()}
            if parent_id is not None:
                all_tags[PARENT_TAG] = parent_id
            experiment = experiment_id(client, config)
            run = None
            if start_key is not None:
                all_tags[START_KEY_TAG] = start_key
                wanted = f"tags.{START_KEY_TAG} = '{start_key}'"
                run = next(iter(client.search_runs([experiment], wanted, max_results=1)), None)
            if run is None:
                run = client.create_run(
                    experiment, start_time=start_ms, run_name=name, tags=all_tags
                )
        storage.write_json(record_uri, {"tracking_uri": uri, "run_id": run.info.run_id})
        return cls(uri, run.info.run_id)

    def close_abandoned(self) -> None:
        """Close the runs of this experiment whose process has ended without closing them.

        Only runs of processes of this user on this host since its last boot can be judged. Other
        running runs are listed in the log, since nobody else may be looking after them.
        """
        with mlflow_errors(self.tracking_uri):
            own = self._client.get_run(self.run_id)
            running = self._client.search_runs(
                [own.info.experiment_id],
                "attributes.status = 'RUNNING'",
                max_results=RUNNING_RUNS_READ,
            )
            unknown = []
            for run in running:
                if run.info.run_id in (self.run_id, own.data.tags.get(PARENT_TAG)):
                    continue
                key = run.data.tags.get(START_KEY_TAG)
                if key is not None and key == own.data.tags.get(START_KEY_TAG):
                    # The server took the same request twice, since its first answer was lost.
                    self._client.delete_run(run.info.run_id)
                    continue
                judgment = process_identity.judge(run.data.tags)
                if judgment == "dead":
                    self._close_abandoned(run.info.run_id)
                elif judgment == "unknown":
                    who = process_identity.describe(run.data.tags)
                    unknown.append(f"{run.info.run_name} ({who})")
        if unknown:
            more = f" and {len(unknown) - RUNS_NAMED} more" if len(unknown) > RUNS_NAMED else ""
            logger.info(
                "MLflow shows runs of this experiment as RUNNING whose processes cannot be checked "
                "from here: %s%s",
                ", ".join(unknown[:RUNS_NAMED]),
                more,
            )

    def _close_abandoned(self, run_id: str) -> None:
        # Read again: another process may have continued the run in the meantime.
        run = self._client.get_run(run_id)
        if run.info.status != "RUNNING" or process_identity.judge(run.data.tags) != "dead":
            return
        who = process_identity.describe(run.data.tags)
        self._client.set_tag(run_id, REASON_TAG, f"{who} ended without closing the run")
        self._client.set_terminated(run_id, status="KILLED")
        logger.info("closed the MLflow run %s, which %s left open", run.info.run_name, who)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Log the resolved config as params with dotted names.

        MLflow params cannot change, so they keep the values of the run's first start.
        """
        from mlflow.entities import Param

        with mlflow_errors(self.tracking_uri):
            known = self._client.get_run(self.run_id).data.params
            params = [
                Param(name, without_secrets(str(value)))
                for name, value in flatten(dict(values)).items()
                if name not in known
            ]
            for start in range(0, len(params), PARAMS_PER_CALL):
                self._client.log_batch(self.run_id, params=params[start : start + PARAMS_PER_CALL])

    def log_config(self, values: Mapping[str, Any]) -> None:
        """Log the resolved config, as params and as one JSON artifact.

        The artifact has the values of the latest start.
        """
        self.log_params(values)
        with mlflow_errors(self.tracking_uri):
            text = json.dumps(dict(values), indent=2, sort_keys=True)
            self._client.log_text(self.run_id, text, "config.json")

    def logged_steps(self) -> LoggedSteps:
        """Return how far the metrics of this run have been sent."""
        with mlflow_errors(self.tracking_uri):
            tags = self._client.get_run(self.run_id).data.tags
        step = int(tags.get(LOGGED_STEP_TAG, 0))
        # Earlier versions sent all metrics of a step at once.
        return LoggedSteps(step=step, late=int(tags.get(LOGGED_LATE_TAG, step)))

    def log_steps(self, rows: Sequence[StepMetrics], logged: LoggedSteps | None = None) -> None:
        """Send the metrics of many steps.

        Args:
            rows: Steps and their metrics. Sending the same rows again changes nothing.
            logged: How far the metrics have been sent with these rows, for `logged_steps` after a
                restart. MLflow stores it together with the last rows.
        """
        from mlflow.entities import Metric, RunTag

        metrics = [
            Metric(name, value, row["time_ms"], row["step"])
            for row in rows
            for name, value in row["metrics"].items()
        ]
        tags = []
        if logged is not None:
            tags = [
                RunTag(LOGGED_STEP_TAG, str(logged["step"])),
                RunTag(LOGGED_LATE_TAG, str(logged["late"])),
            ]
        parts: list[Sequence[Metric]] = [
            metrics[start : start + METRICS_PER_CALL]
            for start in range(0, len(metrics), METRICS_PER_CALL)
        ]
        with mlflow_errors(self.tracking_uri):
            for part in parts[:-1]:
                self._client.log_batch(self.run_id, metrics=part)
            last = parts[-1] if parts else []
            self._client.log_batch(self.run_id, metrics=last, tags=tags)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Send metrics that do not belong to a step, unless the run has them already.

        They also become metrics of the logged model that the run evaluates, if there is one.
        """
        from mlflow.entities import Metric

        with mlflow_errors(self.tracking_uri):
            known = self._client.get_run(self.run_id).data.metrics
            now = int(time.time() * 1000)
            new = [
                Metric(name, value, now, 0, model_id=self._model_id, run_id=self.run_id)
                for name, value in metrics.items()
                if known.get(name) != value
            ]
            for start in range(0, len(new), METRICS_PER_CALL):
                self._client.log_batch(self.run_id, metrics=new[start : start + METRICS_PER_CALL])

    def has_metric(self, prefix: str) -> bool:
        """Return whether the run has a metric whose name begins with a prefix."""
        with mlflow_errors(self.tracking_uri):
            known = self._client.get_run(self.run_id).data.metrics
        return any(name.startswith(prefix) for name in known)

    def log_system_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send rows of `system_metrics`; their step is the number of seconds since the start."""
        if self._start_ms is None:
            with mlflow_errors(self.tracking_uri):
                self._start_ms = self._client.get_run(self.run_id).info.start_time or 0
        start_ms = self._start_ms
        self.log_steps(
            [
                StepMetrics(
                    step=max(0, (row["time_ms"] - start_ms) // 1000),
                    time_ms=row["time_ms"],
                    metrics=row["metrics"],
                )
                for row in rows
            ]
        )

    def log_about(self, about: About, tags: Mapping[str, str], name: str) -> None:
        """Send where the run comes from: tags, data sets, lineage and description.

        Args:
            about: What the stage knows.
            tags: Tags of `run_details.source_tags`.
            name: Name of the run.
        """
        from mlflow.entities import RunTag

        with mlflow_errors(self.tracking_uri):
            run_details.log_datasets(self._client, self.run_id, about.datasets)
            before = run_details.origin_run(self._client, self.tracking_uri, about)
            all_tags = {**tags, **run_details.lineage_tags(about, name, before)}
            if before is not None and about.origin is not None:
                self._model_id = run_details.link_to_model(
                    self._client, self.run_id, before, about.origin.uri
                )
            self._client.log_batch(
                self.run_id, tags=[RunTag(key, value) for key, value in all_tags.items()]
            )
            self._description_end = run_details.description_end(about, all_tags, before)
        self.describe(about.summary)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        with mlflow_errors(self.tracking_uri):
            self._client.log_batch(
                self.run_id, tags=[RunTag(key, value) for key, value in tags.items()]
            )

    def log_file(self, name: str, data: bytes) -> None:
        """Store a small file, such as a picture, with the run."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(data)
            with mlflow_errors(self.tracking_uri):
                self._client.log_artifact(self.run_id, str(path))

    def log_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Store values as a JSON file with the run."""
        self.log_file(name, (json.dumps(dict(values), indent=2) + "\n").encode())

    def page(self) -> str | None:
        """Return the address of the run's page; None if it is not on a server."""
        if scheme_of(self.tracking_uri) not in ("http", "https"):
            return None
        with mlflow_errors(self.tracking_uri):
            experiment = self._client.get_run(self.run_id).info.experiment_id
        return f"{self.tracking_uri.rstrip('/')}/{run_details.page_of(experiment, self.run_id)}"

    def describe(self, text: str) -> None:
        """Set the description on the run's page, in Markdown, unless somebody edited it.

        What `log_about` has to say about the run's origin follows the text.
        """
        text = f"{text}\n\n{self._description_end}" if self._description_end else text
        text = without_secrets(text)[:DESCRIPTION_CHARACTERS]
        with mlflow_errors(self.tracking_uri):
            tags = self._client.get_run(self.run_id).data.tags
            known = tags.get(DESCRIPTION_TAG)
            if known and tags.get(DESCRIBED_TAG) != fingerprint(known):
                return
        self.set_tags({DESCRIPTION_TAG: text, DESCRIBED_TAG: fingerprint(text)})

    def log_checkpoint(
        self,
        name: str,
        uri: str,
        step: int,
        metrics: Mapping[str, float],
        final: bool = True,
        *,
        time_ms: int | None = None,
        size_bytes: int | None = None,
    ) -> None:
        """Record a checkpoint as a logged model that says where it lies, without copying it.

        A checkpoint that is recorded already is not recorded again.

        Args:
            name: Name of the logged model.
            uri: URI of the checkpoint.
            step: Step of the checkpoint.
            metrics: Metrics of the checkpoint, by the names that the run has them under.
            final: Whether to tag it as the run's final checkpoint, rather than as its best.
            time_ms: Time of the metrics in the run; None takes that of its latest metrics.
            size_bytes: Size of the checkpoint's weights.
        """
        checkpoint = Checkpoint(
            name=name,
            uri=uri,
            step=step,
            metrics=metrics,
            time_ms=time_ms,
            size_bytes=size_bytes,
            is_final=final,
        )
        with mlflow_errors(self.tracking_uri):
            log_checkpoint(self._client, self.run_id, checkpoint)

    def finish(self, status: Status = "FINISHED", reason: str | None = None) -> None:
        """Close the run.

        Args:
            status: How the run ended.
            reason: Why it ended, unless it finished; the tag `end_reason`.
        """
        with mlflow_errors(self.tracking_uri):
            if reason is not None:
                text = without_secrets(reason)[:REASON_CHARACTERS]
                self._client.set_tag(self.run_id, REASON_TAG, text)
            self._client.set_terminated(self.run_id, status=status)

    def close_if_running(self, reason: str) -> None:
        """Mark the run as killed if its process ended without closing it."""
        with mlflow_errors(self.tracking_uri):
            is_running = self._client.get_run(self.run_id).info.status == "RUNNING"
        if is_running:
            self.finish("KILLED", reason)

    def link_to(self, run_id: str) -> str:
        """Return a link to another run of the same experiment, for descriptions in the UI."""
        with mlflow_errors(self.tracking_uri):
            experiment = self._client.get_run(self.run_id).info.experiment_id
        return run_details.page_of(experiment, run_id)

    def set_parent(self, parent_id: str) -> None:
        """Make the run a child of another run, unless it has a parent."""
        with mlflow_errors(self.tracking_uri):
            if PARENT_TAG not in self._client.get_run(self.run_id).data.tags:
                self._client.set_tag(self.run_id, PARENT_TAG, parent_id)


def _continue(client: MlflowClient, run: MlflowRun, tags: Mapping[str, str]) -> None:
    """Mark a run as running again, in this process, with further tags."""
    from mlflow.entities import RunTag

    # The process first, so that a run that is marked as running belongs to a living process.
    all_tags = {**tags, **process_identity.own_identity()}
    client.log_batch(run.info.run_id, tags=[RunTag(*one) for one in all_tags.items()])
    if REASON_TAG in run.data.tags:
        client.delete_tag(run.info.run_id, REASON_TAG)
    client.update_run(run.info.run_id, status="RUNNING")


def recorded_run_id(record_uri: str) -> str | None:
    """Return the run id in the record beside a stage's output; None without a record."""
    return storage.read_json(record_uri)["run_id"] if storage.exists(record_uri) else None
