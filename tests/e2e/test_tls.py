"""A Ray cluster with TLS on loopback, with the commands of cluster/SECURITY.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.util import get_node_ip_address

from tests.helpers.certificates import made_certificates
from tests.helpers.data import PROJECT, TinyData
from tests.helpers.heads import ray_head


@pytest.mark.slow
@pytest.mark.soak
def test_a_job_runs_on_a_head_with_tls_and_is_refused_without_certificates(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    host = get_node_ip_address()
    certificates = made_certificates(tmp_path / "own", host)
    strangers = made_certificates(tmp_path / "strangers", host)
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("0123456789abcdef" * 4)
    base = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with ray_head({**base, **certificates}, tmp_path / "head.log") as head:
        joining = {**base, "RAY_ADDRESS": head.address}
        done = ingest(tiny_data, tmp_path / "clips", {**joining, **certificates})
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["clips"] > 0
        for environment, expected in (
            (joining, "accepts only TLS connections; set RAY_USE_TLS=1"),
            ({**joining, **strangers}, "do not accept each other's certificates"),
        ):
            started = time.monotonic()
            failed = ingest(tiny_data, tmp_path / "none", environment)
            refused_s = time.monotonic() - started
            assert failed.returncode == 1
            assert expected in failed.stderr.splitlines()[-1], failed.stderr
            assert "Traceback" not in failed.stderr
            # A job that is refused before it looks for the cluster tells how busy the machine is.
            started = time.monotonic()
            ingest(tiny_data, tmp_path / "none", {**environment, "RAY_ADDRESS": "http://no"})
            assert refused_s < 15 + (time.monotonic() - started)
        assert not list((tmp_path / "none").rglob("catalogue.json"))


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
