"""An export under SIGKILL: the same command continues it, and the bytes are the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipelines.export.config import ExportConfig
from pipelines.export.run import run_export
from tests.helpers.data import PROJECT, digests
from tests.helpers.exports import clip, write_manifest
from tests.helpers.kills import processes
from tests.helpers.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.soak]

VIDEOS = 600


def records(output: Path) -> int:
    return len(list(output.glob("records/*.json")))


def test_a_killed_export_is_started_again(
    ray_cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = []
    for number in range(VIDEOS):
        video = tmp_path / f"{number}.mp4"
        video.write_bytes(number.to_bytes(2, "big") * 100_000)
        rows.append(clip(f"clip{number}", str(video)))
    manifest = write_manifest(tmp_path / "m.parquet", rows)
    config = ExportConfig(
        manifest=manifest, output=str(tmp_path / "calm"), videos_per_tar=1, num_workers=2
    )
    run_export(config)
    killed = tmp_path / "killed"
    command = [
        sys.executable, "-m", "jobs.export", f"--manifest={manifest}", f"--output={killed}",
        "--videos-per-tar=1", "--num-workers=2",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(command, cwd=PROJECT, env=environment, stderr=subprocess.DEVNULL)
    family: list[psutil.Process] = []
    try:
        wait_until(lambda: records(killed) >= 3)
        family = processes("TarWriter", driver.pid)
    finally:
        driver.kill()
        driver.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, "workers of the killed run go on"
    assert family
    finished = records(killed)
    assert 3 <= finished < VIDEOS
    assert not (killed / "tars.json").exists()
    again = ExportConfig(manifest=manifest, output=str(killed), videos_per_tar=1, num_workers=2)
    with caplog.at_level("INFO"):
        run_export(again)
    assert f"export resumes: {finished} of {VIDEOS} videos" in caplog.text
    assert digests(str(killed)) == digests(str(tmp_path / "calm"))
