"""Records a stage in MLflow without ever holding it up or ending it.

All stages follow one rule, whatever is behind the tracking URI: if MLflow cannot be used, the stage
continues, what MLflow lacks is kept and sent later, and the log says so once, and once more when
MLflow can be used again. Only a wrong setting is refused, before the work begins.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import tenacity

from pipelines.common import provenance, run_details, storage, system_metrics, timeline
from pipelines.common.config import TrackingConfig
from pipelines.common.mlflow_errors import MlflowUnavailableError, TrackingSettingError
from pipelines.common.provenance import About
from pipelines.common.ray_errors import root_cause
from pipelines.common.termination import EXIT_SIGTERM, exit_on_sigterm, received
from pipelines.common.tracking import Run, Status
from pipelines.common.tracking_uri import resolve, say_what_is_not_used
from stgt.errors import STGTError, StoppedError

logger = logging.getLogger(__name__)

PENDING = "mlflow_pending.json"
"""File in the output folder of a finished stage whose results are not in MLflow yet."""
SYSTEM_METRICS = "mlflow_system_metrics.json"
"""File in the output folder with system metrics that are not in MLflow yet."""
OPENING_S = 10.0
"""Longest wait for MLflow before the work begins, in addition to the time of the preparations."""
CLOSING_S = 15.0
"""Longest wait for MLflow when the work failed or was interrupted."""
CLOSING_UNOPENED_S = 3.0
"""The same while the run has not been opened yet."""
OUTAGE_S = 180.0
"""Longest wait at the end of the work for a server that has gone away since the run was opened."""
OUTAGE_PAUSE_S = 2.0
"""Pause between attempts meanwhile."""

Topic = Literal["run", "details", "files"]
"""What is sent: runs with their metrics, settings and origin of a run, or files. A server may
accept one and not the other."""
WHAT = {"details": "settings and the origin", "files": "config and the files"}
Call = Callable[[Run], object]
Result = TypeVar("Result")


class Recording:
    """The MLflow run of a stage, which is opened and written as far as MLflow allows.

    At most one request is in progress at a time.
    """

    def __init__(
        self,
        config: TrackingConfig,
        name: str,
        record_uri: str,
        values: Mapping[str, Any],
        parent_id: str | None = None,
        *,
        meanwhile: str,
        about: About | None = None,
    ) -> None:
        """Prepare a recording; nothing is sent yet.

        Args:
            config: The MLflow server or file.
            name: Name of a new run.
            record_uri: JSON file in the output folder that keeps the run's id.
            values: The resolved config.
            parent_id: Parent run of a new run.
            meanwhile: What happens while MLflow cannot be used, for the log: what continues, what
                is kept where, and when it is sent.
            about: What the stage knows about the run, besides its config.

        Raises:
            TrackingSettingError: MLflow cannot record at the URI of the config.
            SettingError: An environment variable for system metrics is wrong.
        """
        self._config = resolve(config)
        assert self._config.uri is not None
        say_what_is_not_used(self._config.uri)
        self._name = name
        self._record_uri = record_uri
        self._folder = record_uri.rpartition("/")[0]
        self._values = values
        self._parent_id = parent_id
        self._meanwhile = meanwhile
        self._about = about
        # Taken here, since threads do not inherit the context that may contain it.
        self._command = None if about is None else provenance.command_of(about, self._folder)
        self._start_key = uuid.uuid4().hex
        # The run may be opened much later, but its duration and system metrics count from here.
        self._start_ms = int(time.time() * 1000)
        self._lock = threading.RLock()
        self._run: Run | None = None
        self._is_described = False
        self._has_config = False
        self._outage = False
        self._rows = 0
        self._system = system_metrics.SystemMetrics(
            system_metrics.interval_s(config), self._send_system_metrics
        )
        self._failing: set[Topic] = set()
        self._opening: Future[None] | None = None
        self._undelivered: list[tuple[Topic, Call]] = []

    @property
    def run_id(self) -> str | None:
        """Id of the run; None while it could not be opened."""
        return None if self._run is None else self._run.run_id

    @contextmanager
    def running(self, prepare: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Open the run for some work, and close it with the reason if the work fails.

        A finished run is closed by `finish`.

        Args:
            prepare: Runs in this thread while another thread opens the run, since both take
                seconds.

        Raises:
            TrackingSettingError: A wrong setting was found before the work began.
            StoppedError: The work was ended by SIGTERM.
        """
        self._opening = _in_background("open the MLflow run", self._open_first)
        with exit_on_sigterm() as take_over:
            try:
                self._system.start()
                prepare()
                take_over()
                self._wait_until_open()
                self._send_cluster()
                yield
            except TrackingSettingError:
                raise
            except SystemExit as error:
                if error.code not in (signal.SIGTERM, EXIT_SIGTERM) and not received():
                    self.close(error)
                    raise
                stopped = StoppedError(
                    f"{self._name} was stopped by SIGTERM; run the same command again to continue"
                )
                self.close(stopped)
                raise stopped from error
            except BaseException as error:
                self.close(error)
                raise
            finally:
                self._system.stop()

    def attempt(self, call: Call, topic: Topic = "run") -> bool:
        """Send something now; return False if MLflow did not take it.

        Args:
            call: Sends it. It may be called again after an error, so it must not send anything
                twice.
            topic: What is sent.
        """
        with self._lock:
            failing: Topic = "run"
            try:
                run = self._opened()
                if not self._is_described and self._outage:
                    self._describe(run)
                failing = topic
                call(run)
            except (MlflowUnavailableError, TrackingSettingError) as error:
                self._outage = isinstance(error, MlflowUnavailableError) and error.is_outage
                self._say_failing(failing, error)
                return False
            self._say_working(topic)
            return True

    def deliver(self, call: Call, topic: Topic = "run") -> None:
        """Send something now or, if MLflow does not take it, in `finish`."""
        # After a failure there is only one more attempt, in `finish`: each may take a minute.
        waits = any(other in (topic, "run") for other, _ in self._undelivered)
        if waits or not self.attempt(call, topic):
            self._undelivered.append((topic, call))

    def finish(self) -> bool:
        """Close the run as finished; return False if MLflow lacks something.

        If the server has gone away since the run was opened, this waits for it up to `OUTAGE_S`.
        What MLflow lacks is then sent by another `finish`, or delivered again by the next start of
        the same command.
        """
        self._system.stop()
        self._load_system_metrics()
        was_open = self._run is not None
        complete = self._finish_now()
        if not complete and was_open and self._outage:
            complete = self._finish_after_outage()
        self._keep_system_metrics()
        if not complete:
            logger.warning(
                "MLflow at %s lacks some results of %s; they are in %s, run the same command again "
                "to send them",
                self._config.uri,
                self._name,
                self._folder,
            )
        return complete

    def _finish_now(self) -> bool:
        with self._lock:
            pending, self._undelivered = self._undelivered, []
            refused: set[Topic] = set()
            for topic, call in pending:
                if refused & {topic, "run"} or not self.attempt(call, topic):
                    refused.add(topic)
                    self._undelivered.append((topic, call))
            if "run" not in refused and not self.attempt(self._send_system_rows):
                refused.add("run")
            if "run" not in refused and not self._is_described:
                self.attempt(self._describe)
            if "run" not in refused and not self.attempt(lambda run: run.finish("FINISHED")):
                refused.add("run")
            if not self._has_config and not refused:
                self._send_config()
        return not refused and self._is_described and self._has_config

    def _finish_after_outage(self) -> bool:
        logger.warning(
            "MLflow at %s went away before it had all results of %s; waiting up to %.0f s for it "
            "(Ctrl-C ends the wait)",
            self._config.uri,
            self._name,
            OUTAGE_S,
        )
        attempts = tenacity.Retrying(
            stop=tenacity.stop_after_delay(OUTAGE_S),
            wait=tenacity.wait_fixed(OUTAGE_PAUSE_S),
            retry=tenacity.retry_if_result(lambda complete: not complete and self._outage),
            retry_error_callback=lambda state: False,
        )
        return attempts(self._finish_now)

    def mark_pending(self) -> None:
        """Leave a file in the output folder until `finish_marked` has sent everything.

        For stages whose result file cannot say whether MLflow has the result.
        """
        uri = storage.join(self._folder, PENDING)
        storage.write_json(uri, {"tracking_uri": self._config.uri})

    def finish_marked(self) -> None:
        """Close the run as finished and, if MLflow lacks nothing, remove the mark."""
        if self.finish():
            storage.remove(storage.join(self._folder, PENDING))

    @property
    def is_pending(self) -> bool:
        """Whether results of this or an earlier start are still to be sent."""
        return storage.exists(storage.join(self._folder, PENDING))

    def _opened(self) -> Run:
        if self._run is None:
            self._run = Run.open(
                self._config,
                self._name,
                self._record_uri,
                self._parent_id,
                self._source_tags(),
                self._start_key,
                # An earlier start may have done the work while MLflow could not be used.
                min([self._start_ms, *(row["time_ms"] for row in self._kept_rows())]),
            )
            self._describe(self._run)
            if self._is_described:
                self._send_config()
            try:
                if (page := self._run.page()) is not None:
                    logger.info("%s is shown at %s", self._name, page)
                self._run.close_abandoned()
            except MlflowUnavailableError as error:
                logger.info("%s, so runs that were left open are not looked for", error)
        return self._run

    def _source_tags(self) -> dict[str, str]:
        if self._about is None or self._command is None:
            return {}
        return run_details.source_tags(self._about, self._command)

    def _describe(self, run: Run) -> None:
        """Send settings and origin of the run; without them the run is still useful.

        Raises:
            MlflowUnavailableError: The server has gone away, so that it would take nothing else.
        """
        try:
            run.log_params(self._values)
            if self._about is not None:
                run.log_about(self._about, self._source_tags(), self._name)
        except MlflowUnavailableError as error:
            if error.is_outage:
                raise
            self._say_failing("details", error)
        else:
            self._is_described = True
            self._say_working("details")

    def _send_config(self) -> None:
        """Store the config as a file; without it the run is still useful."""
        assert self._run is not None
        try:
            self._run.log_config(self._values)
        except MlflowUnavailableError as error:
            self._outage = error.is_outage
            self._say_failing("files", error)
        else:
            self._has_config = True
            self._say_working("files")

    def _send_cluster(self) -> None:
        """Send the resources of the cluster, once the preparations have connected to one."""
        if self._about is None:
            return

        def send() -> None:
            found = provenance.cluster_hardware()
            tags = {f"hardware.cluster_{name}": value for name, value in found.items()}

            def call(run: Run) -> None:
                run.set_tags(tags)

            # While MLflow cannot be used, another attempt would only keep others waiting.
            if tags and ("run" in self._failing or not self.attempt(call)):
                self._undelivered.append(("run", call))

        _in_background("send the cluster's resources", send)

    def _send_system_metrics(self) -> None:
        self._rows += 1
        if not self._failing or self._rows % system_metrics.ATTEMPT_EVERY == 0:
            self.attempt(self._send_system_rows)

    def _send_system_rows(self, run: Run) -> None:
        rows = self._system.rows()
        if rows:
            run.log_system_metrics(rows)
            self._system.forget(rows)

    def _load_system_metrics(self) -> None:
        """Take the system metrics that an earlier start could not send."""
        self._system.add(self._kept_rows())

    def _kept_rows(self) -> list[dict[str, Any]]:
        uri = storage.join(self._folder, SYSTEM_METRICS)
        try:
            return storage.read_json(uri) if storage.exists(uri) else []
        except (OSError, STGTError) as error:
            logger.warning("system metrics of an earlier start cannot be read: %s", error)
            return []

    def _keep_system_metrics(self) -> None:
        """Keep the system metrics that could not be sent for the next start."""
        uri = storage.join(self._folder, SYSTEM_METRICS)
        rows = self._system.rows()
        try:
            if rows:
                storage.write_json(uri, rows)
            elif storage.exists(uri):
                storage.remove(uri)
        except (OSError, STGTError) as error:  # the work itself is done, or failed otherwise
            logger.warning("system metrics that MLflow lacks cannot be kept: %s", error)

    def _open_first(self) -> None:
        with self._lock:
            try:
                self._opened()
            except MlflowUnavailableError as error:
                self._outage = error.is_outage
                self._say_failing("run", error)
            else:
                self._say_working("run")

    def _wait_until_open(self) -> None:
        assert self._opening is not None
        if wait([self._opening], OPENING_S).done:
            self._opening.result()  # raises if a setting is wrong
            return
        self._failing.add("run")
        logger.warning(
            # Either the server is slow, or this machine, which imports MLflow meanwhile.
            "MLflow at %s has not opened the run within %.0f s; %s",
            self._config.uri,
            OPENING_S,
            self._meanwhile,
        )

    def close(self, error: BaseException) -> None:
        """Close the run of failed work with the reason, without waiting long."""
        status, reason = how_it_ended(error)
        is_opening = self._opening is not None and not self._opening.done()
        limit_s = CLOSING_UNOPENED_S if is_opening else CLOSING_S
        self._system.stop()

        def send() -> None:
            self.attempt(self._send_system_rows)
            self.attempt(lambda run: run.finish(status, reason))

        closing = _in_background("close the MLflow run", send)
        ended = bool(wait([closing], limit_s).done)
        if self._system.rows():
            self._load_system_metrics()  # those of an earlier start are in the same file
            self._keep_system_metrics()
        if not ended:
            logger.warning(
                "MLflow at %s has not answered for %.0f s, so it may show the run as RUNNING until "
                "the same command or another job on this host is started",
                self._config.uri,
                limit_s,
            )

    def _say_failing(self, topic: Topic, error: Exception) -> None:
        if topic in self._failing:
            return
        self._failing.add(topic)
        if topic != "run" and isinstance(error, MlflowUnavailableError):
            logger.warning(
                "MLflow at %s cannot store the %s of the run: %s; they are kept in %s and will be "
                "sent later, and everything else is recorded",
                error.uri,
                WHAT[topic],
                error.reason,
                self._folder,
            )
        else:
            logger.warning("%s; %s", error, self._meanwhile)

    def _say_working(self, topic: Topic) -> None:
        if topic not in self._failing:
            return
        self._failing.discard(topic)
        logger.info("MLflow at %s can be used again; sending what was kept", self._config.uri)


