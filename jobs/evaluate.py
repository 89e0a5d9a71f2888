"""Evaluate retrieval or answers to questions by the protocol of a benchmark."""

from jobs.entry import ClusterSize, Job, main
from jobs.settings import CommandLine
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.inputs import DEFAULT_WORKERS

JOB = Job(
    name="evaluate",
    summary=(__doc__ or "").splitlines()[0],
    command_line=CommandLine(EvaluateConfig, __doc__ or ""),
    target="pipelines.evaluate.tasks:evaluate_task",
    cluster=lambda config: ClusterSize(cpus=(config.num_workers or DEFAULT_WORKERS) + 1),
)

if __name__ == "__main__":
    main(JOB)
