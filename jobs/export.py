"""Write videos as webdataset tars, or a clip store as a data set and back."""

from jobs.entry import ClusterSize, Job, main
from jobs.settings import CommandLine
from pipelines.export.config import ExportConfig

JOB = Job(
    name="export",
    summary=(__doc__ or "").splitlines()[0],
    command_line=CommandLine(ExportConfig, __doc__ or ""),
    target="pipelines.export.run:run_export",
    cluster=lambda config: ClusterSize(cpus=2),
)

if __name__ == "__main__":
    main(JOB)
