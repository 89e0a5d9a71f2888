"""MLflow's database and runs, through kills and restarts; its settings and its errors."""

from __future__ import annotations

import json
import pickle
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.common import process_identity, ray_errors, tracking
from pipelines.common.config import TrackingConfig
from pipelines.common.mlflow_errors import MlflowUnavailableError, TrackingSettingError
from pipelines.common.tracking import Run, StepMetrics
from tests.helpers.data import PROJECT
from tests.helpers.mlflow_servers import BrokenServer
from tests.helpers.waiting import wait_until

OPEN_A_RUN = """
import sys
from pipelines.common.config import TrackingConfig
from pipelines.common.tracking import Run
folder = sys.argv[1]
Run.open(TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"), "run", f"{folder}/run.json")
"""

TELL_IDENTITY = """
import json
from pipelines.common.process_identity import own_identity
print(json.dumps(own_identity()))
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of MLflow's variables are set."""
    for name in ("TRACKING_URI", "EXPERIMENT_NAME", "EXPERIMENT_ID", "ALLOW_FILE_STORE"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)


@pytest.fixture(scope="module")
def shared(mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    """One database for tests that only add runs to it."""
    copy = shutil.copy(mlflow_database, tmp_path_factory.mktemp("shared") / "mlflow.db")
    return TrackingConfig(uri=f"sqlite:///{copy}")


@pytest.fixture
def client(shared: TrackingConfig) -> MlflowClient:
    return MlflowClient(tracking_uri=shared.uri)


@pytest.fixture
def broken() -> Iterator[BrokenServer]:
    server = BrokenServer()
    yield server
    server.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "after_s", [0.0, *(pytest.param(s, marks=pytest.mark.soak) for s in (0.1, 0.2, 0.4, 0.8, 1.6))]
)
def test_a_database_whose_making_was_killed_is_made_anew(tmp_path: Path, after_s: float) -> None:
    maker = subprocess.Popen([sys.executable, "-c", OPEN_A_RUN, str(tmp_path)], cwd=PROJECT)
    try:
        wait_until(lambda: list(tmp_path.glob(".mlflow.db.*.tmp")) or maker.poll() is not None)
        time.sleep(after_s)
    finally:
        maker.kill()
        maker.wait()
    if not after_s:
        assert list(tmp_path.glob(".mlflow.db.*.tmp"))
        assert not (tmp_path / "mlflow.db").exists()
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    run = Run.open(config, "run", str(tmp_path / "run.json"))
    run.log_metrics({"loss": 2.0})
    run.finish()
    assert not list(tmp_path.glob(".mlflow.db.*.tmp"))
    client = MlflowClient(tracking_uri=config.uri)
    assert client.get_metric_history(run.run_id, "loss")[0].value == 2.0


