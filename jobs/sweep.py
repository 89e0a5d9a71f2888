"""Search learning rate and graph threshold; without flags, on the clips of the quickstart."""

import tyro

from jobs.entry import run_job, start_ray
from pipelines.quickstart.store import quickstart_store
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.recipes import sweep_tiny

PROG = "python -m jobs.sweep"


def main() -> None:
    """Run the sweep job."""
    default = sweep_tiny(
        quickstart_store("quickstart-output", "train"),
        quickstart_store("quickstart-output", "val"),
        "quickstart-output/vocab.txt",
        "sqlite:///quickstart-output/mlflow.db",
        "sweep-output",
    )
    config = tyro.cli(SweepConfig, prog=PROG, default=default, description=__doc__)

    def work() -> dict:
        from pipelines.sweep.run import run_sweep

        # Without the dashboard, trials that are stopped early keep their resources; with it they
        # may keep them for minutes, hence more CPUs than the trials need.
        start_ray(cpus=8, dashboard=True)
        return dict(run_sweep(config))

    run_job(work)


if __name__ == "__main__":
    main()
