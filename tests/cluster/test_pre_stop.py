"""The hook that lets training end in order before a pod does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray

from tests.helpers.manifests import CLUSTER

HOOK = CLUSTER / "pre_stop.sh"
PYTHON = Path(sys.executable).resolve()
"""The program itself, since a wrapper would start it under its own name."""

STAND_IN = """
import pathlib, signal, sys, time
name, delay = pathlib.Path(sys.argv[1]), float(sys.argv[2])
def end(number, frame):
    time.sleep(delay)
    name.with_suffix(".asked").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
name.with_suffix(".runs").touch()
time.sleep(60)
"""
"""A process that notes SIGTERM and then takes some time, as a worker does for its checkpoint."""


class Pod:
    """Processes of their own, as in a pod, since the hook looks at all processes of its user."""

    def __init__(self, folder: Path) -> None:
        """Prepare the script of the pod."""
        self.folder = folder
        self._stand_in = folder / "stand_in.py"
        self._stand_in.write_text(STAND_IN)
        self._lines: list[str] = []
        self._names: list[str] = []

    def runs(self, name: str, title: str, delay_s: float = 0.0) -> None:
        """Add a process with a command line that begins with a title."""
        self._names.append(name)
        # A command line as `ps` shows it, which Ray sets for its workers.
        self._lines.append(
            f"(exec -a '{title}' {PYTHON} {self._stand_in} {self.folder / name} {delay_s}) &"
        )

    def stop(self, *arguments: str, wait_s: float = 20) -> tuple[int, float, str]:
        """Run the hook; gives its exit code, its seconds, and what it printed."""
        for name in self._names:
            self._lines.append(f"until [ -e {self.folder / name}.runs ]; do sleep 0.05; done")
        self._lines += [
            f"STGT_PRE_STOP_WAIT_S={wait_s} {HOOK} {' '.join(arguments)}",
            "echo code=$?",
        ]
        began = time.monotonic()
        done = subprocess.run(
            [*NAMESPACE, "bash", "-c", "\n".join(self._lines)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        code = int(done.stdout.strip().removeprefix("code="))
        return code, time.monotonic() - began, done.stderr

    def was_asked(self, name: str) -> bool:
        """Whether a process has received SIGTERM and ended in its own time."""
        return (self.folder / f"{name}.asked").exists()


NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
if os.geteuid() != 0:
    NAMESPACE[1:1] = ["--user", "--map-current-user"]


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    if subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("namespaces of processes are not allowed here")
    return Pod(tmp_path)


@pytest.mark.slow
def test_training_workers_are_asked_and_waited_for(pod: Pod) -> None:
    pod.runs("worker", "ray::RayTrainWorker", delay_s=1.0)
    pod.runs("loader", "ray::MapWorker(MapBatches(ClipLoader))")
    pod.runs("mentions", "python3 -c ray::RayTrainWorker")
    code, seconds, said = pod.stop("workers")
    assert code == 0, said
    assert seconds >= 1.0
    assert pod.was_asked("worker")
    assert not pod.was_asked("loader")
    assert not pod.was_asked("mentions")


@pytest.mark.slow
def test_a_worker_in_a_method_is_a_worker(pod: Pod) -> None:
    pod.runs("worker", "ray::RayTrainWorker.execute")
    code, _, said = pod.stop("workers")
    assert code == 0, said
    assert pod.was_asked("worker")


@pytest.mark.slow
def test_the_hook_gives_up_in_time_and_says_so(pod: Pod) -> None:
    pod.runs("worker", "ray::RayTrainWorker", delay_s=30)
    code, seconds, said = pod.stop("workers", wait_s=2)
    assert code == 0
    assert 1 <= seconds < 15
    assert "1 workers still run after 2 s" in said


@pytest.mark.slow
def test_jobs_are_waited_for_and_get_no_second_signal(pod: Pod) -> None:
    pod.runs("driver", "/opt/venv/bin/python3 -m jobs.train")
    code, seconds, said = pod.stop("drivers", wait_s=2)
    assert code == 0
    assert seconds >= 1
    assert "1 drivers still run" in said
    assert not pod.was_asked("driver")


def test_a_pod_without_training_ends_at_once(pod: Pod) -> None:
    pod.runs("loader", "ray::MapWorker(MapBatches(ClipLoader))")
    code, _, said = pod.stop("workers")
    assert code == 0
    assert said == ""


@pytest.mark.ray
def test_ray_gives_training_workers_the_title_that_the_hook_looks_for(ray_cluster: None) -> None:
    found = re.search(r"workers\) pattern='(.*?)'", HOOK.read_text())
    assert found is not None

    @ray.remote(num_cpus=0)
    class RayTrainWorker:
        def title(self) -> str:
            return " ".join(psutil.Process().cmdline())

    worker = RayTrainWorker.remote()
    assert re.match(found[1], ray.get(worker.title.remote()))
    ray.kill(worker)


def test_an_unknown_argument_is_refused(pod: Pod) -> None:
    code, _, said = pod.stop("everything")
    assert code == 2
    assert "give workers or drivers" in said
