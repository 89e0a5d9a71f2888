"""Write captions for the clips of a manifest with a model."""

from jobs.entry import ClusterSize, Job, main
from jobs.settings import CommandLine
from pipelines.caption.config import DEFAULT_WORKERS, CaptionConfig

JOB = Job(
    name="caption",
    summary=(__doc__ or "").splitlines()[0],
    command_line=CommandLine(CaptionConfig, __doc__ or ""),
    target="pipelines.caption.run:run_caption",
    cluster=lambda config: ClusterSize(cpus=(config.num_workers or DEFAULT_WORKERS) + 1),
)

if __name__ == "__main__":
    main(JOB)
