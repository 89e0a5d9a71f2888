"""Submit a job to a Ray cluster, follow its log, and return its exit code."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import typing
from collections.abc import Sequence

from jobs.__main__ import job_names
from jobs.command_line import print_and_exit, read_command_line
from jobs.entry import EXIT_USAGE, Job, Summary, run_job, set_up_process, with_quiet_pipe
from jobs.settings import CommandLine
from pipelines.submit.config import SubmitConfig
from stgt.field_marks import config_fields

EXAMPLE = (
    "python -m jobs.submit --address http://head:8265 train finetune_msrvtt --data "
    "s3://bucket/clips --init-from s3://bucket/models/stgt --output s3://bucket/runs/msrvtt"
)

JOB = Job(
    name="submit",
    summary=(__doc__ or "").splitlines()[0],
    command_line=CommandLine(
        SubmitConfig,
        f"{__doc__}\n\n{EXAMPLE}",
        default=SubmitConfig(),
        usage="[SETTINGS] JOB [SETTINGS OF THE JOB]",
    ),
    target="pipelines.submit.run:run_submit",
)
_WITH_VALUE = ("--config", "--timeline")
"""Options of every job that take a value."""


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line before the job: what follows are the job's own settings.

    Returns:
        The settings of the submission, and the job with its settings.
    """
    jobs = set(job_names())
    kinds = {f"--{field.name.replace('_', '-')}": kind for field, kind, _ in _fields()}
    position = 0
    while position < len(argv) and argv[position].startswith("-"):
        flag, given, _ = argv[position].partition("=")
        kind = kinds.get(flag.replace("_", "-"), str if flag in _WITH_VALUE else bool)
        position += 1
        if given or kind is bool:
            continue
        if typing.get_origin(kind) is tuple:
            first = position  # even if it has the name of a job
            while position < len(argv) and not argv[position].startswith("-"):
                if argv[position] in jobs and position > first:
                    break
                position += 1
        else:
            position += 1
    return list(argv[:position]), list(argv[position:])


def _fields() -> list[tuple]:
    return list(config_fields(SubmitConfig))


def _refuse_repeats(own: Sequence[str]) -> None:
    """Refuse a setting that is given twice, of which only the last would count."""
    flags = [word.partition("=")[0].replace("_", "-") for word in own if word.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1:
            print_and_exit(f"{flag} is given twice; give it once, with all values", EXIT_USAGE)


def submit(argv: Sequence[str]) -> None:
    """Check both command lines, submit the job, and exit with its exit code."""
    own, rest = split_arguments(argv)
    _refuse_repeats(own)
    config, options = read_command_line(JOB.name, JOB.command_line, own)
    if not rest:
        print_and_exit("give a job; python -m jobs lists them", EXIT_USAGE)
    name, *arguments = rest
    if name not in job_names() or name == JOB.name:
        near = difflib.get_close_matches(name, job_names(), n=3, cutoff=0.4)
        did_you_mean = f"; did you mean {' or '.join(near)}?" if near else ""
        print_and_exit(f"there is no job {name!r}{did_you_mean}", EXIT_USAGE)
    job: Job = importlib.import_module(f"jobs.{name}").JOB
    # Wrong settings are found here, before anything is uploaded.
    job_config, of_job = read_command_line(name, job.command_line, arguments)
    if options.timeline is not None:
        print_and_exit("give --timeline after the job, with a path on the cluster", EXIT_USAGE)
    if of_job.timeline is not None and not os.path.isabs(of_job.timeline):
        print_and_exit(
            f"--timeline {of_job.timeline} would be lost with the job's folder on the cluster; "
            "give an absolute path",
            EXIT_USAGE,
        )
    set_up_process(options.verbose)

    def work() -> Summary:
        result = JOB.load_target()(config, name, arguments, job_config)
        if isinstance(result, int):
            sys.exit(result)
        return result

    run_job(work)


if __name__ == "__main__":
    with_quiet_pipe(lambda: submit(sys.argv[1:]))
