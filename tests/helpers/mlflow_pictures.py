"""Takes the README's pictures of MLflow's pages: `python -m tests.helpers.mlflow_pictures`.

It shows the runs of `make quickstart` and `make sweep`, which come before it, and needs Debian's
chromium. The first argument is another folder than quickstart-output.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

import PIL.Image
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.helpers import browser
from tests.helpers.data import PROJECT
from tests.helpers.mlflow_pages import MlflowPages
from tests.helpers.mlflow_servers import mlflow_server

FOLDER = PROJECT / "jobs"
CHARTS, RUNS = FOLDER / "mlflow_charts.png", FOLDER / "mlflow_runs.png"
LARGEST_BYTES = 50_000
COLORS = (64, 32, 16, 8)
TRAINING, SWEEP = "pretrain_stage1_tiny", "sweep"
PARENT = "mlflow.parentRunId"
WIDTH, CHARTS_HEIGHT, RUNS_HEIGHT = 1500, 625, 480
SIDE_BAR = 195
"""Pixels to the left of what a picture shows."""


def save(picture: bytes, path: Path) -> None:
    """Save a picture in as many colors as fit into its file."""
    with PIL.Image.open(io.BytesIO(picture)) as whole:
        for colors in COLORS:
            few = whole.convert("RGB").quantize(colors, dither=PIL.Image.Dither.NONE)
            few.save(path, optimize=True)
            if path.stat().st_size < LARGEST_BYTES:
                print(f"{path}: {few.width}x{few.height}, {path.stat().st_size} bytes")
                return
    raise SystemExit(f"{path} has more than {LARGEST_BYTES} bytes in {COLORS[-1]} colors")


def all_runs(client: MlflowClient) -> list[Run]:
    experiments = [one.experiment_id for one in client.search_experiments()]
    return list(client.search_runs(experiments, order_by=["attributes.start_time DESC"]))


def latest(runs: list[Run], name: str, command: str) -> Run:
    """The latest run of a name; without one, the command that makes it is named."""
    for run in runs:
        if run.info.run_name == name:
            return run
    raise SystemExit(f"there is no run {name}; run {command} first")


def main() -> None:
    """Take both pictures."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart-output")
    if not (folder / "mlflow.db").is_file():
        raise SystemExit(f"{folder}/mlflow.db does not exist; run make quickstart first")
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        shutil.copy(folder / "mlflow.db", copy)  # looking at it would change it
        with mlflow_server(copy, str(copy / "artifacts")) as uri, browser.page(copy) as page:
            runs = all_runs(MlflowClient(tracking_uri=uri))
            training = latest(runs, TRAINING, "make quickstart")
            sweep = latest(runs, SWEEP, "make sweep")
            pages = MlflowPages(page, uri)
            page.size(WIDTH, CHARTS_HEIGHT)
            pages.overview(training.info.experiment_id, training.info.run_id)
            pages.close_assistant()
            pages.charts(training.info.experiment_id, training.info.run_id, 3)
            page.wait_until_still()
            save(page.picture((SIDE_BAR, 0, WIDTH - SIDE_BAR, CHARTS_HEIGHT)), CHARTS)
            page.size(WIDTH, RUNS_HEIGHT)
            rows = [
                run
                for run in runs
                if run.info.experiment_id == sweep.info.experiment_id
                and run.data.tags.get(PARENT) in (None, sweep.info.run_id)
            ]
            pages.runs(sweep.info.experiment_id, len(rows), sweep.info.run_id)
            page.wait_until_still()
            save(page.picture((SIDE_BAR, 0, WIDTH - SIDE_BAR, RUNS_HEIGHT)), RUNS)


if __name__ == "__main__":
    main()