def how_it_ended(error: BaseException) -> tuple[Status, str]:
    """Return the status of a run that ended with an error, and the reason."""
    if isinstance(error, KeyboardInterrupt):
        return "KILLED", "interrupted (SIGINT)"
    if isinstance(error, SystemExit):
        return "KILLED", f"exited with code {error.code}"
    cause = root_cause(error)
    text = " ".join(str(cause).split())
    if isinstance(cause, StoppedError):
        return "KILLED", text
    if isinstance(cause, STGTError):
        return "FAILED", text
    return "FAILED", f"{type(cause).__name__}: {text}"


def recorded_result(
    result_uri: str,
    *,
    recording: Recording,
    prepare: Callable[[], None],
    work: Callable[[], None],
    record: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Do work once, and record its result in MLflow when that is possible.

    Args:
        result_uri: JSON file that `work` writes. Its field `tracked` states whether the result
            has been recorded in MLflow. Results of earlier versions lack it and were recorded.
        recording: The run.
        prepare: Runs before the work, while another thread opens the run.
        work: Does the work. If it raises, the run is closed with the reason.
        record: Delivers the result to the run, which is then closed.

    Returns:
        The content of the file.

    Raises:
        TrackingSettingError: A wrong setting was found before the work began.
    """
    if not storage.exists(result_uri):
        with recording.running(prepare):
            work()
    result = storage.read_json(result_uri)
    if not result.get("tracked", True):
        try:
            record(result)
        except BaseException as error:
            recording.close(error)
            raise
        if recording.finish():
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