def test_a_resumed_run_may_have_other_settings(
    shared: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    first = Run.open(shared, "run", str(tmp_path / "run.json"))
    first.log_config({"lr": 1.0, "loaders": 1})
    first.finish("KILLED", "interrupted")
    again = Run.open(shared, "run", str(tmp_path / "run.json"))
    again.log_config({"lr": 1.0, "loaders": 2, "seed": 0})
    assert again.run_id == first.run_id
    found = client.get_run(first.run_id)
    assert found.data.params == {"lr": "1.0", "loaders": "1", "seed": "0"}
    assert found.info.status == "RUNNING"
    assert "end_reason" not in found.data.tags


def test_a_recorded_run_that_was_deleted_is_replaced(
    shared: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    first = Run.open(shared, "run", str(tmp_path / "run.json"))
    client.delete_run(first.run_id)
    again = Run.open(shared, "run", str(tmp_path / "run.json"))
    assert again.run_id != first.run_id
    assert json.loads((tmp_path / "run.json").read_text())["run_id"] == again.run_id


@pytest.mark.slow
def test_a_full_disk_is_known_as_one_and_can_be_mended(
    small_disk: Callable[[str], Path],
) -> None:
    small = small_disk("300k")
    config = TrackingConfig(uri=f"sqlite:///{small}/mlflow.db")
    with pytest.raises(MlflowUnavailableError, match="full") as caught:
        Run.open(config, "run", str(small / "run.json"))
    assert ray_errors.disk_is_full(caught.value)
    small_disk("20m")
    Run.open(config, "run", str(small / "run.json")).finish()


def test_steps_sent_again_after_a_crash_are_entered_once(
    shared: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    run = Run.open(shared, "run", str(tmp_path / "run.json"))
    rows: list[StepMetrics] = [
        {"step": step, "time_ms": 1000 + step, "metrics": {"loss": 1 / step, "lr": 0.1}}
        for step in (1, 2, 3)
    ]
    run.log_steps(rows[:2])  # killed before it could note that they were sent
    run.log_steps(rows, {"step": 3, "late": 2})
    history = client.get_metric_history(run.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert run.logged_steps() == {"step": 3, "late": 2}
    # An earlier version knew one number.
    client.delete_tag(run.run_id, "logged_late_step")
    assert run.logged_steps() == {"step": 3, "late": 3}


def test_results_sent_again_are_entered_once(
    shared: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    run = Run.open(shared, "run", str(tmp_path / "run.json"))
    for _ in range(2):
        run.log_metrics({"t2v/R1": 40.0})
        run.log_checkpoint("model", "/run/step-6", 6, {"loss": 1.0})
    assert len(client.get_metric_history(run.run_id, "t2v/R1")) == 1
    assert len(client.get_metric_history(run.run_id, "loss")) == 1


def test_runs_that_dead_processes_left_open_are_closed_and_no_others(
    shared: TrackingConfig,
    client: MlflowClient,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of a living process, a dead one, a used id, another host, another boot, another program."""
    config = replace(shared, experiment="abandoned")
    ours = Run.open(config, "ours", str(tmp_path / "ours.json"))
    experiment = client.get_run(ours.run_id).info.experiment_id
    gone = subprocess.run(
        [sys.executable, "-c", TELL_IDENTITY], cwd=PROJECT, check=True, capture_output=True
    )
    dead = json.loads(gone.stdout)
    mine = process_identity.own_identity()
    owners = {
        "living": mine,
        "dead": dead,
        "used_again": {**mine, "process.start_ticks": "1"},
        "elsewhere": {**mine, "process.host": "elsewhere", "process.pid": "4194304"},
        "earlier_boot": {**mine, "process.boot_id": "another", "process.pid": "4194304"},
        "foreign": {},
    }
    made = {
        name: client.create_run(experiment, run_name=name, tags=tags).info.run_id
        for name, tags in owners.items()
    }
    finished = client.create_run(experiment, run_name="finished", tags=owners["dead"]).info.run_id
    client.set_terminated(finished)
    with caplog.at_level("INFO"):
        ours.close_abandoned()
    found = {name: client.get_run(run_id) for name, run_id in made.items()}
    closed = {name for name, run in found.items() if run.info.status != "RUNNING"}
    assert closed == {"dead", "used_again"}
    assert all(found[name].info.status == "KILLED" for name in closed)
    reason = found["dead"].data.tags["end_reason"]
    assert f"process {dead['process.pid']} on {dead['process.host']} ended without" in reason
    assert client.get_run(ours.run_id).info.status == "RUNNING"
    assert mine.items() <= client.get_run(ours.run_id).data.tags.items()
    assert client.get_run(finished).info.status == "FINISHED"
    lines = [message for message in caplog.messages if "cannot be checked" in message]
    assert len(lines) == 1
    assert all(name in lines[0] for name in ("elsewhere", "earlier_boot", "foreign"))
    assert "living" not in lines[0]


def test_the_order_is_setting_environment_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.resolve(TrackingConfig()).uri == f"sqlite:///{Path.cwd()}/mlflow.db"
    assert tracking.resolve(TrackingConfig()).experiment == "stgt"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "7")
    found = tracking.resolve(TrackingConfig())
    assert (found.uri, found.experiment, found.experiment_id) == ("http://server:5000", None, "7")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "named")
    found = tracking.resolve(TrackingConfig())
    assert (found.experiment, found.experiment_id) == ("named", None)
    given = TrackingConfig(uri="sqlite:////data/runs.db", experiment="mine")
    assert tracking.resolve(given) == given
    assert tracking.resolve(tracking.resolve(given)) == given


def test_runs_go_where_the_environment_says(
    shared: TrackingConfig,
    client: MlflowClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(shared.uri))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from the environment")
    run = Run.open(TrackingConfig(), "run", str(tmp_path / "run.json"))
    experiment = client.get_experiment_by_name("from the environment")
    assert experiment is not None
    assert client.get_run(run.run_id).info.experiment_id == experiment.experiment_id
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment.experiment_id)
    other = Run.open(TrackingConfig(), "other", str(tmp_path / "other.json"))
    assert client.get_run(other.run_id).info.experiment_id == experiment.experiment_id
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "1234")
    with pytest.raises(TrackingSettingError, match=r"experiment_id = '1234'.*no such experiment"):
        Run.open(TrackingConfig(), "third", str(tmp_path / "third.json"))


@pytest.mark.parametrize(
    ("uri", "bare"),
    [
        ("http://user:secret@host:5000/path", "http://host:5000/path"),
        ("https://secret@host", "https://host"),
        ("http://user:se/c@ret@host", "http://host"),
        ("postgresql+psycopg2://user:secret@host/db", "postgresql+psycopg2://host/db"),
        (
            "mysql://host/db?user=me&password=secret&charset=utf8",
            "mysql://host/db?charset=utf8",
        ),
    ],
)
def test_a_config_never_contains_credentials(uri: str, bare: str) -> None:
    config = TrackingConfig(uri=uri)
    assert config.uri == bare
    assert tracking.resolve(config).uri == bare
    for text in (repr(config), json.dumps(asdict(config)), repr(pickle.dumps(config))):
        assert "secret" not in text
        assert "se/c@ret" not in text


def test_no_message_shows_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
    TrackingConfig(uri="http://me:sl/ash@known")
    said = tracking.without_secrets(
        "http://me:sl/ash@known and postgresql://me:pa55@host/db?ssl=on&password=pa55&x=1 with "
        "'Bearer t0ken'"
    )
    assert said == (
        "http://***@known and postgresql://***@host/db?ssl=on&password=***&x=1 with 'Bearer ***'"
    )


@pytest.mark.parametrize("error", [sqlite3.OperationalError(), ValueError(" \n")])
def test_an_error_without_a_message_is_named_by_its_kind(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(tracking, "_client", fail)
    with pytest.raises(MlflowUnavailableError, match=type(error).__name__):
        Run("http://host", "run")


def test_no_message_shows_what_signs_a_request() -> None:
    TrackingConfig(artifact_uri="https://store/mlflow?AccessKeyId=me1&sslkey=k3y&x=1")
    said = tracking.without_secrets(
        "cannot write https://store/mlflow?AccessKeyId=me1&sslkey=k3y&x=1/config.json, nor "
        "https://other/a?sv=2&sig=s1gned and https://third/b?X-Amz-Signature=s2gned&x=1"
    )
    assert said == (
        "cannot write https://store/mlflow?AccessKeyId=***&sslkey=***&x=1/config.json, nor "
        "https://other/a?sv=2&sig=*** and https://third/b?X-Amz-Signature=***&x=1"
    )


@pytest.mark.parametrize("uri", ["sqlite:////a:b@c/mlflow.db", "http://host:5000", "databricks"])
def test_a_uri_without_credentials_stays_as_it_is(uri: str) -> None:
    assert TrackingConfig(uri=uri).uri == uri
    assert tracking.resolve(TrackingConfig(uri=uri)).uri == uri


@pytest.mark.parametrize("given_by", ["setting", "environment"])
def test_credentials_reach_the_server_and_nothing_else(
    broken: BrokenServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    given_by: str,
) -> None:
    uri = f"http://{given_by}:pa55word@{broken.address}"
    broken.status, broken.body = 500, b""  # tried again, which urllib3 would log
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    config = TrackingConfig()
    if given_by == "setting":
        config = TrackingConfig(uri=uri)
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(MlflowUnavailableError, match="500") as caught:
        Run.open(config, "run", str(tmp_path / "run.json"))
    assert broken.headers["Authorization"].startswith("Basic ")
    assert broken.address in str(caught.value)
    assert "pa55word" not in str(caught.value)
    assert "pa55word" not in caplog.text


@pytest.mark.slow
def test_processes_that_a_sweep_starts_have_the_credentials_as_well(
    broken: BrokenServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://overwritten")
    config = TrackingConfig(uri=f"http://user:pa55word@{broken.address}")
    tracking.share_credentials(config)
    broken.status, broken.body = 403, b"{}"
    opening = (
        "import pickle, sys; from pipelines.common.tracking import Run; "
        "Run.open(pickle.loads(bytes.fromhex(sys.argv[1])), 'run', sys.argv[2])"
    )
    sent = [pickle.dumps(config).hex(), str(tmp_path / "run.json")]
    done = subprocess.run(
        [sys.executable, "-c", opening, *sent], cwd=PROJECT, capture_output=True, check=False
    )
    assert b"MlflowUnavailableError" in done.stderr
    assert broken.headers["Authorization"].startswith("Basic ")


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}', "PERMISSION_DENIED: no"),
        (401, b"who are you?", "401"),
        (404, b"nothing", "404"),
        (507, b"full", "507"),
        (400, b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "bad"}', "bad"),
        (200, b"<html>please log in</html>", "not in a valid JSON format"),
        (200, b'{"experiment": 7}', "experiment"),
    ],
)
def test_every_answer_of_a_broken_server_is_one_sentence(
    broken: BrokenServer, tmp_path: Path, status: int, body: bytes, reason: str
) -> None:
    broken.status, broken.body = status, body
    with pytest.raises(MlflowUnavailableError) as caught:
        Run.open(TrackingConfig(uri=f"http://{broken.address}"), "run", str(tmp_path / "run.json"))
    said = str(caught.value)
    assert said.startswith(f"MLflow at http://{broken.address} cannot be used: ")
    assert reason in said
    assert "\n" not in said
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


def test_a_server_that_does_not_answer_is_named_with_the_reason(
    mlflow_away: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(MlflowUnavailableError) as caught:
        Run.open(mlflow_away, "run", str(tmp_path / "run.json"))
    assert str(caught.value) == f"MLflow at {mlflow_away.uri} cannot be used: connection refused"


def test_a_database_of_another_version_of_mlflow_is_one_sentence(
    shared: TrackingConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "mlflow.db"
    copy.write_bytes(Path(str(shared.uri).removeprefix("sqlite:///")).read_bytes())
    with sqlite3.connect(copy) as database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    with pytest.raises(MlflowUnavailableError, match="out-of-date database schema"):
        Run.open(TrackingConfig(uri=f"sqlite:///{copy}"), "run", str(tmp_path / "run.json"))
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftp://host/runs", r"'ftp://host/runs': MLflow does not support ftp://"),
        ("htp://user:secret@host", r"'htp://host': MLflow does not support htp://"),
        ("mlruns", "no longer records to folders"),
        ("sqlite://mlflow.db", "write it as sqlite:///FILE"),
        ("sqlite:///{folder}", "is a folder; give a file"),
        ("sqlite:///{folder}/text", "is not an SQLite database"),
    ],
)
def test_a_wrong_uri_is_refused_in_one_sentence(tmp_path: Path, uri: str, message: str) -> None:
    (tmp_path / "text").write_text("this is a text, and no database")
    with pytest.raises(TrackingSettingError, match=message) as caught:
        tracking.resolve(TrackingConfig(uri=uri.format(folder=tmp_path)))
    assert "secret" not in str(caught.value)


def test_a_deleted_experiment_is_refused_with_the_remedy(
    shared: TrackingConfig, client: MlflowClient, tmp_path: Path
) -> None:
    number = client.create_experiment("deleted")
    client.delete_experiment(number)
    with pytest.raises(TrackingSettingError, match=f"mlflow experiments restore -x {number}"):
        Run.open(replace(shared, experiment="deleted"), "run", str(tmp_path / "run.json"))


def test_name_and_id_of_an_experiment_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="must not be set together with tracking.experiment"):
        TrackingConfig(experiment="a", experiment_id="1")
