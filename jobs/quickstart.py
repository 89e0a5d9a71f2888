"""Generate videos and run all stages on them: ingest, train and evaluate."""

from jobs.entry import ClusterSize, Job, main
from jobs.settings import CommandLine
from pipelines.quickstart.config import QuickstartConfig

JOB = Job(
    name="quickstart",
    summary=(__doc__ or "").splitlines()[0],
    command_line=CommandLine(QuickstartConfig, __doc__ or ""),
    target="pipelines.quickstart.run:run_quickstart",
    cluster=lambda config: ClusterSize(cpus=4),
)

if __name__ == "__main__":
    main(JOB)
