"""Jobs as users call them: exit codes, one clear sentence, `ray job submit` on a real cluster."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from pipelines import recipes, sweep
from pipelines.config import TrackingConfig
from tests.conftest import TinyData

PROJECT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.slow


def job(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", *flags],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_own_videos_become_a_clip_store(tiny_data: TinyData, tmp_path: Path) -> None:
    """The way the README shows for one's own videos."""
    made = job(
        "manifest",
        f"--annotations={Path(tiny_data.videos).parent / 'results_val.csv'}",
        f"--videos={tiny_data.videos}",
        f"--output={tmp_path / 'm.parquet'}",
    )
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["clips"] == 12
    stored = job(
        "ingest",
        f"--manifest={tmp_path / 'm.parquet'}",
        f"--output={tmp_path / 'clips'}",
        "--sampling.num-frames=8",
        "--sampling.size=64",
    )
    assert stored.returncode == 0, stored.stderr
    summary = json.loads(stored.stdout)
    assert (summary["clips"], summary["quarantined"]) == (12, 0)
    assert Path(summary["store"], "catalogue.json").exists()


def test_a_csv_with_missing_columns_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_text("x")
    (tmp_path / "a.csv").write_text("id,caption\n1,x\n")
    failed = job(
        "manifest",
        f"--annotations={tmp_path / 'a.csv'}",
        f"--videos={tmp_path / 'videos'}",
        f"--output={tmp_path / 'm.parquet'}",
    )
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith("error: ")
    assert "lacks the columns videoid, page_dir, name (found: id, caption)" in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "m.parquet").exists()


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    try:
        failed = job(
            "ingest", f"--manifest={tiny_data.train_manifest}", f"--output={small}",
            "--sampling.size=224", "--num-workers=1",
        )  # fmt: skip
        assert failed.returncode == 1
        assert "error: no space left on the disk" in failed.stderr
        assert "Traceback" not in failed.stderr
        assert not list(small.rglob("catalogue.json"))
        assert not list(small.rglob("*.tmp"))
        assert not list(small.rglob("shards/*.json"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_sweep_runs_four_trials_under_one_parent(tiny_data: TinyData, tmp_path: Path) -> None:
    from dataclasses import replace

    config = recipes.sweep_tiny("unused", str(tmp_path / "sweep"))
    train = replace(
        config.train,
        store=tiny_data.train_store,
        val_store=tiny_data.val_store,
        vocab=tiny_data.vocab,
        steps=4,
        global_batch=16,
        block_clips=8,
        checkpoint_every=2,
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="sweep"),
    )
    summary = sweep.run_sweep(replace(config, train=train, grace_steps=2))
    assert summary["trials"] == 4
    assert set(summary["best_params"]) == {"lr", "similarity_threshold"}
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("sweep")
    assert experiment is not None
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop(summary["run_id"])
    assert parent.info.status == "FINISHED"
    assert len(runs) == 4
    searched = set()
    for run in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status in ("FINISHED", "KILLED")
        params = run.data.params
        searched.add((params["optim.lr"], params["model.graph.similarity_threshold"]))
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss/total")]
        assert sorted(set(steps)) == list(range(1, max(steps) + 1))
    assert searched == {(lr, th) for lr in ("0.0003", "0.001") for th in ("0.5", "0.95")}
    stopped = [run for run in runs.values() if run.info.status == "KILLED"]
    assert len(stopped) == summary["stopped_early"]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray head on loopback with a token of its own; gives its address and the environment."""
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    # The agent too: jobs are started by it, and another Ray here may hold its usual port.
    gcs, dashboard, client, agent, grpc = free_ports(5)
    before = {process.pid for process in psutil.process_iter()}
    process = subprocess.Popen(
        [
            str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
            f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
            f"--dashboard-agent-grpc-port={grpc}", "--num-cpus=4",
            "--object-store-memory=200000000", "--disable-usage-stats",
        ],
        env=environment,
        stdout=(tmp_path / "head.log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while True:
            assert process.poll() is None, (tmp_path / "head.log").read_text()[-2000:]
            assert time.monotonic() < deadline, (tmp_path / "head.log").read_text()[-2000:]
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", dashboard)) == 0:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{dashboard}", environment
    finally:
        started = [
            child
            for child in psutil.process_iter()
            if child.pid not in before and _descends_from(child, process.pid)
        ]
        for child in (*started, process):
            try:
                os.kill(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended with its parent
        process.wait()


def _descends_from(process: psutil.Process, ancestor: int) -> bool:
    """Whether a process belongs to the session that the head's process opened, or below it."""
    try:
        return os.getsid(process.pid) == ancestor or any(
            parent.pid == ancestor for parent in process.parents()
        )
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False


def submit(address: str, environment: dict[str, str], *entrypoint: str) -> tuple[int, str]:
    """`ray job submit`, again while the cluster that was just started has no agent for jobs yet."""
    deadline = time.monotonic() + 60
    while True:
        code, log = submit_once(address, environment, *entrypoint)
        if "No available agent" not in log or time.monotonic() > deadline:
            return code, log
        time.sleep(2)


def submit_once(address: str, environment: dict[str, str], *entrypoint: str) -> tuple[int, str]:
    done = subprocess.run(
        [
            str(BIN / "ray"), "job", "submit", "--address", address,
            "--", *entrypoint,
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_the_quickstart_runs_as_a_ray_job(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, environment = head
    code, log = submit(
        address, environment, sys.executable, "-m", "jobs.quickstart",
        f"--output={tmp_path / 'out'}", "--train-videos=100", "--val-videos=12",
        "--stage1-steps=2", "--stage2-steps=2", "--global-batch=16",
    )  # fmt: skip
    assert code == 0, log[-3000:]
    lines = [line for line in log.splitlines() if line.startswith('{"')]
    assert len(lines) == 1, log[-3000:]
    summary = json.loads(lines[0])
    assert summary["clips_ingested"] == 111
    assert "t2v/R1" in summary
    # The cluster that runs the job is the one it was submitted to.
    assert "starting a local Ray" not in log

    code, log = submit(
        address, environment, sys.executable, "-m", "jobs.ingest",
        "--manifest=/nowhere/m.parquet", f"--output={tmp_path / 'clips'}",
    )  # fmt: skip
    assert code == 1
    assert "error: manifest /nowhere/m.parquet is not there" in log
