"""The only module that uses MLflow: runs, configs, metrics, checkpoints and pictures.

The driver creates runs, and one process writes to each run. A run's id is kept beside its output,
so that a resumed stage continues the same run.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypedDict, TypeVar

from filelock import FileLock

from pipelines.common import storage, timeline
from pipelines.common.config import TrackingConfig, flatten
from stgt.errors import STGTError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

# MLflow takes more than a second to import, so it is imported where it is used. A command with a
# wrong setting then fails without that delay.

logger = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
DESCRIPTION_TAG = "mlflow.note.content"
LOGGED_STEP_TAG = "logged_step"
METRICS_PER_CALL = 900
PARAMS_PER_CALL = 90
SQLITE = "sqlite:///"
PATIENCE = {
    # By default MLflow retries for minutes, during which training would stand still.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class UnreachableError(OSError):
    """The MLflow server does not answer."""


class StepMetrics(TypedDict):
    """Metrics of one step."""

    step: int
    time_ms: int
    """Time of measurement. Metrics that are sent again after a crash carry the same time, so MLflow
    records them once."""
    metrics: dict[str, float]


def _reaching(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make a function raise `UnreachableError` if the MLflow server does not answer."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        from mlflow.exceptions import MlflowException

        try:
            return function(*args, **kwargs)
        except MlflowException as error:
            if not _is_about_the_connection(error):
                raise
            reason = str(error).splitlines()[0][:200]
            raise UnreachableError(f"MLflow does not answer: {reason}") from error

    return call


def _is_about_the_connection(error: MlflowException) -> bool:
    from mlflow.exceptions import RestException

    if isinstance(error, RestException):  # an answer, but 5xx may come from a failing server
        return error.get_http_status_code() >= 500
    text = str(error)
    broken = ("failed with exception", "failed with timeout", "failed with error code 5")
    return text.startswith("API request to") and any(words in text for words in broken)


def _client(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    return MlflowClient(tracking_uri=uri)


def _experiment_id(client: MlflowClient, config: TrackingConfig) -> str:
    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is not None:
        return experiment.experiment_id
    artifact_uri = config.artifact_uri
    if artifact_uri is None and config.uri.startswith(SQLITE):
        # Beside the database; the default is below the working directory of the process.
        database = Path(storage.resolve(config.uri.removeprefix(SQLITE)))
        artifact_uri = (database.parent / "mlartifacts").as_uri()
    return client.create_experiment(config.experiment, artifact_location=artifact_uri)


def resolve(config: TrackingConfig) -> TrackingConfig:
    """Return the config with an absolute sqlite path, for use in other processes."""
    if not config.uri.startswith(SQLITE):
        return config
    path = storage.resolve(config.uri.removeprefix(SQLITE))
    return TrackingConfig(
        uri=f"{SQLITE}{path}", experiment=config.experiment, artifact_uri=config.artifact_uri
    )


def _prepare_database(path: Path) -> None:
    """Create a sqlite file with MLflow's tables atomically, unless it exists.

    MLflow creates the tables in many steps, and a database left in between by a kill or a full disk
    cannot be repaired. The file is therefore created under another name and then renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        for left in path.parent.glob(f".{path.name}.*.tmp*"):
            left.unlink()
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        _client(f"{SQLITE}{temporary}").search_experiments()
        temporary.replace(path)


