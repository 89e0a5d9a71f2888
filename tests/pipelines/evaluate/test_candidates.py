"""How many candidates are reranked: as published by default, and as an output folder began."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import evaluate
from jobs.command_line import read_command_line
from pipelines.common import storage
from pipelines.common.config import TrackingConfig
from pipelines.common.output_folder import config_record
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.reproduction import requirements
from pipelines.evaluate.run import run_evaluate
from stgt.errors import STGTError
from tests.helpers.checkpoint import save_untrained
from tests.helpers.data import TinyData

EARLIER = 128
"""The default of earlier versions."""


def config_of(folder: Path, **changes: Any) -> EvaluateConfig:
    nothing = {name: str(folder / name) for name in ("data", "checkpoint", "output")}
    return EvaluateConfig(**{"benchmark": "msrvtt", **nothing, **changes})


def test_the_published_32_candidates_are_the_default() -> None:
    config = EvaluateConfig(data="data", checkpoint="checkpoint", output="output")
    assert config.k_rerank == 32


@pytest.mark.parametrize(("number", "met"), [(None, True), (32, True), (128, False), (256, False)])
def test_a_reproduction_needs_the_published_number(
    tmp_path: Path, number: int | None, met: bool
) -> None:
    changes = {} if number is None else {"k_rerank": number}
    found = {one.what: one.met for one in requirements(config_of(tmp_path, **changes))}
    assert found["reranking of 32 candidates; 8 frames, squashed to squares"] is met


def test_config_files_keep_their_number(tmp_path: Path) -> None:
    """A config of an earlier version reranks 128 elsewhere, too; a flag still overrides it."""
    before = config_record("evaluate", config_of(tmp_path, k_rerank=EARLIER), identity="facts")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(before))
    flags = [f"--config={path}", f"--output={tmp_path / 'elsewhere'}"]
    config, _ = read_command_line("evaluate", evaluate.JOB.command_line, flags)
    assert config.k_rerank == EARLIER
    config, _ = read_command_line("evaluate", evaluate.JOB.command_line, [*flags, "--k-rerank=32"])
    assert config.k_rerank == 32


@pytest.fixture(scope="module")
def earlier(
    tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EvaluateConfig, dict[str, Any]]:
    """An evaluation that began with the earlier default."""
    folder = tmp_path_factory.mktemp("candidates")
    config = EvaluateConfig(
        data=tiny_data.val_store,
        checkpoint=save_untrained(tiny_data, folder),
        output=str(folder / "out"),
        k_rerank=EARLIER,
        resamples=10,
        tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"),
    )
    return config, dict(run_evaluate(config))


@pytest.mark.ray
def test_an_evaluation_continues_with_the_number_that_it_began_with(
    earlier: tuple[EvaluateConfig, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    config, summary = earlier
    folder = Path(config.output)
    record = (folder / "config.json").read_bytes()
    (folder / "metrics.json").unlink()  # killed before the end
    same_command = replace(
        config, k_rerank=EvaluateConfig(data="", checkpoint="", output="").k_rerank
    )
    again = run_evaluate(same_command)
    assert again["metrics"] == summary["metrics"]
    assert again["protocol"]["reranking"].startswith("the top 128 by cosine")
    assert (folder / "config.json").read_bytes() == record
    assert json.loads(record)["k_rerank"] == EARLIER
    assert "began with 128 candidates to rerank and continues with them" in caplog.text
    with pytest.raises(STGTError, match="choose another folder"):  # a number that was asked for
        run_evaluate(replace(config, k_rerank=5))


@pytest.mark.ray
def test_a_new_folder_has_the_published_number_whatever_its_embeddings_began_with(
    earlier: tuple[EvaluateConfig, dict[str, Any]], tmp_path: Path
) -> None:
    config, _ = earlier
    changed = replace(
        config,
        output=str(tmp_path / "out"),
        embeddings=storage.join(config.output, "embeddings"),
        k_rerank=EvaluateConfig(data="", checkpoint="", output="").k_rerank,
    )
    assert run_evaluate(changed)["protocol"]["reranking"].startswith("the top 32 by cosine")
