"""Stores and checkpoints are found in the folders that contain them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.artifacts.locations import find_checkpoint, find_data
from stgt.errors import CheckpointError, ClipStoreError


def store(folder: Path) -> str:
    folder.mkdir(parents=True)
    (folder / "catalogue.json").write_text("{}")
    return str(folder)


def run(folder: Path, steps: tuple[int, ...], best: int | None = None) -> str:
    for step in steps:
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "COMPLETE").touch()
    (folder / "checkpoints" / "step-00000099").mkdir()  # not written completely
    if best is not None:
        (folder / "best.json").write_text(json.dumps({"step": best}))
    return str(folder)


def test_the_folder_above_stands_for_its_only_store(tmp_path: Path) -> None:
    one = store(tmp_path / "clips" / "1a2b")
    (tmp_path / "clips" / "done.json").write_text("{}")  # the quickstart leaves it there
    (tmp_path / "clips" / ".lock").touch()
    assert find_data(str(tmp_path / "clips")) == find_data(one) == one
    sample = store(tmp_path / "clips" / "1a2b-first-500")
    assert find_data(str(tmp_path / "clips")) == one
    assert find_data(sample) == sample
    unfinished = tmp_path / "clips" / "9f8e"
    unfinished.mkdir()
    (unfinished / "store.json").write_text("{}")
    assert find_data(str(tmp_path / "clips")) == one


def test_several_stores_are_named(tmp_path: Path) -> None:
    stores = [store(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(ClipStoreError, match="contains 2 clip stores; give one") as caught:
        find_data(str(tmp_path))
    assert all(one in str(caught.value) for one in stores)


def test_a_file_is_not_a_store(tmp_path: Path) -> None:
    path = tmp_path / "done.json"
    path.write_text("{}")
    with pytest.raises(ClipStoreError, match=r"done.json is a file, but data must be a clip store"):
        find_data(str(path))
    assert find_data("any.parquet").endswith("/any.parquet")


def test_a_run_stands_for_its_best_checkpoint(tmp_path: Path) -> None:
    folder = run(tmp_path / "best", (10, 20, 30), best=20)
    assert find_checkpoint(folder).endswith("best/checkpoints/step-00000020")
    # Without a choice, and after the best was deleted, for its last one.
    assert find_checkpoint(run(tmp_path / "last", (10, 30))).endswith("step-00000030")
    assert find_checkpoint(run(tmp_path / "gone", (10, 30), best=20)).endswith("step-00000030")
    itself = f"{folder}/checkpoints/step-00000010"
    assert find_checkpoint(itself) == itself


def test_a_run_without_a_complete_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has no complete checkpoint yet"):
        find_checkpoint(str(tmp_path))


def test_a_folder_of_very_many_files_is_not_searched(tmp_path: Path) -> None:
    store(tmp_path / "0a1b")
    for number in range(1001):
        (tmp_path / f"{number}.mp4").touch()
    assert find_data(str(tmp_path)) == str(tmp_path)
