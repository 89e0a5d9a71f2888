"""A team's MLflow server as `cluster/mlflow` documents it, and what its pages show.

Eight trainings record at once, with two accounts, while the server is killed and started again.
Afterwards everything is there once. Needs the Debian packages postgresql and chromium.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.entities import ViewType

from tests.helpers import log_trainings
from tests.helpers.data import PROJECT
from tests.helpers.faulty_s3 import FaultyS3
from tests.helpers.mlflow_servers import TeamServer
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


@pytest.fixture(scope="module")
def team(s3: FaultyS3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    with postgres() as database:
        server = TeamServer(
            tmp_path_factory.mktemp("team"),
            database.environment,
            "s3://bucket/mlflow",
            {name: os.environ[name] for name in names},
        )
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


@pytest.fixture(scope="module")
def trainings(team: Team, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight trainings that recorded while the server was killed and started again."""
    folder = tmp_path_factory.mktemp("trainings")
    started = start(team, folder, STEPS)
    wait_until(lambda: len(runs_with_metrics(team)) == len(STEPS), told=team.server.log.read_text)
    team.server.kill()
    time.sleep(1)
    team.server.start()
    finish(team, folder, STEPS, started)
    return folder


def start(team: Team, folder: Path, steps: Sequence[int]) -> list[subprocess.Popen[bytes]]:
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
                env={**os.environ, **account, **IMPATIENT},
            )
        )  # fmt: skip
    return started


def finish(
    team: Team, folder: Path, steps: Sequence[int], started: list[subprocess.Popen[bytes]]
) -> None:
    """Wait for trainings, and run the same commands again for what MLflow lacks then."""
    for process in started:
        assert process.wait(300) <= len(steps), "a training failed"
    for process in start(team, folder, steps):
        assert process.wait(300) == 0, "MLflow lacks something"


def runs_with_metrics(team: Team) -> list[tuple]:
    return team.database.query("SELECT DISTINCT run_uuid FROM metrics WHERE key = 'loss'")


def check_complete(client: MlflowClient, team: Team, steps: Sequence[int]) -> None:
    """Everything is in MLflow once: runs, metrics of every step, settings and files."""
    experiment = client.get_experiment_by_name(log_trainings.EXPERIMENT)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)
    names = [log_trainings.name_of(number) for number in range(len(steps))]
    assert sorted(str(run.info.run_name) for run in found) == names
    runs = {str(run.info.run_name): run for run in found}
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
        check_files(client, run, number)
    models = client.search_logged_models([experiment.experiment_id])
    assert sorted(model.name for model in models) == names


def check_files(client: MlflowClient, run: MlflowRun, number: int) -> None:
    assert run.data.params.items() >= {"seed": str(number), "optim.lr": "0.001"}.items()
    files = {file.path: file.file_size for file in client.list_artifacts(run.info.run_id)}
    assert {"config.json", log_trainings.REPORT} <= set(files)
    report = client.download_artifacts(run.info.run_id, log_trainings.REPORT)
    assert Path(report).read_bytes() == log_trainings.report_of(number)


def test_nothing_is_lost_or_doubled_when_the_server_is_killed(
    team: Team, trainings: Path, client: MlflowClient
) -> None:
    check_complete(client, team, STEPS)
