"""Lists the jobs: `python -m jobs`."""

from __future__ import annotations

import ast
from pathlib import Path

from jobs.entry import with_quiet_pipe

NOT_JOBS = {
    "__init__",
    "__main__",
    "command_line",
    "config_file",
    "credentials",
    "entry",
    "joining",
    "settings",
    "short_help",
}


def job_names() -> list[str]:
    """Return the sorted names of all jobs."""
    return sorted(
        path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in NOT_JOBS
    )


def list_jobs() -> None:
    """Print each job with a one-line summary."""
    print(
        "usage: python -m jobs.NAME [SETTINGS]\n\n"
        "`python -m jobs.NAME --help` shows the settings of a job.\n"
    )
    for name in job_names():
        source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        summary = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
        print(f"  {name:<16}{summary}")


if __name__ == "__main__":
    with_quiet_pipe(list_jobs)