@_reaching
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
        UnreachableError: The server does not answer.
    """
    from mlflow.exceptions import MlflowException

    config = resolve(config)
    if config.uri.startswith(SQLITE) and not Path(config.uri.removeprefix(SQLITE)).is_file():
        raise STGTError(
            f"{config.uri} does not exist; set --tracking.uri to the MLflow server or file"
        )
    client = _client(config.uri)
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if _is_about_the_connection(error):
            raise
        raise STGTError(
            f"{run_id} is neither an evaluation folder nor the id of a run in {config.uri}"
        ) from error
    there = {artifact.path for artifact in client.list_artifacts(run_id)}
    if lacking := [name for name in names if name not in there]:
        raise STGTError(
            f"run {run_id} in {config.uri} lacks {', '.join(lacking)}; it is not an evaluation, or "
            "the evaluation has not finished"
        )
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            files[name] = Path(client.download_artifacts(run_id, name, folder)).read_bytes()
    return run.info.run_name or run_id, files


class Run:
    """One MLflow run, written by one process at a time."""

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self.tracking_uri = tracking_uri
        self.run_id = run_id
        self._client = _client(tracking_uri)

    @classmethod
    @_reaching
    def open(
        cls, config: TrackingConfig, name: str, record_uri: str, parent_id: str | None = None
    ) -> Run:
        """Create a run, or continue the one recorded at `record_uri`.

        Args:
            config: The MLflow server or file.
            name: Name of a new run.
            record_uri: JSON file that keeps the run's id.
            parent_id: Parent run of a new run.

        Raises:
            UnreachableError: The server does not answer.
        """
        config = resolve(config)
        if config.uri.startswith(SQLITE):
            _prepare_database(Path(config.uri.removeprefix(SQLITE)))
        client = _client(config.uri)
        if storage.exists(record_uri):
            record = storage.read_json(record_uri)
            if record["tracking_uri"] == config.uri:
                client.update_run(record["run_id"], status="RUNNING")
                return cls(config.uri, record["run_id"])
        tags = {} if parent_id is None else {PARENT_TAG: parent_id}
        run = client.create_run(_experiment_id(client, config), run_name=name, tags=tags)
        storage.write_json(record_uri, {"tracking_uri": config.uri, "run_id": run.info.run_id})
        return cls(config.uri, run.info.run_id)

    @classmethod
    def open_if_reachable(
        cls,
        config: TrackingConfig,
        name: str,
        record_uri: str,
        values: Mapping[str, Any],
        parent_id: str | None = None,
        *,
        meanwhile: str,
    ) -> Run | None:
        """Open a run and log the resolved config; warn and return None if MLflow is unreachable.

        Args:
            config: The MLflow server or file.
            name: Name of a new run.
            record_uri: JSON file that keeps the run's id.
            values: The resolved config.
            parent_id: Parent run of a new run.
            meanwhile: What happens without MLflow, for the warning.
        """
        try:
            run = cls.open(config, name, record_uri, parent_id)
            run.log_config(values)
        except UnreachableError as error:
            logger.warning("%s; %s", error, meanwhile)
            return None
        return run

    @_reaching
    def log_config(self, values: Mapping[str, Any]) -> None:
        """Log the resolved config, as params with dotted names and as one JSON artifact.

        MLflow params cannot change, so they keep the values of the run's first start. The artifact
        has the values of the latest start.
        """
        from mlflow.entities import Param

        known = self._client.get_run(self.run_id).data.params
        params = [
            Param(name, str(value))
            for name, value in flatten(dict(values)).items()
            if name not in known
        ]
        for start in range(0, len(params), PARAMS_PER_CALL):
            self._client.log_batch(self.run_id, params=params[start : start + PARAMS_PER_CALL])
        self._client.log_text(
            self.run_id, json.dumps(dict(values), indent=2, sort_keys=True), "config.json"
        )

    @_reaching
    def logged_step(self) -> int:
        """Return the last `logged_step` that `log_steps` stored; 0 before the first."""
        return int(self._client.get_run(self.run_id).data.tags.get(LOGGED_STEP_TAG, 0))

    @_reaching
    def log_steps(self, rows: Sequence[StepMetrics], logged_step: int | None = None) -> None:
        """Send the metrics of many steps at once.

        Args:
            rows: Steps and their metrics. Sending the same rows again changes nothing.
            logged_step: Step to store with the run, which `logged_step()` returns after a restart.
        """
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, row["time_ms"], row["step"])
            for row in rows
            for name, value in row["metrics"].items()
        ]
        for start in range(0, len(metrics), METRICS_PER_CALL):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + METRICS_PER_CALL])
        if logged_step is not None:
            self._client.set_tag(self.run_id, LOGGED_STEP_TAG, str(logged_step))

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Send metrics that do not belong to a step."""
        now = int(time.time() * 1000)
        self.log_steps([{"step": 0, "time_ms": now, "metrics": dict(metrics)}])

    @_reaching
    def log_file(self, name: str, data: bytes) -> None:
        """Store a small file, such as a picture, with the run."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(data)
            self._client.log_artifact(self.run_id, str(path))

    def log_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Store values as a JSON file with the run."""
        self.log_file(name, (json.dumps(dict(values), indent=2) + "\n").encode())

    @_reaching
    def describe(self, text: str) -> None:
        """Set the description on the run's page, in Markdown."""
        self._client.set_tag(self.run_id, DESCRIPTION_TAG, text)

    @_reaching
    def log_checkpoint(
        self, name: str, uri: str, step: int, metrics: Mapping[str, float], final: bool = True
    ) -> None:
        """Record a checkpoint as a logged model that points to its URI, without copying it.

        Its metrics are logged as `checkpoint/...`, since the run already has their own names.

        Args:
            name: Name of the logged model.
            uri: URI of the checkpoint.
            step: Step of the checkpoint.
            metrics: Metrics of the checkpoint.
            final: Whether to tag it as the run's final checkpoint, rather than as its best.
        """
        from mlflow.entities import LoggedModelStatus

        run = self._client.get_run(self.run_id)
        model = self._client.create_logged_model(
            experiment_id=run.info.experiment_id,
            name=name,
            source_run_id=self.run_id,
            tags={"checkpoint_uri": uri},
            params={"step": str(step)},
            model_type="checkpoint",
        )
        for metric, value in metrics.items():
            self._client.log_metric(
                self.run_id, f"checkpoint/{metric}", value, step=step, model_id=model.model_id
            )
        self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        self._client.set_tag(self.run_id, "checkpoint_uri" if final else "best_checkpoint_uri", uri)

    @_reaching
    def finish(self, succeeded: bool) -> None:
        """Close the run."""
        self._client.set_terminated(self.run_id, status="FINISHED" if succeeded else "FAILED")

    def fail(self) -> None:
        """Close the run as failed; log a warning if MLflow is unreachable."""
        try:
            self.finish(succeeded=False)
        except UnreachableError as error:
            logger.warning("%s; the run could not be marked as failed", error)

    def close_if_running(self) -> None:
        """Mark the run as killed if its process ended without closing it."""
        if self._client.get_run(self.run_id).info.status == "RUNNING":
            self._client.set_terminated(self.run_id, status="KILLED")


