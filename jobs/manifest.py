"""Build a clip manifest from annotation files."""

from jobs.entry import ClusterSize, Job, main
from jobs.settings import CommandLine
from pipelines.manifest.config import ManifestConfig

JOB = Job(
    name="manifest",
    summary=(__doc__ or "").splitlines()[0],
    command_line=CommandLine(ManifestConfig, __doc__ or ""),
    target="pipelines.manifest.run:run_manifest",
    cluster=lambda config: ClusterSize(cpus=2),
)

if __name__ == "__main__":
    main(JOB)
