"""Names submissions after their runs, and finds the job that runs under a name."""

from __future__ import annotations

import re
from typing import Any

from ray.job_submission import JobSubmissionClient

from pipelines.submit.cluster_client import ClusterError, attempts

COMMAND = "command"
"""Metadata of a job: its command line."""


def default_name(job: str, job_config: Any) -> str:
    """Return a submission id for a job: its name, and that of its run.

    A run that has the name of the job or the recipe is told from others by its output folder.
    """
    run = getattr(job_config, "name", None)
    output = getattr(job_config, "output", None)
    if run in (None, job, getattr(job_config, "recipe", None)) and isinstance(output, str):
        run = output.rstrip("/").rpartition("/")[2].partition(".")[0]
    words = [word for word in (job, run) if word]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(dict.fromkeys(words))).strip("-.")


def next_id(client: JobSubmissionClient, name: str, command: str) -> tuple[str, bool]:
    """Return the id to submit under, or that of the job that runs under this name.

    Raises:
        ClusterError: A job with another command runs under this name.
    """
    known = re.compile(rf"{re.escape(name)}(?:-(\d+))?")
    last, latest = 0, None
    for one in attempts()(client.list_jobs):
        match = known.fullmatch(one.submission_id or "")
        if match and int(match.group(1) or 1) > last:
            last, latest = int(match.group(1) or 1), one
    if latest is None:
        return name, False
    if latest.status.is_terminal():
        return f"{name}-{last + 1}", False
    assert latest.submission_id is not None
    theirs = (latest.metadata or {}).get(COMMAND, latest.entrypoint)
    if theirs != command:
        raise ClusterError(
            f"the job {latest.submission_id} runs with other settings ({theirs}); wait for it, "
            f"stop it with `ray job stop {latest.submission_id}`, or choose another --name"
        )
    return latest.submission_id, True
