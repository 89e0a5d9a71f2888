"""The Slurm script, run with commands that stand in for Slurm's and Ray's."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.data import PROJECT, TinyData
from tests.helpers.manifests import CLUSTER, parsed
from tests.helpers.waiting import wait_until

SCRIPT = CLUSTER / "slurm" / "stgt.sbatch"
SHELL_SCRIPTS = [SCRIPT, CLUSTER / "pre_stop.sh"]

STAND_INS = {
    # Runs the command of a step on this machine, under the name of the step's node.
    "srun": """
        node = next(word.partition("=")[2] for word in sys.argv if word.startswith("--nodelist="))
        command = [word for word in sys.argv[1:]]
        while command[0].startswith("--"):
            command.pop(0)
        os.environ["STEP_NODE"] = node
        note("srun", node=node, command=command)
        if (folder / "real-ray").exists() and command[:2] == ["ray", "start"]:
            # Nodes that start at the same time on one machine choose the same names of sockets.
            sockets = pathlib.Path("/tmp/ray-4711/session_latest/sockets")
            deadline = time.monotonic() + 120
            while len(list(sockets.glob("raylet*"))) < int(node.removeprefix("node")) - 1:
                if time.monotonic() > deadline:
                    sys.exit("the node before did not start")
                time.sleep(0.1)
        os.execvp(command[0], command)
    """,
    "scontrol": """
        note("scontrol", command=sys.argv[1:])
        if sys.argv[1:3] == ["show", "hostnames"]:
            print("node1\\nnode2\\nnode3")
    """,
    "hostname": 'print("10.0.0.1 10.1.0.1")',
    "ray": """
        if sys.argv[1] == "health-check":
            sys.exit(0 if (folder / "head-is-up").exists() else 1)
        if (folder / f"ray-fails-on-{os.environ['STEP_NODE']}").exists():
            sys.exit("no space left")
        if (folder / f"ray-is-late-on-{os.environ['STEP_NODE']}").exists():
            time.sleep(60)
        token = pathlib.Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        note("ray", node=os.environ["STEP_NODE"], command=sys.argv[1:], token=token.read_text(),
             mode=oct(token.stat().st_mode)[-3:], auth=os.environ["RAY_AUTH_MODE"])
        def end(number, frame):
            note("ray ended", node=os.environ["STEP_NODE"])
            sys.exit(0)
        signal.signal(signal.SIGTERM, end)
        if "--head" in sys.argv:
            (folder / "head-is-up").touch()
        time.sleep(60)
    """,
    "python": """
        if sys.argv[1] == "-c":
            exec(sys.argv[2])
        elif sys.argv[1] == "-":
            sys.stdin.read()
            deadline = time.monotonic() + 30
            # Not those of srun, which name the command that it starts.
            while (folder / "notes").read_text().count('"what": "ray"') < int(sys.argv[3]):
                if time.monotonic() > deadline:
                    sys.exit("nodes are missing")
                time.sleep(0.05)
            note("waited for nodes", command=sys.argv[2:])
        else:
            def end(number, frame):
                note("driver asked to stop")
                time.sleep(1)
                sys.exit(143)
            signal.signal(signal.SIGTERM, end)
            note("driver", command=sys.argv[1:], address=os.environ["RAY_ADDRESS"])
            if (folder / "driver-works").exists():
                time.sleep(60)
            sys.exit(7)
    """,
}

FRAME = """#!{python}
import json, os, pathlib, signal, sys, time
folder = pathlib.Path({folder!r})
def note(what, **details):
    with (folder / "notes").open("a") as file:
        file.write(json.dumps(dict(what=what, **details)) + "\\n")
{body}
"""


@dataclass
class Allocation:
    """A folder with the stand-ins, in which the script runs."""

    folder: Path

    def notes(self, what: str) -> list[dict]:
        """What a stand-in noted, in order."""
        path = self.folder / "notes"
        lines = path.read_text().splitlines() if path.exists() else []
        return [note for line in lines if (note := json.loads(line))["what"] == what]

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Start the script as Slurm does."""
        binaries = self.folder / "venv" / "bin"
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env={
                "PATH": f"{binaries}:{os.environ['PATH']}",
                "HOME": str(self.folder / "home"),
                "STGT_VENV": str(self.folder / "venv"),
                "SLURM_SUBMIT_DIR": str(self.folder),
                "SLURM_JOB_ID": "4711",
                "SLURM_JOB_NODELIST": "node[1-3]",
                "SLURM_CPUS_PER_TASK": "44",
                "SLURM_GPUS_ON_NODE": "8",
                **variables,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def nothing_is_left(self) -> bool:
        """Whether all of Ray has ended and the token is gone."""
        started, ended = self.notes("ray"), self.notes("ray ended")
        return len(started) == len(ended) and not any((self.folder / "home" / ".stgt").iterdir())


@pytest.fixture
def allocation(tmp_path: Path) -> Allocation:
    binaries = tmp_path / "venv" / "bin"
    binaries.mkdir(parents=True)
    (tmp_path / "home").mkdir()
    for name, body in STAND_INS.items():
        lines = [line.removeprefix("        ") for line in body.splitlines()]
        path = binaries / name
        path.write_text(
            FRAME.format(python=sys.executable, folder=str(tmp_path), body="\n".join(lines))
        )
        path.chmod(0o755)
    return Allocation(tmp_path)


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_a_script_has_no_mistake_that_can_be_seen(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("shellcheck is not here; it comes with the extra `test`")
    done = subprocess.run(
        [str(shellcheck), "--shell=bash", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_ray_cluster_of_all_nodes_runs_the_job(allocation: Allocation) -> None:
    script = allocation.start("train", "finetune_msrvtt", "--data", "a folder", "--steps", "5")
    _, said = script.communicate(timeout=60)
    # The job's own exit code.
    assert script.returncode == 7, said
    head, *others = allocation.notes("ray")
    assert head["node"] == "node1"
    assert "--head" in head["command"]
    assert "--dashboard-host=127.0.0.1" in head["command"]
    assert sorted(one["node"] for one in others) == ["node2", "node3"]
    port = next(word for word in head["command"] if word.startswith("--port=")).partition("=")[2]
    for one in others:
        assert f"--address=10.0.0.1:{port}" in one["command"]
    for one in (head, *others):
        assert {"--num-cpus=44", "--num-gpus=8", "--block"} <= set(one["command"])
        assert (one["auth"], one["mode"], one["token"]) == ("token", "600", head["token"])
    assert len(head["token"]) == 64
    assert head["token"] not in said
    assert allocation.notes("waited for nodes")[0]["command"] == [f"10.0.0.1:{port}", "3"]
    (driver,) = allocation.notes("driver")
    assert driver["address"] == f"10.0.0.1:{port}"
    expected = ["-m", "jobs.train", "finetune_msrvtt", "--data", "a folder", "--steps", "5"]
    assert driver["command"] == expected
    assert allocation.nothing_is_left()


@pytest.mark.slow
@pytest.mark.parametrize("requeue", ["0", "1"])
def test_the_end_of_the_time_limit_leaves_time_for_a_checkpoint(
    allocation: Allocation, requeue: str
) -> None:
    (allocation.folder / "driver-works").touch()
    script = allocation.start("train", "finetune_msrvtt", STGT_REQUEUE=requeue)
    wait_until(lambda: allocation.notes("driver") or script.poll() is not None)
    script.send_signal(signal.SIGTERM)
    _, said = script.communicate(timeout=60)
    assert script.returncode == 143, said
    assert len(allocation.notes("driver asked to stop")) == 1
    assert allocation.nothing_is_left()
    commands = [note["command"] for note in allocation.notes("scontrol")]
    assert (["requeue", "4711"] in commands) is (requeue == "1")


@pytest.mark.slow
@pytest.mark.soak
def test_a_real_ray_cluster_of_just_the_right_size_trains(
    allocation: Allocation, tiny_data: TinyData
) -> None:
    for name in ("ray", "python", "hostname"):
        (allocation.folder / "venv" / "bin" / name).unlink()
    (allocation.folder / "real-ray").touch()
    # 2 training workers, 3 data workers and 1 for Ray Data's scheduler tasks, on 3 nodes of 2 CPUs:
    # manifests ask for resources by the same sum.
    words = ["train", "pretrain_stage1_tiny", "--data", tiny_data.train_store, "--output", "run"]
    words += ["--vocab", tiny_data.vocab, "--steps", "4", "--checkpoint-every", "2"]
    words += ["--global-batch", "12", "--num-workers", "2", "--num-loaders", "3"]
    words += ["--tracking.uri", f"sqlite:///{allocation.folder}/mlflow.db"]
    assert parsed(["python", "-m", f"jobs.{words[0]}", *words[1:]])[1].num_cpus() == 3 * 2
    script = allocation.start(
        *words,
        STGT_VENV=str(Path(sys.executable).parents[1]),
        PATH=f"{allocation.folder}/venv/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        PYTHONPATH=str(PROJECT),
        SLURM_CPUS_PER_TASK="2",
        SLURM_GPUS_ON_NODE="0",
    )
    printed, said = script.communicate(timeout=500)
    assert script.returncode == 0, said
    assert json.loads(printed.splitlines()[-1])["step"] == 4
    assert not Path("/tmp/ray-4711").exists()
    assert not any((allocation.folder / "home" / ".stgt").iterdir())


@pytest.mark.slow
def test_a_head_that_does_not_start_is_reported(allocation: Allocation) -> None:
    (allocation.folder / "ray-fails-on-node1").touch()
    script = allocation.start("train", "finetune_msrvtt")
    _, said = script.communicate(timeout=60)
    assert script.returncode == 1
    assert "error: Ray's head did not start on node1" in said
    assert "no space left" in said
    assert not allocation.notes("driver")
    assert not any((allocation.folder / "home" / ".stgt").iterdir())


@pytest.mark.slow
def test_a_node_whose_ray_ends_at_once_is_named(allocation: Allocation) -> None:
    (allocation.folder / "ray-fails-on-node3").touch()
    began = time.monotonic()
    script = allocation.start("train", "finetune_msrvtt")
    _, said = script.communicate(timeout=60)
    assert script.returncode == 1
    assert "no space left" in said
    assert "error: Ray ended on node3 before all nodes had joined the Ray cluster" in said
    # It does not wait for a node that cannot join.
    assert time.monotonic() - began < 25
    assert not allocation.notes("driver")
    assert allocation.notes("ray ended")


@pytest.mark.slow
def test_it_stops_while_it_waits_for_nodes(allocation: Allocation) -> None:
    (allocation.folder / "ray-is-late-on-node3").touch()
    script = allocation.start("train", "finetune_msrvtt")
    wait_until(lambda: len(allocation.notes("ray")) == 2 or script.poll() is not None)
    began = time.monotonic()
    script.send_signal(signal.SIGTERM)
    _, said = script.communicate(timeout=60)
    assert script.returncode == 143, said
    assert time.monotonic() - began < 25
    assert not allocation.notes("driver")


def test_a_missing_job_and_a_missing_environment_are_named(allocation: Allocation) -> None:
    script = allocation.start()
    _, said = script.communicate(timeout=60)
    assert script.returncode == 2
    assert "give a job and its settings" in said
    script = allocation.start("train", STGT_VENV="/nowhere")
    _, said = script.communicate(timeout=60)
    assert script.returncode == 2
    assert "/nowhere has no Ray; set STGT_VENV" in said


def test_the_script_asks_slurm_for_what_pre_training_needs() -> None:
    text = SCRIPT.read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.M))
    example = re.search(
        r"^#   sbatch cluster/slurm/stgt.sbatch (.*?)(?=^#   sbatch|^#$)", text, re.M | re.S
    )
    assert example is not None
    words = example[1].replace("\\\n#", " ").split()
    _, config = parsed(["python", "-m", f"jobs.{words[0]}", *words[1:]])
    nodes = int(asked["nodes"])
    assert nodes * int(asked["gpus-per-node"]) == config.num_workers
    assert nodes * int(asked["cpus-per-task"]) >= config.num_cpus() + 1  # and the driver
    assert asked["signal"] == "B:TERM@180"
