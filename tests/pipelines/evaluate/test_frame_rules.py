"""Evaluations that decode videos on the fly continue under the frame rules that they began with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.common.config import TrackingConfig
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.run import run_evaluate
from stgt.errors import STGTError
from tests.helpers.checkpoint import save_untrained
from tests.helpers.data import TinyData


def without_rules(record: Path) -> None:
    """Make a record as earlier versions wrote it."""
    values = json.loads(record.read_text())
    assert values.pop("frame_rules") == 1
    record.write_text(json.dumps(values))


@pytest.mark.ray
def test_an_evaluation_of_an_earlier_version_continues_under_its_rules(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    now = EvaluateConfig(
        data=tiny_data.train_manifest,
        checkpoint=save_untrained(tiny_data, tmp_path),
        output=str(tmp_path / "out"),
        k_rerank=0,
        resamples=0,
        num_pictures=1,
        allow_missing=True,
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"),
    )
    assert now.frame_rules == 2
    output = Path(now.output)
    metrics = run_evaluate(replace(now, frame_rules=1))["metrics"]
    for record in (output / "config.json", output / "embeddings" / "config.json"):
        without_rules(record)
    for _ in range(2):  # the second time, the record names the rules
        (output / "metrics.json").unlink()
        assert run_evaluate(now)["metrics"] == metrics
        assert json.loads((output / "config.json").read_text())["frame_rules"] == 1
    with pytest.raises(STGTError, match="choose another folder"):
        run_evaluate(
            replace(now, output=str(tmp_path / "other"), embeddings=str(output / "embeddings"))
        )
