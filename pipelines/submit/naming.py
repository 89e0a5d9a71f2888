"""Names submissions after their runs, and finds the job that runs under a name."""

from __future__ import annotations

import re
from typing import Any

from ray.job_submission import JobSubmissionClient

from pipelines.submit.cluster_client import ClusterError, attempts

COMMAND, RUN = "command", "run"
"""Metadata of a job: its command line, and the name that its submissions are counted under."""
TABLE = ".parquet"


def default_name(job: str, job_config: Any) -> str:
    """Return a submission id for a job: its name, and that of its run.

    A run that has the name of the job or the recipe is told from others by its output folder.
    """
    run = getattr(job_config, "name", None)
    output = getattr(job_config, "output", None)
    if run in (None, job, getattr(job_config, "recipe", None)) and isinstance(output, str):
        run = output.rstrip("/").rpartition("/")[2].removesuffix(TABLE)
    words = [word for word in (job, run) if word]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(dict.fromkeys(words))).strip("-.")


def next_id(client: JobSubmissionClient, name: str, command: str) -> tuple[str, bool]:
    """Return the id to submit under, or that of the job that runs under this name.

    Raises:
        ClusterError: A job with another command runs under this name.
    """
    jobs = attempts()(client.list_jobs)
    of_run = [one for one in jobs if (one.metadata or {}).get(RUN) == name]
    running = [one for one in of_run if not one.status.is_terminal()]
    for one in running:
        if (one.metadata or {}).get(COMMAND) == command:
            return str(one.submission_id), True
    if running:
        other = running[0]
        raise ClusterError(
            f"the job {other.submission_id} runs with other settings ({other.entrypoint}); wait "
            f"for it, stop it with `ray job stop {other.submission_id}`, or choose another --name"
        )
    taken = {one.submission_id for one in jobs}
    number = 1
    while (found := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return found, False
