"""Compare evaluations with paired bootstrap confidence intervals."""

from jobs.entry import Job, main
from jobs.settings import CommandLine
from pipelines.compare.config import CompareConfig

JOB = Job(
    name="compare",
    summary=(__doc__ or "").splitlines()[0],
    command_line=CommandLine(CompareConfig, __doc__ or ""),
    target="pipelines.compare.run:run_compare",
)

if __name__ == "__main__":
    main(JOB)
