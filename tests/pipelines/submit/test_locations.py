"""Paths of a job that mean something else on a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.command_line import read_command_line
from jobs.compare import JOB as COMPARE
from jobs.entry import Job
from jobs.evaluate import JOB as EVALUATE
from jobs.sweep import JOB as SWEEP
from jobs.train import JOB as TRAIN
from pipelines.submit.locations import PathError, absolute_form, local_paths, refuse_relative


def config_of(job: Job, *arguments: str) -> object:
    return read_command_line(job.name, job.command_line, arguments)[0]


def test_relative_paths_are_refused_with_their_absolute_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(
        TRAIN, "pretrain_stage1_tiny", "--data", "clips", "s3://bucket/more", "--output", "runs/a",
        "--tracking.uri", "sqlite:///m.db?timeout=5",
    )  # fmt: skip
    with pytest.raises(PathError) as refused:
        refuse_relative(config)
    text = str(refused.value)
    assert f"--data {tmp_path}/clips instead of clips" in text
    assert f"--output {tmp_path}/runs/a instead of runs/a" in text
    assert f"--tracking.uri sqlite:///{tmp_path}/m.db?timeout=5 instead of" in text
    assert "s3://bucket/more instead" not in text


def test_settings_of_nested_configs_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(
        SWEEP,
        "pretrain_stage1_tiny",
        "--data",
        "/clips",
        "--val-store",
        "~/val",
        "--output",
        "/out",
    )
    with pytest.raises(PathError) as refused:
        refuse_relative(config)
    assert f"{Path.home()}/val instead of ~/val" in str(refused.value)
    assert "/clips" not in str(refused.value)


def test_names_are_no_paths_unless_they_exist_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ("--data", "/clips", "--output", "/out", "--vocab", "google-bert/bert-base-uncased")
    refuse_relative(config_of(TRAIN, "pretrain_stage1_tiny", *settings))
    refuse_relative(config_of(COMPARE, "0123456789abcdef0123456789abcdef", "/other"))
    (tmp_path / "google-bert" / "bert-base-uncased").mkdir(parents=True)
    with pytest.raises(PathError, match="--vocab .*/google-bert/bert-base-uncased instead"):
        refuse_relative(config_of(TRAIN, "pretrain_stage1_tiny", *settings))


@pytest.mark.parametrize(
    "value", ["/a/b", "s3://bucket/x", "http://host:5000", "file:/a", "sqlite:////a/m.db"]
)
def test_absolute_locations_stay(value: str) -> None:
    assert absolute_form(value) is None


def test_paths_that_nodes_must_see_are_found() -> None:
    config = config_of(
        EVALUATE, "any", "--data", "/clips", "--checkpoint", "s3://bucket/model",
        "--output", "/out", "--tracking.uri", "sqlite:////m.db",
    )  # fmt: skip
    assert dict(local_paths(config)) == {
        "data": "/clips",
        "output": "/out",
        "tracking.uri": "sqlite:////m.db",
    }
