"""A team's MLflow server as `cluster/mlflow` documents it, and what its pages show.

Eight trainings record at once, with two accounts, while the server is killed and started again.
Afterwards everything is there once. Needs the Debian packages postgresql and chromium.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun

from pipelines.common.config import TrackingConfig
from pipelines.common.mlflow_errors import MlflowUnavailableError
from pipelines.common.tracking import Run
from tests.helpers import browser, log_trainings
from tests.helpers.data import PROJECT
from tests.helpers.faulty_s3 import FaultyS3
from tests.helpers.mlflow_pages import MlflowPages
from tests.helpers.mlflow_servers import PUBLIC_HOST, TeamServer, authorization
from tests.helpers.postgres import Postgres, postgres
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.slow

STEPS = (10, 10, 20, 20, 30, 40, 60, 80)
"""Steps of the trainings: some end while the server is away, and others once it is back."""
IMPATIENT = {"MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0", "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0"}
"""Clients do not pause between attempts, so that the tests take less time."""


@dataclass(frozen=True)
class Team:
    """A running server with its database and two accounts."""

    server: TeamServer
    database: Postgres
    accounts: tuple[dict[str, str], ...]


def s3_variables() -> dict[str, str]:
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    return {name: os.environ[name] for name in names}


@pytest.fixture(scope="module")
def team(s3: FaultyS3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    with postgres() as database:
        folder = tmp_path_factory.mktemp("team")
        server = TeamServer(folder, database.environment, "s3://bucket/mlflow", s3_variables())
        try:
            server.start()
            accounts = tuple(server.add_account(name) for name in ("first", "second"))
            yield Team(server, database, accounts)
        finally:
            server.kill()


@pytest.fixture
def client(team: Team, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """The administrator's client."""
    for name, value in team.server.admin.items():
        monkeypatch.setenv(name, value)
    return MlflowClient(tracking_uri=team.server.uri)


def start(
    team: Team, folder: Path, steps: Sequence[int], experiment: str
) -> list[subprocess.Popen[bytes]]:
    """Start trainings, which each account runs some of."""
    started = []
    for place, account in enumerate(team.accounts):
        share = range(place, len(steps), len(team.accounts))
        started.append(
            subprocess.Popen(
                [
                    sys.executable, "-m", "tests.helpers.log_trainings", str(folder),
                    *(f"{number}={steps[number]}" for number in share),
                ],
                cwd=PROJECT,
                env={**os.environ, **account, **IMPATIENT, "MLFLOW_EXPERIMENT_NAME": experiment},
                stdout=subprocess.PIPE,
            )
        )  # fmt: skip
    return started


def lacking(started: list[subprocess.Popen[bytes]]) -> int:
    """Wait for trainings; gives the number of those of which MLflow lacks something."""
    count = 0
    for process in started:
        printed, _ = process.communicate(timeout=400)
        assert process.returncode != log_trainings.FAILED
        assert printed == b"", "MLflow printed where a job prints its result"
        count += process.returncode
    return count


def kill_a_connection(database: Postgres) -> None:
    """Crash PostgreSQL, which ends all connections and recovers when one of them is killed."""
    for process in psutil.Process(database.process.pid).children():
        if "mlflow" in " ".join(process.cmdline()):
            process.kill()
            return


def runs_with_metrics(team: Team) -> list[tuple]:
    return team.database.query("SELECT DISTINCT run_uuid FROM metrics WHERE key = 'loss'")


def check_complete(
    client: MlflowClient, team: Team, steps: Sequence[int], experiment: str
) -> dict[str, MlflowRun]:
    """Everything is in MLflow once: runs, metrics of every step, settings, files and models."""
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    experiment_id = found.experiment_id
    names = [log_trainings.name_of(number) for number in range(len(steps))]
    all_runs = client.search_runs([experiment_id])
    assert sorted(str(run.info.run_name) for run in all_runs) == names
    runs = {str(run.info.run_name): run for run in all_runs}
    metrics = team.database.query("SELECT run_uuid, key, step, value FROM metrics ORDER BY step")
    for number, (name, length) in enumerate(zip(names, steps, strict=True)):
        run = runs[name]
        assert run.info.status == "FINISHED"
        for key in log_trainings.metrics_of(number, length):
            points = [row[2:] for row in metrics if row[:2] == (run.info.run_id, key)]
            assert points == [
                (step, values[key])
                for step in range(1, length + 1)
                if key in (values := log_trainings.metrics_of(number, step))
            ]
        assert run.data.params.items() >= {"seed": str(number), "optim.lr": "0.001"}.items()
        assert [entry.dataset.digest for entry in run.inputs.dataset_inputs] == [f"{number:012d}"]
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert {"config.json", log_trainings.REPORT} <= files
        report = client.download_artifacts(run.info.run_id, log_trainings.REPORT)
        assert Path(report).read_bytes() == log_trainings.report_of(number)
    models = client.search_logged_models([experiment_id])
    assert sorted(model.name for model in models) == names
    return runs


