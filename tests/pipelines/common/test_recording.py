"""A stage goes on without MLflow, and its run says what happened to it."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.common import storage
from pipelines.common.config import TrackingConfig
from pipelines.common.mlflow_errors import TrackingSettingError
from pipelines.common.recording import Recording, recorded_result
from pipelines.common.system_metrics import SWITCH
from pipelines.common.tracking import Run
from stgt.errors import ClipStoreError, StoppedError
from tests.helpers.data import PROJECT
from tests.helpers.mlflow_servers import BrokenServer, mlflow_server
from tests.helpers.waiting import wait_until

WORK_UNTIL_KILLED = """
import sys, time
from jobs.entry import run_job
from pipelines.common import recording
from pipelines.common.config import TrackingConfig
from pipelines.common.recording import Recording
recording.OPENING_S = 300  # a busy machine imports MLflow for longer than a user should wait
folder, uri = sys.argv[1:]
record = f"{folder}/run.json"
def work():
    run = Recording(TrackingConfig(uri=uri), "run", record, {}, meanwhile="it goes on")
    with run.running():
        print("working", flush=True)
        time.sleep(60)
run_job(work)
"""
LOCK = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1])
database.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
input()
"""


@pytest.fixture(autouse=True)
def no_system_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test on a slow machine would otherwise send some, after ten seconds."""
    monkeypatch.setenv(SWITCH, "false")


@pytest.fixture
def config(mlflow_database: Path, tmp_path: Path) -> TrackingConfig:
    """A database of its own for a test."""
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    return TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="recordings")


@pytest.fixture
def broken() -> Iterator[BrokenServer]:
    server = BrokenServer()
    server.status, server.body = 403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}'
    yield server
    server.close()


def recording_in(folder: Path, config: TrackingConfig) -> Recording:
    return Recording(
        config, "run", str(folder / "run.json"), {"lr": 0.1}, meanwhile="the work continues"
    )


def run_of(folder: Path, config: TrackingConfig):  # noqa: ANN201
    record = json.loads((folder / "run.json").read_text())
    return MlflowClient(tracking_uri=config.uri).get_run(record["run_id"])


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ClipStoreError("no clip is usable"), "FAILED", "no clip is usable"),
        (RuntimeError("of a library"), "FAILED", "RuntimeError: of a library"),
        (StoppedError("stopped at step 3 after SIGTERM"), "KILLED", "stopped at step 3"),
        (KeyboardInterrupt(), "KILLED", "interrupted (SIGINT)"),
        (SystemExit(3), "KILLED", "exited with code 3"),
    ],
)
def test_a_run_is_closed_with_what_happened(
    config: TrackingConfig, tmp_path: Path, error: BaseException, status: str, reason: str
) -> None:
    recording = recording_in(tmp_path, config)
    with pytest.raises(type(error)), recording.running():
        raise error
    run = run_of(tmp_path, config)
    assert run.info.status == status
    assert reason in run.data.tags["end_reason"]
    # The same command continues it.
    again = recording_in(tmp_path, config)
    with again.running():
        assert again.run_id == run.info.run_id
    assert again.finish()
    assert run_of(tmp_path, config).info.status == "FINISHED"
    assert "end_reason" not in run_of(tmp_path, config).data.tags


@pytest.mark.slow
def test_sigterm_closes_the_run(config: TrackingConfig, tmp_path: Path) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", WORK_UNTIL_KILLED, str(tmp_path), str(config.uri)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"working\n"
        worker.send_signal(signal.SIGTERM)
        _, said = worker.communicate(timeout=30)
        assert worker.returncode == 143
        assert (
            said == b"error: run was stopped by SIGTERM; run the same command again to continue\n"
        )
    finally:
        worker.kill()
        worker.wait()
    run = run_of(tmp_path, TrackingConfig(uri=config.uri))
    assert run.info.status == "KILLED"
    assert run.data.tags["end_reason"].startswith("run was stopped by SIGTERM")


def test_results_are_sent_by_the_next_start_and_the_log_says_so_once(
    config: TrackingConfig, broken: BrokenServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A server without permission, then a database: the work is done once."""
    done = []
    result_uri = str(tmp_path / "result.json")

    def work() -> None:
        done.append(1)
        storage.write_json(result_uri, {"R1": 40.0, "tracked": False})

    def start(config: TrackingConfig) -> dict:
        recording = recording_in(tmp_path, config)

        def record(result: dict) -> None:
            recording.deliver(lambda run: run.log_metrics({"R1": result["R1"]}))
            recording.deliver(lambda run: run.log_json("result.json", result), "files")

        return recorded_result(
            result_uri, recording=recording, prepare=lambda: None, work=work, record=record
        )

    with caplog.at_level("INFO"):
        assert start(TrackingConfig(uri=f"http://{broken.address}"))["tracked"] is False
    said = [one for one in caplog.messages if "MLflow" in one]
    assert said == [
        f"MLflow at http://{broken.address} cannot be used: PERMISSION_DENIED: no; the work "
        "continues",
        f"MLflow at http://{broken.address} lacks some results of run; they are in {tmp_path}, run "
        "the same command again to send them",
    ]
    assert start(config)["tracked"] is True
    assert done == [1]
    run = run_of(tmp_path, config)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"R1": 40.0})
    assert start(config)["tracked"] is True
    history = MlflowClient(tracking_uri=config.uri).get_metric_history(run.info.run_id, "R1")
    assert len(history) == 1


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (401, b"You are not authenticated.", "wants some (401); set MLFLOW_TRACKING_USERNAME and "),
        (403, b"Permission denied", "this user has no permission (403); ask for it, or set other "),
        (403, b'{"error_code": "PERMISSION_DENIED", "message": "quota"}', "_DENIED: quota; the "),
    ],
)
def test_refused_credentials_are_said_before_the_work_begins_which_goes_on(
    broken: BrokenServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    status: int,
    body: bytes,
    reason: str,
) -> None:
    broken.status, broken.body = status, body
    uri = f"http://me:pa55@{broken.address}"
    recording = recording_in(tmp_path, TrackingConfig(uri=uri))
    with recording.running():
        (said,) = [one for one in caplog.messages if "cannot be used" in one]
    assert said.startswith(f"MLflow at http://{broken.address} cannot be used: ")
    assert reason in said
    assert said.endswith("; the work continues")
    assert "\n" not in said
    assert "pa55" not in caplog.text
    assert not recording.finish()


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_said_before_the_work_begins_which_goes_on(
    mlflow_away: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With the attempts that users' clients make."""
    recording = recording_in(tmp_path, mlflow_away)
    started = time.monotonic()
    with recording.running():
        assert time.monotonic() - started < 15
        (said,) = [one for one in caplog.messages if str(mlflow_away.uri) in one]
    reasons = ("cannot be used: connection refused", "has not opened the run within 10 s")
    assert any(
        said == f"MLflow at {mlflow_away.uri} {reason}; the work continues" for reason in reasons
    )


def test_what_was_kept_is_sent_when_mlflow_works_again(
    config: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that opens, and a database that loses its tables for a while."""
    recording = recording_in(tmp_path, config)
    database = sqlite3.connect(tmp_path / "mlflow.db")
    with caplog.at_level("INFO"), recording.running():
        database.execute("ALTER TABLE metrics RENAME TO hidden")
        recording.deliver(lambda run: run.log_metrics({"a": 1.0}))
        assert not recording.attempt(lambda run: run.log_metrics({"b": 2.0}))
        said = [one for one in caplog.messages if "no such table: metrics; the work" in one]
        assert len(said) == 1
        database.execute("ALTER TABLE hidden RENAME TO metrics")
        database.close()
        assert recording.finish()
    assert [one for one in caplog.messages if "MLflow" in one][1:] == [
        f"MLflow at {config.uri} can be used again; sending what was kept"
    ]
    assert run_of(tmp_path, config).data.metrics == {"a": 1.0}


def test_a_server_that_is_late_holds_nothing_up(
    config: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work that cannot begin ends at once, and its run is closed when it has been opened."""
    opened = threading.Event()
    really_open = Run.open

    def open_late(*args: object) -> Run:
        assert opened.wait(timeout=30)
        return really_open(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "open", open_late)
    monkeypatch.setattr("pipelines.common.recording.CLOSING_UNOPENED_S", 0.1)

    def prepare() -> None:
        raise ValueError("no cluster")

    started = time.monotonic()
    with (
        pytest.raises(ValueError, match="no cluster"),
        recording_in(tmp_path, config).running(prepare),
    ):
        raise AssertionError
    assert time.monotonic() - started < 2
    opened.set()
    wait_until(lambda: (tmp_path / "run.json").exists())
    wait_until(lambda: run_of(tmp_path, config).info.status == "FAILED")


def test_a_wrong_setting_is_refused_before_the_work(config: TrackingConfig, tmp_path: Path) -> None:
    client = MlflowClient(tracking_uri=config.uri)
    client.delete_experiment(client.create_experiment("recordings"))
    with (
        pytest.raises(TrackingSettingError, match="is deleted; restore it with"),
        recording_in(tmp_path, config).running(),
    ):
        raise AssertionError("the work began")


def test_a_full_disk_does_not_end_the_work(
    mlflow_database: Path,
    small_disk: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    size_kb = mlflow_database.stat().st_size // 1024
    small = small_disk(f"{size_kb + 8}k")
    shutil.copy(mlflow_database, small / "mlflow.db")
    config = TrackingConfig(uri=f"sqlite:///{small}/mlflow.db")
    recording = recording_in(tmp_path, config)
    with recording.running():
        pass
    assert not recording.finish()
    assert "database or disk is full; the work continues" in caplog.text
    small_disk("20m")
    assert recording.finish()


def test_a_folder_of_mlflow_is_written_by_the_same_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = TrackingConfig(uri=str(tmp_path / "file" / "mlruns"))
    (tmp_path / "file").touch()  # nothing can be written below a file
    recording = recording_in(tmp_path, config)
    with recording.running():
        recording.deliver(lambda run: run.log_metrics({"a": 1.0}))
    assert not recording.finish()
    said = [one for one in caplog.messages if "cannot be used" in one]
    assert len(said) == 1
    assert f"not a directory: {tmp_path}/file/mlruns; the work continues" in said[0]
    (tmp_path / "file").unlink()
    assert recording.finish()
    uri = (tmp_path / "file" / "mlruns").as_uri()
    run = run_of(tmp_path, TrackingConfig(uri=uri))
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"a": 1.0})


@pytest.mark.slow
def test_a_server_whose_artifacts_cannot_be_written_records_the_rest(
    mlflow_database: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    root = tmp_path / "file" / "artifacts"  # below a file, where nobody can write
    root.parent.touch()
    with mlflow_server(tmp_path, str(root)) as uri:
        config = TrackingConfig(uri=uri, experiment="recordings")
        recording = recording_in(tmp_path, config)
        with recording.running():
            recording.deliver(lambda run: run.log_metrics({"a": 1.0}))
            recording.deliver(lambda run: run.log_file("page.html", b"<p>"), "files")
        assert not recording.finish()
        run = run_of(tmp_path, config)
        assert (run.info.status, run.data.metrics) == ("FINISHED", {"a": 1.0})
        assert run.data.params == {"lr": "0.1"}
        said = [one for one in caplog.messages if "cannot store" in one]
        assert len(said) == 1
        assert said[0].startswith(f"MLflow at {uri} cannot store the config and the files of the ")
        assert str(root.parent) in said[0]
        # Once it can be written, the next start sends the files.
        root.parent.unlink()
        again = recording_in(tmp_path, config)
        again.deliver(lambda run: run.log_file("page.html", b"<p>"), "files")
        assert again.finish()
        stored = {path.name for path in root.rglob("*") if path.is_file()}
        assert stored == {"config.json", "page.html"}


@pytest.mark.soak
@pytest.mark.slow
def test_a_database_that_another_process_locks_for_long(
    config: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recording = recording_in(tmp_path, config)
    with caplog.at_level("INFO"), recording.running():
        holder = subprocess.Popen(
            [sys.executable, "-c", LOCK, str(tmp_path / "mlflow.db")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"locked\n"
            assert not recording.attempt(lambda run: run.log_metrics({"a": 1.0}))
            assert not recording.attempt(lambda run: run.log_metrics({"a": 1.0}))
        finally:
            holder.kill()
            holder.wait()
        assert recording.attempt(lambda run: run.log_metrics({"a": 1.0}))
    said = [one for one in caplog.messages if "MLflow" in one]
    assert said == [
        f"MLflow at {config.uri} cannot be used: database is locked; the work continues",
        f"MLflow at {config.uri} can be used again; sending what was kept",
    ]
    assert "Traceback" not in caplog.text
    assert recording.finish()
