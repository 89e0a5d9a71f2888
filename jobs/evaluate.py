"""Text-video retrieval of a checkpoint on a clip store. `python -m jobs.evaluate --help`."""

import tyro

from jobs.entry import run_job, start_ray
from pipelines.evaluate.config import EvaluateConfig
from pipelines.train.config import INDEX_CPUS

PROG = "python -m jobs.evaluate"


def main() -> None:
    """Run the evaluate job."""
    config = tyro.cli(EvaluateConfig, prog=PROG, description=__doc__)

    def work() -> dict:
        from pipelines.evaluate.run import run_evaluate

        start_ray(cpus=config.num_workers + INDEX_CPUS)
        return dict(run_evaluate(config))

    run_job(work)


if __name__ == "__main__":
    main()
