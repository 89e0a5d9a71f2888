"""What a job prints when it fails: one sentence for the user, or a traceback of a bug."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from jobs.entry import LATE_START, RAY_START_WAIT, run_job, start_ray
from stgt.errors import ClipStoreError, SettingError, STGTError
from tests.helpers.data import PROJECT
from tests.helpers.waiting import has_ended, wait_until


def output_of(error: Exception, capsys: pytest.CaptureFixture[str]) -> str:
    def work() -> dict[str, object]:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_job(work)
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


@pytest.mark.parametrize(
    "error",
    [
        SettingError("steps = 0: must be at least 1"),
        ClipStoreError("no clips"),
        OSError("it is gone"),
    ],
)
def test_an_error_for_the_user_is_one_sentence(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert output_of(error, capsys) == f"error: {error}\n"


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: json.loads("{"),  # a library's ValueError, which no setting caused
        lambda: {}["missing"],
        lambda: torch.zeros(2) @ torch.zeros(3),
    ],
)
def test_a_bug_keeps_its_traceback_and_is_called_one(
    mistake: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(mistake)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        mistake()
    said = output_of(caught.value, capsys)
    assert said.startswith("Traceback (most recent call last):")
    assert "test_entry.py" in said
    name = type(caught.value).__name__
    assert said.splitlines()[-1] == (
        f"error: unexpected {name}: this is a bug in this project or in a library that it uses, "
        "not in your settings; please report it with the lines above"
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("Task was killed due to the node running low on memory.\nMany\nlines"),
    ],
)
def test_too_little_memory_is_one_sentence(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    said = output_of(error, capsys)
    assert said.startswith("error: out of memory (")
    assert said.count("\n") == 1
    assert "use fewer workers or smaller batches" in said


NOISY = """
import sys

from jobs.entry import Job, main
from jobs.settings import CommandLine
from pipelines.compare.config import CompareConfig


def work(config):
    print("(raylet) a node has been lost")  # as a thread of Ray does
    return {"done": True}


if __name__ == "__main__":
    command_line = CommandLine(CompareConfig, "Compares.")
    main(Job(name="noisy", summary="Compares.", command_line=command_line, target="noisy:work"))
"""


def test_standard_output_holds_the_summary_alone(tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(NOISY)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "noisy.py"), "one", "two"],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, '{"done": true}\n'), done.stderr
    assert "(raylet) a node has been lost" in done.stderr


WORK_UNTIL_STOPPED = """
import os
import signal
import sys
import threading
import time

from jobs.entry import run_job, start_ray

ours = None


def stop_once_ray_has_its_handler():
    while signal.getsignal(signal.SIGTERM) is ours:
        time.sleep(0.001)
    print("working", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def work():
    global ours
    ours = signal.getsignal(signal.SIGTERM)
    if "starting Ray" in sys.argv:
        threading.Thread(target=stop_once_ray_has_its_handler, daemon=True).start()
    if "nothing" not in sys.argv:
        start_ray(cpus=1)
    print("working", flush=True)
    time.sleep(300)


run_job(work)
"""


@pytest.mark.parametrize(
    "what",
    [
        pytest.param("nothing", marks=pytest.mark.slow),
        pytest.param("with Ray", marks=pytest.mark.ray),
        pytest.param("starting Ray", marks=pytest.mark.ray),
    ],
)
def test_a_job_that_is_told_to_end_says_so_and_leaves_no_process(what: str) -> None:
    """Ray replaces the handler of SIGTERM by its own, which exits with 15 and says nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    job = subprocess.Popen(
        [sys.executable, "-c", WORK_UNTIL_STOPPED, what],
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert job.stdout is not None
        assert job.stdout.readline() == "working\n"
        started = []
        if what != "starting Ray":
            started = psutil.Process(job.pid).children(recursive=True)
            job.send_signal(signal.SIGTERM)
        assert bool(started) == (what == "with Ray")
        _, said = job.communicate(timeout=60)
    finally:
        job.kill()
        job.wait()
    assert job.returncode == 143, said
    told = "error: stopped by SIGTERM; run the same command again to continue"
    assert said.splitlines()[-1] == told
    assert "Traceback" not in said
    assert "SIGTERM received" not in said
    wait_until(lambda: all(map(has_ended, started)), 60)


@pytest.mark.ray
def test_a_ray_that_does_not_start_in_time_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray._private import node

    # The phrase is that of the installed version.
    assert node.__file__ is not None
    assert LATE_START in Path(node.__file__).read_text()

    def init(**_: object) -> None:
        raise Exception(f"The current node {LATE_START}.")  # noqa: TRY002 - as Ray does

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(RAY_START_WAIT, "120")
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(STGTError, match="did not start within 120 s"):
        start_ray(cpus=1)


START_WITH_A_LATE_RAYLET = """
import sys

from ray._private import services

from jobs.entry import set_up_process, start_ray

services.RAYLET_EXECUTABLE = sys.argv[1]
set_up_process()
start_ray(cpus=1)
"""


@pytest.mark.slow
@pytest.mark.soak
def test_a_ray_that_needs_longer_than_it_waits_by_default_starts(tmp_path: Path) -> None:
    """Ray gives up after 30 s, as it does on a machine on which everything takes that long."""
    from ray._private import services

    late = tmp_path / "raylet"
    late.write_text(f'#!/bin/sh\nsleep 40\nexec {services.RAYLET_EXECUTABLE} "$@"\n')
    late.chmod(0o700)
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    for environment, code in ((without, 0), ({**without, RAY_START_WAIT: "30"}, 1)):
        done = subprocess.run(
            [sys.executable, "-c", START_WITH_A_LATE_RAYLET, str(late)],
            cwd=PROJECT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert ("Ray did not start within 30 s" in done.stderr) == (code == 1)
