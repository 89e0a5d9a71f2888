"""A model folder -> a file of the released form (.pth). `python -m jobs.export_weights --help`."""

import tyro

from jobs.entry import run_job
from pipelines.weights.config import ExportConfig

PROG = "python -m jobs.export_weights"


def main() -> None:
    """Run the export job."""
    config = tyro.cli(ExportConfig, prog=PROG, description=__doc__)

    def work() -> dict:
        from pipelines.weights.export import run_export

        return dict(run_export(config))

    run_job(work)


if __name__ == "__main__":
    main()
