"""The quickstart as a user runs it: killed, finished as a job, started twice, interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tests.helpers.data import PROJECT
from tests.helpers.heads import Cluster
from tests.helpers.waiting import wait_until

SMALL = [
    "--train-videos=100",
    "--val-videos=12",
    "--stage1-steps=6",
    "--stage2-steps=3",
    "--global-batch=16",
    "--num-workers=1",
]
PATIENCE_S = 600

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


class Quickstart:
    """A quickstart in a process of its own, and everything it starts."""

    def __init__(self, output: Path, *flags: str, log: Path) -> None:
        self.log = log
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        with log.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.quickstart", f"--output={output}", *flags],
                cwd=PROJECT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                start_new_session=True,
            )

    def wait_for(self, *texts: str) -> None:
        def end_of_log() -> str:
            return self.log.read_text()[-3000:]

        def have_come() -> bool:
            assert self.process.poll() is None, end_of_log()
            return all(text in self.log.read_text() for text in texts)

        wait_until(have_come, PATIENCE_S, told=end_of_log)

    def kill(self) -> None:
        """kill -9 of the driver and of everything it started."""
        family = [self.process.pid]
        family += [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]
        for pid in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended with its parent
        self.process.wait()

    def result(self) -> tuple[int, str, str]:
        out, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out, self.log.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def finished(folder: Path, head: Cluster) -> tuple[Path, dict, str]:
    """A quickstart that was killed while it trained, and went on as a job on another cluster."""
    output = folder / "out"
    struck = Quickstart(output, *SMALL, log=folder / "struck.log")
    struck.wait_for("pretrain_stage1_tiny: ", "steps (")
    struck.kill()
    code, log = head.submit(sys.executable, "-m", "jobs.quickstart", f"--output={output}", *SMALL)
    assert code == 0, log[-3000:]
    lines = [line for line in log.splitlines() if line.startswith('{"')]
    assert len(lines) == 1, log[-3000:]
    return output, json.loads(lines[0]), log


def test_a_killed_quickstart_goes_on_as_a_ray_job_and_ends_with_its_json_line(
    finished: tuple[Path, dict, str],
) -> None:
    output, summary, log = finished
    # The cluster that runs the job is the one it was submitted to.
    assert "starting a local Ray" not in log
    for name in ("t2v/R1", "t2v/R5", "t2v/R10", "v2t/R1", "untrained/t2v/R1"):
        assert 0 <= summary[name] <= 100, name
    assert summary["clips_ingested"] + summary["clips_quarantined"] == 112
    assert summary["clips_quarantined"] == 1
    assert summary["seconds"] > 0
    assert "text to video" in log
    assert f"mlflow ui --backend-store-uri sqlite:///{output}/mlflow.db" in log


def test_a_failing_job_is_one_sentence_and_a_failed_job(head: Cluster, folder: Path) -> None:
    code, log = head.submit(
        sys.executable, "-m", "jobs.ingest",
        "--manifest=/nowhere/m.parquet", f"--output={folder / 'clips'}",
    )  # fmt: skip
    assert code == 1
    assert "error: manifest /nowhere/m.parquet does not exist" in log


def test_everything_is_in_mlflow(finished: tuple[Path, dict, str]) -> None:
    output, summary, _ = finished
    client = MlflowClient(tracking_uri=f"sqlite:///{output}/mlflow.db")
    experiment = client.get_experiment_by_name("quickstart")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {
        "quickstart",
        "ingest train",
        "ingest val",
        "pretrain_stage1_tiny",
        "pretrain_stage2_tiny",
        "evaluate untrained",
        "evaluate trained",
    }
    parent = runs.pop("quickstart")
    assert all(run.info.status == "FINISHED" for run in (parent, *runs.values()))
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in runs.values())
    assert parent.data.metrics["t2v/R10"] == summary["t2v/R10"]
    assert parent.data.params["stage1_steps"] == "6"
    stage1 = runs["pretrain_stage1_tiny"]
    curve = client.get_metric_history(stage1.info.run_id, "loss/total")
    assert [point.step for point in curve] == [1, 2, 3, 4, 5, 6]
    assert Path(stage1.data.tags["checkpoint_uri"], "COMPLETE").exists()
    models = client.search_logged_models([experiment.experiment_id])
    expected = set()
    for stage, folder in (("pretrain_stage1_tiny", "stage1"), ("pretrain_stage2_tiny", "stage2")):
        result = json.loads((output / folder / "result.json").read_text())
        # A last checkpoint that is also the best has one entry.
        is_best = result["best"]["step"] == result["step"]
        expected |= {stage} if is_best else {stage, f"{stage}_best"}
    assert {model.name for model in models} == expected
    pictures = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert "retrieval.png" in pictures


def test_the_readme_example_runs_on_a_quickstart(finished: tuple[Path, dict, str]) -> None:
    output, _, _ = finished
    readme = (PROJECT / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", example.replace("quickstart-output", str(output))],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [float(line.split()[0]) for line in lines[:3]] == sorted(
        (float(line.split()[0]) for line in lines[:3]), reverse=True
    )
    assert lines[3].startswith("in its own words: ")


def test_a_second_run_reuses_everything(finished: tuple[Path, dict, str], folder: Path) -> None:
    output, summary, _ = finished
    started = time.monotonic()
    code, out, err = Quickstart(output, *SMALL, log=folder / "second.log").result()
    assert time.monotonic() - started < 60
    assert code == 0
    assert "starting a local Ray" not in err
    again = json.loads(out)
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in summary.items() if k != "seconds"
    }


@pytest.mark.soak
def test_other_models_are_compared_on_a_finished_quickstart(
    finished: tuple[Path, dict, str], folder: Path
) -> None:
    output, _, _ = finished
    flags = (*SMALL, "--side-by-side")
    code, out, err = Quickstart(output, *flags, log=folder / "models.log").result()
    assert code == 0, err[-3000:]
    summary = json.loads(out)
    for name in ("stgt/order/accuracy", "alpro/sim/t2v/R1", "clip/sim/order/accuracy"):
        assert 0 <= summary[name] <= 100
    assert "clip/order/accuracy" not in summary  # it does not match pairs
    assert re.search(r"CLIP, frames averaged +[0-9.]+% +- +[0-9.]+% +-", err)
    assert "reversed_alpro vs. reversed_stgt" in (output / "comparison/compare.html").read_text()
    again, out, err = Quickstart(output, *flags, log=folder / "again.log").result()
    assert again == 0
    assert "starting a local Ray" not in err
    assert json.loads(out)["clip/sim/t2v/R1"] == summary["clip/sim/t2v/R1"]


def test_other_settings_in_the_same_folder_are_refused(
    finished: tuple[Path, dict, str], folder: Path
) -> None:
    output, _, _ = finished
    code, out, err = Quickstart(output, "--seed=7", log=folder / "other.log").result()
    assert code == 1
    assert out == ""
    assert "holds a quickstart with other settings" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_second_run_at_the_same_time_is_refused_and_an_interrupt_says_how_to_go_on(
    folder: Path,
) -> None:
    first = Quickstart(folder / "busy", *SMALL, log=folder / "first.log")
    first.wait_for("starting a local Ray")
    code, _, err = Quickstart(folder / "busy", *SMALL, log=folder / "rival.log").result()
    assert code == 1
    assert "error: another run is using" in err.splitlines()[-1]

    first.wait_for("ingest: ")
    os.kill(first.process.pid, signal.SIGINT)
    code, out, err = first.result()
    assert code == 130
    assert out == ""
    assert "error: interrupted; run the same command again to continue" in err
    assert not (folder / "busy" / "result.json").exists()


def test_fresh_does_not_empty_a_folder_of_somebody_else(folder: Path) -> None:
    mine = folder / "mine"
    (mine / "videos").mkdir(parents=True)
    (mine / "videos" / "holiday.mp4").write_text("precious")
    code, _, err = Quickstart(mine, "--fresh", log=folder / "fresh.log").result()
    assert code == 1
    assert "was not made by the quickstart" in err
    assert (mine / "videos" / "holiday.mp4").read_text() == "precious"


@pytest.mark.parametrize("output", ["/dev/null/out", "/proc/out"])
def test_an_output_that_cannot_be_written_is_one_sentence(folder: Path, output: str) -> None:
    log = folder / "unwritable.log"
    code, out, err = Quickstart(Path(output), *SMALL, log=log).result()
    assert code == 1
    assert out == ""
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
