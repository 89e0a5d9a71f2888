"""Register a checkpoint as a version of a model in MLflow, and promote the better of two versions.

python -m jobs.register runs/msrvtt --name retrieval --evaluation eval/tuned --promote
"""

from jobs.entry import Job, main
from jobs.settings import CommandLine
from pipelines.registry.config import RegisterConfig

JOB = Job(
    name="register",
    summary=(__doc__ or "").splitlines()[0],
    command_line=CommandLine(RegisterConfig, __doc__ or ""),
    target="pipelines.registry.run:run_register",
)

if __name__ == "__main__":
    main(JOB)
