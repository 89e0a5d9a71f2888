"""Evaluate text-video retrieval of a checkpoint with the protocol of a benchmark."""

from jobs.entry import ClusterSize, Job, main
from jobs.settings import CommandLine
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.inputs import DEFAULT_WORKERS

JOB = Job(
    name="evaluate",
    summary=(__doc__ or "").splitlines()[0],
    command_line=CommandLine(EvaluateConfig, __doc__ or ""),
    target="pipelines.evaluate.run:run_evaluate",
    cluster=lambda config: ClusterSize(cpus=(config.num_workers or DEFAULT_WORKERS) + 1),
)

if __name__ == "__main__":
    main(JOB)
