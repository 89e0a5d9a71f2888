"""What a stranger sees in MLflow's pages, in a real browser (Debian's chromium)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.common import provenance
from pipelines.common.config import TrackingConfig
from pipelines.common.provenance import About
from pipelines.common.recording import Recording
from pipelines.registry.config import RegisterConfig
from pipelines.registry.run import run_register
from pipelines.train.run import run_train
from pipelines.video.synthetic import dataset
from tests.helpers import browser, log_trainings
from tests.helpers.checkpoint import save_untrained
from tests.helpers.data import TinyData
from tests.helpers.mlflow_pages import MlflowPages
from tests.helpers.mlflow_servers import mlflow_server
from tests.helpers.training import tiny_train

pytestmark = pytest.mark.slow

STEPS = 20
TRIALS = (1, 2, 3)
MODEL = "retrieval"


@dataclass(frozen=True)
class Recorded:
    """What the pages are about."""

    tracking: TrackingConfig
    experiment_id: str
    runs: dict[str, str]
    """Ids of runs by their names."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """A training, a sweep of three trials, and a registered model, on a server."""
    folder = tmp_path_factory.mktemp("pages")
    with mlflow_server(folder, str(folder / "artifacts")) as uri:
        tracking = TrackingConfig(uri=uri, experiment="retrieval models")
        sweep = Recording(
            tracking,
            "sweep",
            f"{folder}/mlflow_run.json",
            {"trials": len(TRIALS)},
            meanwhile="the sweep continues",
            about=About(job="sweep", summary="Searches the seed of a training."),
        )
        sweep.deliver(lambda run: run.log_metrics({"val_best/t2v/R1": 23.0}))
        for number in (0, *TRIALS):
            parent_id = sweep.run_id if number in TRIALS else None
            with provenance.using_command(f"python -m jobs.train number_{number}"):
                assert log_trainings.train(
                    folder, number, STEPS, tracking=tracking, parent_id=parent_id, step_s=0
                )
        assert sweep.finish()
        vocab = folder / "vocab.txt"
        dataset.write_vocabulary(str(vocab))
        no_clips = TinyData(
            videos="", vocab=str(vocab), train_manifest="", train_store="", val_store=""
        )
        checkpoint = save_untrained(no_clips, folder)
        run_register(RegisterConfig(checkpoint=checkpoint, name=MODEL, tracking=tracking))
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(str(tracking.experiment))
        assert experiment is not None
        found = client.search_runs([experiment.experiment_id])
        runs = {str(run.info.run_name): run.info.run_id for run in found}
        yield Recorded(tracking, experiment.experiment_id, runs)


@pytest.fixture(scope="module")
def pages(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowPages]:
    with browser.page(tmp_path_factory.mktemp("browser")) as page:
        page.size(1600, 2000)
        yield MlflowPages(page, str(recorded.tracking.uri))


def test_the_run_table_says_where_runs_come_from(pages: MlflowPages, recorded: Recorded) -> None:
    rows = pages.runs(recorded.experiment_id, 2 + len(TRIALS), parent=recorded.runs["sweep"])
    trials = [log_trainings.name_of(number) for number in TRIALS]
    assert set(rows) == {"sweep", log_trainings.name_of(0), *trials}
    training = rows[log_trainings.name_of(0)]
    assert training["Source"] == "python -m jobs.train number_0"
    assert training["Dataset"].startswith("clips/0")
    assert training["Models"] == log_trainings.name_of(0)
    # Model training, rather than tools for language-model applications.
    assert {"Runs", "Models", "Model registry"} <= set(pages.page.text.splitlines())
    assert "Judges" not in pages.page.text


def test_a_run_describes_itself(pages: MlflowPages, recorded: Recorded) -> None:
    text = pages.overview(recorded.experiment_id, recorded.runs[log_trainings.name_of(0)])
    lines = [line.strip() for line in text.splitlines()]
    after = {heading: lines[lines.index(heading) + 1] for heading in ("Created by", "Source")}
    assert after == {"Created by": provenance.user(), "Source": "python -m jobs.train number_0"}
    assert "Trains nothing, as number 0 of several trainings of a test." in lines
    assert "No description" not in text
    assert "Data, training: clip store s3://bucket/clips/0, 1,000 clips" in text
    assert any(line.startswith("clips/0 (") for line in lines[lines.index("Datasets") :])


def test_the_curves_of_a_training_are_drawn_and_come_first(
    pages: MlflowPages, recorded: Recorded
) -> None:
    charts = pages.charts(recorded.experiment_id, recorded.runs[log_trainings.name_of(0)], 5)
    assert set(charts) == {"loss", "loss/itc", "lr", "time/step_s", "val/t2v/R1"}
    assert all(points > 1 for points in charts.values())
    assert next(iter(charts)).startswith("loss")


def test_trials_of_a_sweep_are_compared(pages: MlflowPages, recorded: Recorded) -> None:
    ids = [recorded.runs[log_trainings.name_of(number)] for number in TRIALS]
    text = pages.comparison(recorded.experiment_id, ids)
    for number, run_id in zip(TRIALS, ids, strict=True):
        assert run_id in text
        assert log_trainings.name_of(number) in text
        assert f"{STEPS + number}" in text.splitlines()  # the R@1 of the trial
    assert "seed\t1\t2\t3" in text


def test_a_registered_model_has_a_card_and_an_alias(pages: MlflowPages) -> None:
    pages.model(MODEL)
    pages.page.wait_for_text("Version 1", "@ challenger", "Video-text retrieval models.")
    pages.model(MODEL, "1")
    pages.page.wait_for_text("@ challenger", "Not evaluated at registration.", "Outputs (5)")
    card = pages.page.text
    for heading in ("Metrics", "Data", "Lineage", "Use"):
        assert heading in card.splitlines()
    assert "Inputs (4)" in card


@pytest.mark.soak
def test_a_real_training_shows_its_losses_first(
    pages: MlflowPages, recorded: Recorded, tiny_data: TinyData, tmp_path: Path
) -> None:
    done = run_train(tiny_train(tiny_data, tmp_path / "run", tracking=recorded.tracking))
    assert done["run_id"] is not None
    charts = pages.charts(recorded.experiment_id, done["run_id"], 4)
    assert [name.partition("/")[0] for name in charts][:3] == ["loss"] * 3
    text = pages.overview(recorded.experiment_id, done["run_id"])
    assert "No description" not in text
    assert "train/" in text.partition("Datasets")[2]
    assert done["checkpoint"] in text
