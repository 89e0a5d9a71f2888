"""Decode the clips of a manifest into a clip store."""

from jobs.entry import ClusterSize, Job, main
from jobs.settings import CommandLine
from pipelines.ingest.config import IngestConfig

JOB = Job(
    name="ingest",
    summary=(__doc__ or "").splitlines()[0],
    command_line=CommandLine(IngestConfig, __doc__ or ""),
    target="pipelines.ingest.run:run_ingest",
    cluster=lambda config: ClusterSize(cpus=2),
)

if __name__ == "__main__":
    main(JOB)
