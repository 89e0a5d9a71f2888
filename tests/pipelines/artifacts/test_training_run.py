"""The run that trained a checkpoint, as its folder tells it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.artifacts.training_run import origin_of
from pipelines.common.provenance import Origin

RECORD = {"tracking_uri": "http://me:pa55@host:5000", "run_id": "ab12"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a training that is recorded."""
    (tmp_path / "checkpoints" / "step-00000006").mkdir(parents=True)
    (tmp_path / "mlflow_run.json").write_text(json.dumps(RECORD))
    return tmp_path


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_checkpoint_of_a_training_has_its_run(run: Path, slash: str) -> None:
    uri = f"{run}/checkpoints/step-00000006{slash}"
    assert origin_of(uri) == Origin(uri, "ab12", "http://host:5000")


def test_a_checkpoint_elsewhere_has_none(run: Path) -> None:
    copy = run / "copies" / "step-00000006"
    copy.mkdir(parents=True)
    assert origin_of(str(copy)) == Origin(str(copy))
    (run / "mlflow_run.json").unlink()
    uri = f"{run}/checkpoints/step-00000006"
    assert origin_of(uri) == Origin(uri)
