"""Submission ids, and which running job a command follows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from jobs.command_line import read_command_line
from jobs.ingest import JOB as INGEST
from jobs.train import JOB as TRAIN
from pipelines.submit.cluster_client import ClusterError
from pipelines.submit.naming import COMMAND, RUN, default_name, next_id


class Jobs:
    """A cluster's list of jobs."""

    def __init__(self, *jobs: tuple[str, str, JobStatus, str]) -> None:
        self._jobs = [
            SimpleNamespace(
                submission_id=name,
                status=status,
                entrypoint=command,
                metadata={RUN: run, COMMAND: command},
            )
            for name, run, status, command in jobs
        ]

    def list_jobs(self) -> list[Any]:
        return self._jobs


def found(*jobs: tuple[str, str, JobStatus, str]) -> tuple[str, bool]:
    client: Any = Jobs(*jobs)
    return next_id(client, "train-a", "command")


RUNNING, DONE = JobStatus.RUNNING, JobStatus.SUCCEEDED


def test_a_running_job_is_followed_whatever_else_has_a_similar_name() -> None:
    assert found() == ("train-a", False)
    assert found(("train-a", "train-a", DONE, "command")) == ("train-a-2", False)
    assert found(("train-a", "train-a", RUNNING, "command")) == ("train-a", True)
    others = [("train-a-2", "train-a-2", DONE, "other"), ("train-a-1", "train-a-1", DONE, "other")]
    assert found(*others, ("train-a", "train-a", RUNNING, "command")) == ("train-a", True)
    # A run whose own name ends in a number is another run.
    assert found(("train-a-2", "train-a-2", RUNNING, "other")) == ("train-a", False)
    again = [("train-a", "train-a", DONE, "command"), ("train-a-2", "train-a", RUNNING, "command")]
    assert found(*again) == ("train-a-2", True)


def test_other_settings_under_the_same_name_are_refused() -> None:
    with pytest.raises(ClusterError, match="train-a runs with other settings .other."):
        found(("train-a", "train-a", RUNNING, "other"))


@pytest.mark.parametrize(
    ("output", "name"),
    [("/runs/v1.5", "train-v1.5"), ("s3://bucket/runs/a b/", "train-a-b"), ("/x/train", "train")],
)
def test_a_run_is_named_after_its_output(output: str, name: str) -> None:
    line = ["pretrain_stage1_tiny", "--data", "/a", "--output", output]
    assert default_name("train", read_command_line("train", TRAIN.command_line, line)[0]) == name


def test_a_run_with_a_name_of_its_own_keeps_it() -> None:
    line = ["--manifest", "/m.parquet", "--output", "/clips", "--name", "webvid train"]
    config = read_command_line("ingest", INGEST.command_line, line)[0]
    assert default_name("ingest", config) == "ingest-webvid-train"
