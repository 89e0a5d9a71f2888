"""Fetch the videos of a list of URLs."""

from jobs.entry import ClusterSize, Job, main
from jobs.settings import CommandLine
from pipelines.fetch.config import FetchConfig

JOB = Job(
    name="fetch",
    summary=(__doc__ or "").splitlines()[0],
    command_line=CommandLine(FetchConfig, __doc__ or ""),
    target="pipelines.fetch.run:run_fetch",
    cluster=lambda config: ClusterSize(cpus=config.num_workers or 2),
)

if __name__ == "__main__":
    main(JOB)
