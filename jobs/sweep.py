"""Search learning rate and graph threshold; without flags, on the clips of the quickstart."""

import tyro

from jobs.entry import run_job, start_ray
from pipelines.recipes import sweep_tiny
from pipelines.train_config import SweepConfig

PROG = "python -m jobs.sweep"


def main() -> None:
    """Run the sweep job."""
    default = sweep_tiny("quickstart-output", "sweep-output")
    config = tyro.cli(SweepConfig, prog=PROG, default=default, description=__doc__)

    def work() -> dict:
        from pipelines.sweep import run_sweep

        # Without the dashboard, trials that are stopped early keep their resources; with it they
        # may keep them for minutes, hence more CPUs than the trials need.
        start_ray(cpus=8, dashboard=True)
        return dict(run_sweep(config))

    run_job(work)


if __name__ == "__main__":
    main()
