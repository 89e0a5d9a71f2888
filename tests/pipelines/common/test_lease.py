"""A folder is used by one process at a time, on disk and on object storage."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pipelines.common import lease, storage
from stgt.errors import STGTError
from tests.helpers.data import PROJECT
from tests.helpers.faulty_s3 import FaultyS3
from tests.helpers.waiting import wait_until

HOLD = """
    import signal, sys, time
    from pipelines.common import lease
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as in a job
    lease.RENEW_S = float(sys.argv[2])
    with lease.exclusive(sys.argv[1]):
        print("holds", flush=True)
        time.sleep(600)
"""


def hold(uri: str, renew_s: float = lease.RENEW_S) -> subprocess.Popen[str]:
    """Start a process that uses a folder until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), uri, str(renew_s)],
        cwd=PROJECT,
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    return process


def test_a_local_folder_is_locked(tmp_path: Path) -> None:
    with (
        lease.exclusive(str(tmp_path)),
        pytest.raises(STGTError, match="another run is using"),
        lease.exclusive(str(tmp_path)),
    ):
        pass
    with lease.exclusive(str(tmp_path)):
        pass


@pytest.mark.slow
def test_a_folder_on_object_storage_is_refused_until_its_process_is_dead(s3: FaultyS3) -> None:
    uri = "s3://bucket/in-use"
    process = hold(uri)
    try:
        refused = rf"process {process.pid} on .* is using s3://bucket/in-use .*another folder"
        with pytest.raises(STGTError, match=refused), lease.exclusive(uri):
            pass
    finally:
        process.kill()
        process.wait()
    with lease.exclusive(uri):
        assert storage.exists(f"{uri}/{lease.FILE}")
    assert not storage.exists(f"{uri}/{lease.FILE}")


@pytest.mark.slow
def test_a_process_of_another_host_is_believed_for_a_minute(
    s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "s3://bucket/elsewhere"
    entry = {"token": "other", "process.host": "elsewhere", "process.pid": "7"}
    storage.write_json(f"{uri}/{lease.FILE}", {**entry, "renewed_at": time.time() - 30})
    with (
        pytest.raises(STGTError, match=r"process 7 on elsewhere is using .*30 s ago"),
        lease.exclusive(uri),
    ):
        pass
    storage.write_json(f"{uri}/{lease.FILE}", {**entry, "renewed_at": time.time() - 70})
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    with lease.exclusive(uri):
        first = storage.read_json(f"{uri}/{lease.FILE}")
        assert first["token"] != "other"
        wait_until(
            lambda: storage.read_json(f"{uri}/{lease.FILE}")["renewed_at"] > first["renewed_at"]
        )


@pytest.mark.slow
def test_a_process_whose_folder_was_taken_over_ends_and_leaves_it_to_the_other(
    s3: FaultyS3,
) -> None:
    """As after a pause so long that the process counted as gone."""
    uri = "s3://bucket/taken-over"
    entry = f"{uri}/{lease.FILE}"
    process = hold(uri, renew_s=0.1)

    def has_ended() -> bool:
        # Maybe more than once: an entry that falls between a look and a renewal is overwritten.
        if storage.exists(entry) and storage.read_json(entry)["token"] != "other":
            other = {"token": "other", "process.host": "elsewhere", "process.pid": "7"}
            storage.write_json(entry, {**other, "renewed_at": time.time()})
        return process.poll() is not None

    try:
        wait_until(has_ended, 60)
    finally:
        process.kill()
        _, said = process.communicate()
    assert process.returncode == 143
    assert f"another process has taken {entry} over" in said
    assert storage.read_json(entry)["token"] == "other"
