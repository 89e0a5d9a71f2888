"""A manifest -> a clip store. `python -m jobs.ingest --help`."""

import tyro

from jobs.entry import run_job, start_ray
from pipelines.ingest.config import IngestConfig

PROG = "python -m jobs.ingest"


def main() -> None:
    """Run the ingest job."""
    config = tyro.cli(IngestConfig, prog=PROG, description=__doc__)

    def work() -> dict:
        from pipelines.ingest.run import run_ingest

        start_ray(cpus=2)
        return dict(run_ingest(config))

    run_job(work)


if __name__ == "__main__":
    main()
