"""A Ray cluster with TLS on loopback, with the commands of cluster/SECURITY.md."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.certificates import made_certificates
from tests.helpers.data import PROJECT, TinyData
from tests.helpers.servers import BIN, free_ports, listens
from tests.helpers.waiting import wait_until


@pytest.mark.slow
@pytest.mark.soak
def test_a_job_runs_on_a_head_with_tls_and_is_refused_without_certificates(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    certificates = made_certificates(tmp_path / "own")
    strangers = made_certificates(tmp_path / "strangers")
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("0123456789abcdef" * 4)
    gcs, dashboard, client, agent, grpc = free_ports(5)
    base = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    log = tmp_path / "head.log"
    # A short path: sockets of Ray lie below it.
    with tempfile.TemporaryDirectory(prefix="stgt-tls-", ignore_cleanup_errors=True) as folder:
        head = subprocess.Popen(
            [
                str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
                f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
                f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
                f"--dashboard-agent-grpc-port={grpc}", "--num-cpus=4", f"--temp-dir={folder}",
                "--object-store-memory=200000000", "--disable-usage-stats",
            ],
            env={**base, **certificates},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            wait_until(functools.partial(listens, head, dashboard, log), told=log.read_text)
            joining = {**base, "RAY_ADDRESS": f"127.0.0.1:{gcs}"}
            done = ingest(tiny_data, tmp_path / "clips", {**joining, **certificates})
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout.splitlines()[-1])["clips"] > 0
            for environment, expected in (
                (joining, "accepts only TLS connections; set RAY_USE_TLS=1"),
                ({**joining, **strangers}, "do not accept each other's certificates"),
            ):
                started = time.monotonic()
                failed = ingest(tiny_data, tmp_path / "none", environment)
                assert time.monotonic() - started < 15
                assert failed.returncode == 1
                assert expected in failed.stderr.splitlines()[-1], failed.stderr
                assert "Traceback" not in failed.stderr
            assert not list((tmp_path / "none").rglob("catalogue.json"))
        finally:
            end(head)


def ingest(
    data: TinyData, output: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable, "-m", "jobs.ingest", f"--manifest={data.train_manifest}",
            f"--output={output}", "--sampling.size=64", "--sampling.num-frames=6",
            "--num-workers=1", f"--tracking.uri=sqlite:///{output.parent}/mlflow.db",
        ],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip


def end(head: subprocess.Popen[bytes]) -> None:
    """End the head and every process of its session."""
    started = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == head.pid or process.ppid() == head.pid:
                started.append(process)
                started += process.children(recursive=True)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue  # it has ended
    for process in started:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue  # it ended with its parent
    head.wait()
    psutil.wait_procs(started, timeout=30)
