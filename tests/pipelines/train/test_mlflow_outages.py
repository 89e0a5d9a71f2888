"""A server that goes away at any moment, for seconds or minutes, loses nothing and ends nothing."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType

from tests.helpers import log_trainings
from tests.helpers.mlflow_outages import KillableServer, Mode, Proxy
from tests.helpers.mlflow_servers import mlflow_server
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.slow

STEPS = 10
EXPERIMENT = "outages"


@pytest.fixture(scope="module")
def server(mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(mlflow_database, folder / "mlflow.db")
    with mlflow_server(folder, str(folder / "artifacts")) as uri:
        yield uri


@pytest.fixture
def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What trainings of this process record to. Its clients give up soon."""
    proxy = Proxy(server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    monkeypatch.setattr("pipelines.common.recording.OUTAGE_PAUSE_S", 0.2)
    yield proxy
    proxy.close()


def check_complete(client: MlflowClient, number: int, steps: int) -> None:
    """One run, one checkpoint, and the metrics of every step once."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    name = log_trainings.name_of(number)
    (run,) = client.search_runs(
        [experiment.experiment_id],
        f"attributes.run_name = '{name}'",
        run_view_type=ViewType.ACTIVE_ONLY,
    )
    assert run.info.status == "FINISHED"
    assert run.data.params["seed"] == str(number)
    for key in log_trainings.metrics_of(number, steps):
        points = client.get_metric_history(run.info.run_id, key)
        assert [(point.step, point.value) for point in points] == [
            (step, values[key])
            for step in range(1, steps + 1)
            if key in (values := log_trainings.metrics_of(number, step))
        ]
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"config.json", log_trainings.REPORT} <= files
    models = client.search_logged_models([experiment.experiment_id])
    (model,) = [model for model in models if model.source_run_id == run.info.run_id]
    assert str(model.status) == "READY"


def has_steps(uri: str, number: int, steps: int) -> Callable[[], bool]:
    """Whether the server has some steps of a training."""
    client = MlflowClient(tracking_uri=uri)

    def found() -> bool:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            return False
        wanted = f"attributes.run_name = '{log_trainings.name_of(number)}'"
        runs = client.search_runs([experiment.experiment_id], wanted)
        return (
            bool(runs)
            and "loss" in runs[0].data.metrics
            and (len(client.get_metric_history(runs[0].info.run_id, "loss")) >= steps)
        )

    return found


@pytest.mark.parametrize(
    ("number", "mode", "after_steps"),
    [
        (0, "failing", 0),
        (1, "answers lost", 0),
        (2, "gone", STEPS),
        pytest.param(3, "gone", 0, marks=pytest.mark.soak),
        pytest.param(4, "failing", 3, marks=pytest.mark.soak),
        pytest.param(5, "gone", 3, marks=pytest.mark.soak),
        pytest.param(6, "failing", STEPS, marks=pytest.mark.soak),
        pytest.param(7, "answers lost", 3, marks=pytest.mark.soak),
        pytest.param(8, "answers lost", STEPS, marks=pytest.mark.soak),
    ],
)
def test_a_training_has_everything_after_an_outage(
    proxy: Proxy, server: str, tmp_path: Path, number: int, mode: Mode, after_steps: int
) -> None:
    """Before the first request, amid the steps, or at the end; without another start."""

    def go_away() -> None:
        if after_steps:
            wait_until(has_steps(server, number, after_steps), every_s=0.05)
        proxy.mode = mode
        # At least the client's own attempts, and one more after it gave up.
        wait_until(lambda: proxy.requests[mode] >= 4, every_s=0.05)
        proxy.mode = "up"

    if not after_steps:
        proxy.mode = mode
    outage = threading.Thread(target=go_away)
    outage.start()
    try:
        assert log_trainings.train(tmp_path, number, STEPS)
    finally:
        outage.join()
    assert proxy.requests[mode] >= 4
    check_complete(MlflowClient(tracking_uri=server), number, STEPS)


@pytest.mark.soak
@pytest.mark.parametrize("after_steps", [0, 3, STEPS])
def test_a_killed_server_may_be_away_for_two_minutes(
    mlflow_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_steps: int
) -> None:
    """With the settings that users have."""
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    server = KillableServer(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    if after_steps:
        server.start()

    def go_away() -> None:
        if after_steps:
            wait_until(has_steps(server.uri, 0, after_steps), every_s=0.05)
            server.kill()
        time.sleep(120)
        server.start()

    outage = threading.Thread(target=go_away)
    outage.start()
    try:
        complete = log_trainings.train(tmp_path, 0, STEPS)
        outage.join()
        # Of a server that was never there, the next start of the same command sends everything.
        assert complete == bool(after_steps)
        assert log_trainings.train(tmp_path, 0, STEPS)
        check_complete(MlflowClient(tracking_uri=server.uri), 0, STEPS)
    finally:
        outage.join()
        server.kill()
