"""Search learning rates and graph thresholds, by default on the clips of the quickstart."""

from jobs.entry import ClusterSize, Job, main
from jobs.settings import CommandLine
from pipelines.quickstart.store import quickstart_store
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.recipes import sweep_tiny

QUICKSTART = "quickstart-output"

JOB = Job(
    name="sweep",
    summary=(__doc__ or "").splitlines()[0],
    command_line=CommandLine(
        SweepConfig,
        __doc__ or "",
        default=sweep_tiny(
            train_store=quickstart_store(QUICKSTART, "train"),
            val_store=quickstart_store(QUICKSTART, "val"),
            vocab=f"{QUICKSTART}/vocab.txt",
            uri=f"sqlite:///{QUICKSTART}/mlflow.db",
            output="sweep-output",
        ),
    ),
    target="pipelines.sweep.run:run_sweep",
    # Without the dashboard, trials that are stopped early never release their resources. With it,
    # the release may take minutes, so the cluster has more CPUs than the trials need.
    cluster=lambda config: ClusterSize(cpus=8, dashboard=True),
)

if __name__ == "__main__":
    main(JOB)
