"""Runs that decode videos on the fly continue under the frame rules that they began with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.artifacts.checkpoints import COMPLETE
from pipelines.common import storage
from pipelines.common.output_folder import CONFIG, config_record
from pipelines.train import run_folder
from pipelines.train.config import TrainConfig
from stgt.config import ModelConfig


@pytest.mark.parametrize("recorded", [None, 1, 2])
def test_a_run_that_began_without_frame_rules_continues_with_the_first_again_and_again(
    recorded: int | None, tmp_path: Path
) -> None:
    config = TrainConfig(data=("a.parquet",), output=str(tmp_path), model=ModelConfig())
    assert config.loader.frame_rules == 2
    record = config_record("train", config)
    if recorded is None:
        del record["frame_rules"]
    else:
        record["frame_rules"] = recorded
    storage.write_json(storage.join(config.output, CONFIG), record)
    assert run_folder.with_earlier_rules(config) == config, "no checkpoint, so nothing has begun"
    step = run_folder.checkpoint_uri(config.output, 1)
    storage.write_bytes(storage.join(step, COMPLETE), b"")
    expected = config if recorded == 2 else replace(config, frame_rules=1)
    assert run_folder.with_earlier_rules(config) == expected
    assert expected.loader.frame_rules == expected.frame_rules
