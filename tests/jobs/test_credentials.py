"""Credentials in a job's command line: hidden from other users, and still used."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from jobs.credentials import split_credentials
from tests.helpers.data import PROJECT
from tests.helpers.mlflow_servers import BrokenServer
from tests.helpers.waiting import wait_until

SECRET = "pl4ntedpa55"


@pytest.mark.parametrize(
    ("words", "bare", "full"),
    [
        (
            ["--tracking.uri", "http://me:pw@host", "--steps", "3"],
            ["--tracking.uri", "http://host", "--steps", "3"],
            ["http://me:pw@host"],
        ),
        (
            ["--tracking.artifact_uri=https://host/a?x=1&sig=abc"],
            ["--tracking.artifact_uri=https://host/a?x=1"],
            ["https://host/a?x=1&sig=abc"],
        ),
        (["--tracking.uri"], ["--tracking.uri"], []),
        (["--tracking.uri=http://host"], ["--tracking.uri=http://host"], []),
        # The signature is what fetches this video, so it stays.
        (
            ["--videos", "https://host/v.mp4?sig=abc"],
            ["--videos", "https://host/v.mp4?sig=abc"],
            [],
        ),
        (["--data", "s3://b/a:b@c"], ["--data", "s3://b/a:b@c"], []),
    ],
)
def test_a_command_line_is_split_into_public_words_and_whole_uris(
    words: list[str], bare: list[str], full: list[str]
) -> None:
    assert split_credentials(words) == (bare, full)


@pytest.mark.slow
def test_a_job_hides_credentials_from_its_command_line_and_uses_them() -> None:
    server = BrokenServer()
    server.status, server.body, server.delay_s = 401, b"You are not authenticated.", 1.5
    uri = f"http://me:{SECRET}@{server.address}"
    job = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jobs.compare",
            "0123456789abcdef0123456789abcdef",
            "--tracking.uri",
            uri,
        ],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: server.requests > 0 or job.poll() is not None)
        words = psutil.Process(job.pid).cmdline()
        out, err = job.communicate(timeout=60)
    finally:
        job.kill()
        server.close()
    assert f"http://{server.address}" in " ".join(words)
    assert SECRET not in " ".join(words)
    assert server.headers["Authorization"].startswith("Basic ")
    assert job.returncode == 1
    assert "does not accept the credentials" in err
    assert SECRET not in out + err
