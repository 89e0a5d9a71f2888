"""Annotations -> a clip manifest. `python -m jobs.manifest --help`."""

import tyro

from jobs.entry import run_job
from pipelines.manifest.config import ManifestConfig

PROG = "python -m jobs.manifest"


def main() -> None:
    """Run the manifest job."""
    config = tyro.cli(ManifestConfig, prog=PROG, description=__doc__)

    def work() -> dict:
        from pipelines.manifest.run import run_manifest

        return dict(run_manifest(config))

    run_job(work)


if __name__ == "__main__":
    main()
