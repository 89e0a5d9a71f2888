"""Evaluations side by side, with paired intervals. `python -m jobs.compare --help`."""

import tyro

from jobs.entry import run_job
from pipelines.compare.config import CompareConfig

PROG = "python -m jobs.compare"


def main() -> None:
    """Run the compare job."""
    config = tyro.cli(CompareConfig, prog=PROG, description=__doc__)

    def work() -> dict:
        from pipelines.compare.run import run_compare

        return dict(run_compare(config))

    run_job(work)


if __name__ == "__main__":
    main()