def test_nothing_is_lost_or_doubled_when_the_server_is_killed(
    team: Team, client: MlflowClient, tmp_path: Path
) -> None:
    started = start(team, tmp_path, STEPS, "killed once")
    wait_until(lambda: len(runs_with_metrics(team)) == len(STEPS), told=team.server.log.read_text)
    team.server.kill()
    time.sleep(1)
    team.server.start()
    if lacking(started):
        assert lacking(start(team, tmp_path, STEPS, "killed once")) == 0
    check_complete(client, team, STEPS, "killed once")


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"Authorization": "Basic bm9ib2R5OndyaXRlcw=="}, 401),
        ({"Host": "other.example.org"}, 403),
        ({"Origin": "http://other.example.org"}, 403),
        ({}, 200),
    ],
)
def test_the_server_refuses_strangers(team: Team, changes: dict[str, str], status: int) -> None:
    headers = {"Content-Type": "application/json", "Authorization": authorization(team.accounts[0])}
    request = urllib.request.Request(
        f"{team.server.uri}/api/2.0/mlflow/experiments/search",
        b'{"max_results": 1}',
        {**headers, **changes},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = answer.status
    except urllib.error.HTTPError as error:
        found = error.code
    assert found == status


def test_members_open_the_pages_under_the_public_name(team: Team, tmp_path: Path) -> None:
    """What one member recorded, another sees."""
    config = TrackingConfig(uri=team.server.uri, experiment="seen by members")
    first, second = team.accounts
    with pytest.MonkeyPatch.context() as variables:
        for name, value in first.items():
            variables.setenv(name, value)
        run = Run.open(config, "of the first member", str(tmp_path / "run.json"))
        run.finish()
        experiment = MlflowClient(team.server.uri).get_experiment_by_name("seen by members")
    assert experiment is not None
    with browser.page(tmp_path, PUBLIC_HOST) as page:
        page.size(1600, 1000)
        page.send_headers({"Authorization": authorization(second)})
        rows = MlflowPages(page, team.server.pages).runs(experiment.experiment_id, 1)
        assert set(rows) == {"of the first member"}


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(3))
def test_long_trainings_lose_and_double_nothing(
    team: Team, client: MlflowClient, tmp_path: Path, seed: int
) -> None:
    """The server is killed at random moments, the first of them while runs are opened.

    In between, the database crashes.
    """
    chance = random.Random(seed)
    steps = [10 * chance.randint(10, 40) for _ in STEPS]
    experiment = f"killed often, {seed}"
    started = start(team, tmp_path, steps, experiment)
    for number in range(3):
        time.sleep(chance.uniform(0, 10))
        team.server.kill()
        time.sleep(chance.uniform(0, 10))
        team.server.start()
        if number == 1:
            time.sleep(chance.uniform(0, 3))
            kill_a_connection(team.database)
    if lacking(started):
        assert lacking(start(team, tmp_path, steps, experiment)) == 0
    check_complete(client, team, steps, experiment)
    # The same commands again change nothing.
    assert lacking(start(team, tmp_path, steps, experiment)) == 0
    check_complete(client, team, steps, experiment)


@pytest.mark.soak
def test_an_upload_that_takes_long_needs_the_documented_time_limit(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answers when S3 has the file; this S3 answers after half a minute."""
    silent = "s3://bucket/silent/mlflow"
    server = TeamServer(tmp_path, team.database.environment, silent, s3_variables())
    account = {**team.accounts[0], "MLFLOW_TRACKING_URI": server.uri}
    for name, value in {**account, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}.items():
        monkeypatch.setenv(name, value)
    try:
        server.start()
        config = TrackingConfig(uri=server.uri, experiment="slow uploads")
        run = Run.open(config, "run", str(tmp_path / "run.json"))
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        with pytest.raises(MlflowUnavailableError, match="timed out"):
            run.log_file("weights", b"0123456789")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3600")
        run.log_file("weights", b"0123456789")
        run.finish()
    finally:
        server.kill()
