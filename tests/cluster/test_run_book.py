"""The commands of the run book are right as far as they can be tried without a cluster."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import textwrap
from pathlib import Path

import pytest

from jobs.submit import split_arguments
from tests.helpers.data import PROJECT
from tests.helpers.manifests import CLUSTER, files_of_kind, parsed

README = CLUSTER / "README.md"
TEXT = README.read_text()
BLOCKS = [
    textwrap.dedent(block) for block in re.findall(r"^ *```\n(.*?)^ *```$", TEXT, re.M | re.S)
]


def commands() -> list[str]:
    """Every line of the run book's code that runs a job of the project."""
    lines = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if "jobs." in line or "stgt.sbatch" in line]


def job_of(line: str) -> list[str]:
    """The command of the job in a line, as words."""
    words = shlex.split(line.replace("PRICE", "1.5"))
    if words[0] == "sbatch":
        return ["python", "-m", f"jobs.{words[2]}", *words[3:]]
    words = words[words.index("python") :]
    if words[2] == "jobs.submit":
        _, job = split_arguments(words[3:])
        return ["python", "-m", f"jobs.{job[0]}", *job[1:]]
    return words


@pytest.mark.parametrize("line", commands())
def test_the_job_accepts_a_command_of_the_run_book(line: str) -> None:
    parsed(job_of(line))


def test_the_run_book_submits_in_all_ways() -> None:
    found = "\n".join(commands())
    for way in ("jobs.submit", "sbatch", "docker compose", "jobs.ingest", "jobs.estimate"):
        assert way in found
    assert "ray job submit" in TEXT


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_of_commands_is_read_by_the_shell(block: str) -> None:
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stderr}\n{block}"


def test_files_and_folders_that_are_named_exist() -> None:
    linked = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXT)
    assert len(linked) > 15
    assert all((CLUSTER / path).exists() for path in linked)
    named = set(re.findall(r"\bcluster/[\w./-]*\w", "\n".join(BLOCKS)))
    assert named
    assert all((PROJECT / path).exists() for path in named)


def test_links_inside_the_run_book_lead_to_headings() -> None:
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-")
        for line in re.findall(r"^#+ (.*)$", TEXT, re.M)
    }
    links = re.findall(r"\]\(#([\w-]+)\)", TEXT)
    assert links
    assert set(links) <= headings


def test_the_table_of_jobs_lists_every_job() -> None:
    jobs = [path.name for path in files_of_kind("RayJob", "RayCronJob")]
    table = TEXT[TEXT.index("| File | Job |") :].partition("\n\n")[0]
    listed = [Path(name).name for name in re.findall(r"`([\w./-]+\.yaml)`", table)]
    # A row of the nightly ingest names the ingest again.
    assert sorted(set(listed)) == sorted(jobs)


def test_placeholders_are_those_that_the_run_book_fills_in() -> None:
    define = next(line for block in BLOCKS for line in block.splitlines() if "fill_in()" in line)
    files = sorted((CLUSTER / "kuberay").rglob("*.yaml"))
    done = subprocess.run(
        ["bash", "-c", f'{define}\nfill_in "$@"', "bash", *map(str, files)],
        env={
            "PATH": os.environ["PATH"],
            "BUCKET": "clips",
            "ACCOUNT": "42",
            "REGISTRY": "example.org/team",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert "s3://clips/" in done.stdout
    assert "arn:aws:iam::42:role/" in done.stdout
    images = set(re.findall(r"image: (\S*stgt-\S+)", done.stdout))
    assert images == {"example.org/team/stgt-ray:0.1.0", "example.org/team/stgt-mlflow:0.1.0"}
    assert not re.findall(r"\b(?:BUCKET|ACCOUNT|REGISTRY|PROJECT)\b", done.stdout)
