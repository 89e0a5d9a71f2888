"""Released weights (.pth) -> a model folder. `python -m jobs.import_weights --help`."""

import tyro

from jobs.entry import run_job
from pipelines.weights.config import ImportConfig

PROG = "python -m jobs.import_weights"


def main() -> None:
    """Run the import job."""
    config = tyro.cli(ImportConfig, prog=PROG, description=__doc__)

    def work() -> dict:
        from pipelines.weights.run import run_import

        return dict(run_import(config))

    run_job(work)


if __name__ == "__main__":
    main()
