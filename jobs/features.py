"""Store the tokens of a frozen frame encoder for every frame of a clip store."""

from jobs.entry import ClusterSize, Job, main
from jobs.settings import CommandLine
from pipelines.feed.features.config import DEFAULT_WORKERS, FeaturesConfig

JOB = Job(
    name="features",
    summary=(__doc__ or "").splitlines()[0],
    command_line=CommandLine(FeaturesConfig, __doc__ or ""),
    target="pipelines.feed.features.run:run_features",
    cluster=lambda config: ClusterSize(cpus=(config.num_workers or DEFAULT_WORKERS) + 1),
)

if __name__ == "__main__":
    main(JOB)