def recorded_result(
    result_uri: str,
    *,
    open_run: Callable[[], Run | None],
    prepare: Callable[[], None],
    work: Callable[[], None],
    record: Callable[[Run, dict[str, Any]], bool],
) -> dict[str, Any]:
    """Do work once, and record its result in MLflow when the server is reachable.

    Args:
        result_uri: JSON file that `work` writes. Its field `tracked` states whether the result
            has been recorded in MLflow. Results of earlier versions lack it and were recorded.
        open_run: Opens the run; returns None if the server does not answer.
        prepare: Runs in this thread while another thread opens the run, since both take seconds.
        work: Does the work. If it raises, the run is marked as failed.
        record: Records the result and closes the run; returns False if that was not possible.

    Returns:
        The content of the file.
    """
    run = None
    if not storage.exists(result_uri):
        opening = _in_background("open the MLflow run", open_run)
        try:
            prepare()
        except BaseException:
            opening.add_done_callback(_fail_if_open)
            raise
        run = opening.result()
        succeeded = False
        try:
            work()
            succeeded = True
        finally:
            if run is not None and not succeeded:
                run.fail()
    result = storage.read_json(result_uri)
    if not result.get("tracked", True):
        run = run or open_run()
        if run is not None and record(run, result):
            result["tracked"] = True
            storage.write_json(result_uri, result)
    return result


def _in_background(name: str, call: Callable[[], Result]) -> Future[Result]:
    """Call a function in a thread that no exit waits for."""
    future: Future[Result] = Future()

    def work() -> None:
        try:
            with timeline.span(name):
                future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future


def _fail_if_open(opening: Future[Run | None]) -> None:
    """Mark a run as failed that was opened for work that could not begin."""
    if (error := opening.exception()) is not None:
        logger.warning("the MLflow run could not be opened: %s", error)
    elif (run := opening.result()) is not None:
        run.fail()


def recorded_run_id(record_uri: str) -> str | None:
    """Return the run id in the record beside a stage's output; None without a record."""
    return storage.read_json(record_uri)["run_id"] if storage.exists(record_uri) else None
