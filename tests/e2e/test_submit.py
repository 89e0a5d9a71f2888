"""Jobs on a cluster with token authentication: submitted, followed, stopped and continued."""

from __future__ import annotations

import functools
import http.server
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.helpers.data import PROJECT, TinyData
from tests.helpers.heads import Cluster, running_head
from tests.helpers.kills import paused
from tests.helpers.models import released_alpro
from tests.helpers.submitting import Submission, environment_of
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.slow
STEPS = 80


def training(data: TinyData, folder: Path, *more: str) -> tuple[str, ...]:
    return (
        "train", "pretrain_stage1_tiny", "--data", data.train_store, "--val-store", data.val_store,
        "--vocab", data.vocab, "--output", str(folder / "run"), "--steps", str(STEPS),
        "--global-batch", "16", "--checkpoint-every", "20", "--progress-every", "1",
        "--num-workers", "1", "--tracking.uri", f"sqlite:///{folder}/mlflow.db", *more,
    )  # fmt: skip


def free_cpus(head: Cluster) -> float:
    """CPUs of the cluster that nobody holds, and no placement group reserves."""
    program = (
        "import json, ray; ray.init(logging_level='ERROR');"
        "print(json.dumps(ray.available_resources().get('CPU', 0)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**head.environment, "RAY_ADDRESS": head.gcs_address},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return float(done.stdout.splitlines()[-1])


def test_a_stopped_training_ends_in_order_and_the_same_command_continues(
    head: Cluster, tiny_data: TinyData, tmp_path: Path
) -> None:
    submit = functools.partial(Submission, head, arguments=training(tiny_data, tmp_path))
    first = submit(log=tmp_path / "first.log")
    first.wait_for(f"pretrain_stage1_tiny: 1 of {STEPS} steps")
    assert "submitted as train-run to" in first.said()

    # Training waits, so that it does not end before it is stopped.
    with paused("RayTrainWorker", head.pid):
        # The same command while it runs follows the same job. Ctrl-C without a terminal leaves it,
        # and so does SIGTERM.
        leaving = {signal.SIGINT: 130, signal.SIGTERM: 143}
        followers = {number: submit(log=tmp_path / f"{number.name}.log") for number in leaving}
        for number, follower in followers.items():
            follower.wait_for("train-run runs already")
            follower.wait_for(f"pretrain_stage1_tiny: 1 of {STEPS} steps")
            follower.process.send_signal(number)
            assert follower.ended()[0] == leaving[number]
            assert "train-run keeps running" in follower.said()
        changed = Submission(
            head, tmp_path / "other.log", training(tiny_data, tmp_path, "--seed", "1")
        )
        assert changed.ended() == (1, "")
        assert "error: the job train-run runs with other settings" in changed.said()

        # At a terminal, Ctrl-C asks.
        third = submit(log=tmp_path / "third.log", at_terminal=True)
        third.wait_for(f"pretrain_stage1_tiny: 1 of {STEPS} steps")
        third.process.send_signal(signal.SIGINT)
        third.wait_for("stop train-run? [y/N]")
        third.answer("y")
        third.wait_for("SIGTERM: stopping after a checkpoint")
    assert third.ended() == (143, "")
    assert first.ended() == (143, "")
    assert "train-run was stopped; run the same command again to continue" in first.said()
    assert "Traceback" not in first.said()
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step-*/COMPLETE"))
    assert checkpoints
    wait_until(lambda: free_cpus(head) == head.cpus)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    record = json.loads((tmp_path / "run" / "mlflow_run.json").read_text())
    run = client.get_run(record["run_id"])
    assert run.info.status == "KILLED"
    assert "stopped at step" in run.data.tags["end_reason"]

    again = submit(log=tmp_path / "again.log")
    assert again.result()["step"] == STEPS
    assert "submitted as train-run-2 to" in again.said()
    assert "resumes from step" in again.said()
    run = client.get_run(record["run_id"])
    assert run.info.status == "FINISHED"
    curve = client.get_metric_history(run.info.run_id, "loss/total")
    assert [point.step for point in curve] == list(range(1, STEPS + 1))


@pytest.mark.soak
def test_all_pipelines_run_as_submitted_jobs(
    head: Cluster, tiny_data: TinyData, tmp_path: Path
) -> None:
    tracking = ("--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db")

    def submitted(name: str, *settings: str) -> dict:
        return Submission(head, tmp_path / f"{name}.log", settings).result()

    annotations = f"{Path(tiny_data.videos).parent}/results_train.csv"
    manifest = str(tmp_path / "train.parquet")
    made = submitted(
        "manifest", "manifest", "--annotations", annotations, "--videos", tiny_data.videos,
        "--output", manifest, "--split", "train",
    )  # fmt: skip
    assert made["clips"] == 40
    ingested = submitted(
        "ingest", "ingest", "--manifest", manifest, "--output", str(tmp_path / "clips"),
        "--num-workers", "1", "--sampling.num-frames", "12", "--sampling.size", "64", *tracking,
    )  # fmt: skip
    assert ingested["clips"] + ingested["quarantined"] == 40
    model = (
        "pretrain_stage1_tiny", "--data", ingested["store"], "--val-store", tiny_data.val_store,
        "--vocab", tiny_data.vocab, "--steps", "8", "--global-batch", "16",
        "--checkpoint-every", "4", "--num-workers", "1", *tracking,
    )  # fmt: skip
    trained = submitted("train", "train", *model, "--output", str(tmp_path / "run"))
    assert trained["step"] == 8
    for name in ("one", "two"):
        evaluated = submitted(
            f"evaluate-{name}", "evaluate", "any", "--data", tiny_data.val_store,
            "--checkpoint", trained["best_checkpoint"], "--output", str(tmp_path / name), *tracking,
        )  # fmt: skip
        assert 0 <= evaluated["metrics"]["t2v/R1"] <= 100
    compared = Submission(
        head, tmp_path / "compare.log", ("compare", str(tmp_path / "one"), str(tmp_path / "two"))
    )
    code, out = compared.ended()
    assert code == 0, compared.said()[-3000:]
    # However many lines a job prints, each is JSON, and nothing else is on standard output.
    assert [json.loads(line) for line in out.splitlines()]
    swept = submitted(
        "sweep", "sweep", *model, "--output", str(tmp_path / "sweep"), "--space",
        "optim.lr=grid(1e-3,1e-4)", "--search", "grid", "--scheduler", "none",
    )  # fmt: skip
    assert swept["trials"] == 2
    registered = submitted(
        "register", "register", trained["best_checkpoint"], "--name", "tiny", *tracking,
    )  # fmt: skip
    assert registered["version"] == "1"
    imported = submitted(
        "import", "import_weights", "--checkpoint", str(released_alpro(tmp_path)),
        "--vocab", str(tmp_path / "words.txt"), "--output", str(tmp_path / "model"),
        "--vision-heads", "4", "--qformer-heads", "4", "--fusion-layer", "1",
    )  # fmt: skip
    assert imported["found"] == "ALPRO, retrieval"
    results = ("--output", str(tmp_path / "bench"))
    measured = Submission(
        head, tmp_path / "bench.log", ("bench", "spans", "--repeats", "1", *results)
    )
    code, out = measured.ended()
    assert code == 0, measured.said()[-3000:]
    assert all(json.loads(line)["name"].startswith("spans") for line in out.splitlines())
    assert out
    wait_until(lambda: free_cpus(head) == head.cpus)


@pytest.mark.soak
def test_a_submission_begins_its_work_soon_after_the_command_would(
    head: Cluster, tiny_data: TinyData, tmp_path: Path
) -> None:
    """The first line of work, of the same training on the same head, three times each."""
    taken: dict[str, list[float]] = {"command": [], "submission": []}
    for attempt in range(3):
        for way in taken:
            folder = tmp_path / f"{way}-{attempt}"
            folder.mkdir()
            log = folder / "log"
            arguments = training(tiny_data, folder, "--steps", "2")
            began = time.monotonic()
            if way == "submission":
                submission = Submission(head, log, arguments)
                submission.wait_for("steps of 16 clips")
                taken[way].append(time.monotonic() - began)
                submission.result()
                continue
            with log.open("w") as stream:
                job = subprocess.Popen(
                    [sys.executable, "-m", f"jobs.{arguments[0]}", *arguments[1:]],
                    cwd=PROJECT,
                    env={**head.environment, "RAY_ADDRESS": head.gcs_address},
                    stdout=subprocess.DEVNULL,
                    stderr=stream,
                )
            wait_until(lambda log=log: "steps of 16 clips" in log.read_text(), told=log.read_text)
            taken[way].append(time.monotonic() - began)
            assert job.wait(timeout=240) == 0, log.read_text()[-3000:]
    medians = {way: statistics.median(seconds) for way, seconds in taken.items()}
    print({way: [round(one, 1) for one in seconds] for way, seconds in taken.items()})
    assert medians["submission"] <= medians["command"] + 15


@pytest.mark.soak
def test_a_lost_head_is_said_and_the_run_continues_on_another(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    submit = functools.partial(
        Submission, arguments=training(tiny_data, tmp_path, "--max-stall-s", "300")
    )
    with running_head(tmp_path / "one") as head:
        first = submit(head, log=tmp_path / "first.log")
        first.wait_for(f"pretrain_stage1_tiny: 1 of {STEPS} steps")
        wait_until(lambda: list((tmp_path / "run" / "checkpoints").glob("step-*/COMPLETE")))
    code, out = first.ended(timeout_s=300)
    assert (code, out) == (1, "")
    assert "error: the cluster has not answered for 120 s" in first.said()
    with running_head(tmp_path / "two") as head:
        second = submit(head, log=tmp_path / "second.log")
        assert second.result()["step"] == STEPS
    assert "resumes from step" in second.said()
    record = json.loads((tmp_path / "run" / "mlflow_run.json").read_text())
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert client.get_run(record["run_id"]).info.status == "FINISHED"
    curve = client.get_metric_history(record["run_id"], "loss/total")
    assert [point.step for point in curve] == list(range(1, STEPS + 1))


def test_a_failing_job_has_its_own_exit_code(head: Cluster, tmp_path: Path) -> None:
    failing = Submission(
        head,
        tmp_path / "log",
        ("evaluate", "any", "--data", "/nowhere", "--checkpoint", "/nowhere/model",
         "--output", str(tmp_path / "out"), "--tracking.uri", f"sqlite:///{tmp_path}/m.db"),
    )  # fmt: skip
    assert failing.ended() == (1, "")
    assert "error: " in failing.said()
    assert "Traceback" not in failing.said()


def test_an_image_without_the_project_is_named(head: Cluster, tmp_path: Path) -> None:
    bare = tmp_path / "bin" / "python"
    bare.parent.mkdir()
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    submission = Submission(
        head,
        tmp_path / "log",
        ("compare", "/a", "/b", "--output", "/c"),
        settings=("--working-dir", "None", "--env", f"PATH={bare.parent}:/usr/bin:/bin"),
    )
    assert submission.ended()[0] == 1
    assert "error: the cluster's image does not contain this project" in submission.said()


def refused(arguments: list[str], environment: dict[str, str], cwd: Path) -> tuple[str, float]:
    """The one sentence of a command that is refused, and how long it took."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    seconds = time.monotonic() - began
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line, seconds


@pytest.fixture(scope="module")
def start_s() -> float:
    """Seconds of a command that is refused before it looks for a cluster.

    They tell how busy the machine is.
    """
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "RAY_ADDRESS": "http://no"}
    _, seconds = refused(["tests.helpers.join_a_cluster"], environment, PROJECT)
    return seconds


EVALUATION = ["evaluate", "any", "--data", "/a", "--checkpoint", "/b", "--output", "/c"]


@pytest.mark.parametrize("mode", ["submit", "join"])
@pytest.mark.parametrize(
    ("token", "said"),
    [("0" * 64, "refused the token; set RAY_AUTH_TOKEN_PATH"), (None, "no token can be read; set")],
)
def test_a_wrong_token_is_refused_at_once(
    token: str | None, said: str, mode: str, head: Cluster, tmp_path: Path, start_s: float
) -> None:
    wrong = tmp_path / "token"
    if token is not None:
        wrong.write_text(token)
    environment = {**environment_of(head), "RAY_AUTH_TOKEN_PATH": str(wrong)}
    if mode == "submit":
        arguments = ["jobs.submit", "--address", head.address, *EVALUATION]
    else:
        environment["RAY_ADDRESS"] = head.gcs_address
        arguments = ["tests.helpers.join_a_cluster"]
    line, seconds = refused(arguments, environment, PROJECT if mode == "join" else tmp_path)
    assert said in line
    assert seconds < 15 + start_s


@pytest.mark.parametrize("mode", ["submit", "join"])
def test_no_cluster_at_the_address_is_said_at_once(
    mode: str, tmp_path: Path, start_s: float
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "RAY_ADDRESS": address}
    arguments = {
        "submit": ["jobs.submit", "--address", f"http://{address}", *EVALUATION],
        "join": ["tests.helpers.join_a_cluster"],
    }[mode]
    line, seconds = refused(arguments, environment, PROJECT if mode == "join" else tmp_path)
    assert "there is no Ray cluster at" in line
    assert "connection refused" in line
    assert seconds < 15 + start_s


def test_another_python_on_the_cluster_is_named(head: Cluster, start_s: float) -> None:
    environment = {**environment_of(head), "RAY_ADDRESS": head.gcs_address}
    set_version = [sys.executable, "-m", "tests.helpers.cluster_versions"]
    before = subprocess.run(
        [*set_version, "2.60.0", "3.9.1"],
        cwd=PROJECT, env=environment, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    try:
        line, seconds = refused(["tests.helpers.join_a_cluster"], environment, PROJECT)
    finally:
        subprocess.run([*set_version, *before[-2:]], cwd=PROJECT, env=environment, check=True)
    assert "runs Ray 2.60.0 and Python 3.9.1, and this process Ray 2.60" in line
    assert seconds < 15 + start_s


@pytest.fixture
def stub_dashboard() -> Iterator[tuple[str, dict[str, object]]]:
    """A server that answers as a dashboard does, with what a test sets."""
    answer: dict[str, object] = {"status": 200, "body": {}}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answer["body"]).encode()
            self.send_response(int(str(answer["status"])))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Print nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answer
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, {"version": "4", "ray_version": "2.9.0"}, "runs Ray 2.9.0 and this project needs"),
        (401, {}, "requires a token"),
        (200, {"other": 1}, "is not a Ray dashboard"),
        (500, {}, "is not a Ray dashboard"),
    ],
)
def test_a_server_that_cannot_take_the_job_is_named(
    status: int,
    body: dict,
    said: str,
    stub_dashboard: tuple[str, dict[str, object]],
    tmp_path: Path,
    start_s: float,
) -> None:
    address, answer = stub_dashboard
    answer.update(status=status, body=body)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PYTHONPATH": str(PROJECT),
    }
    arguments = ["jobs.submit", "--address", address, *EVALUATION]
    line, seconds = refused(arguments, environment, tmp_path)
    assert said in line
    assert seconds < 15 + start_s
