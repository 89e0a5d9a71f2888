"""The whole way on generated videos: write, ingest, train, evaluate."""

import tyro

from jobs.entry import run_job, start_ray
from pipelines.quickstart.config import QuickstartConfig

PROG = "python -m jobs.quickstart"


def main() -> None:
    """Run the quickstart."""
    config = tyro.cli(QuickstartConfig, prog=PROG, description=__doc__)

    def work() -> dict[str, float]:
        from pipelines.quickstart.run import run_quickstart

        return run_quickstart(config, start_ray)

    run_job(work)


if __name__ == "__main__":
    main()
