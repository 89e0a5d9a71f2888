"""Whose folder it is, and what --fresh deletes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.common import storage
from pipelines.quickstart import folder as folder_module
from pipelines.quickstart.config import QuickstartConfig
from pipelines.quickstart.stages import Stages
from pipelines.train import recipes
from stgt.config import LossWeights
from stgt.errors import STGTError


def finished(folder: Path, **changes: Any) -> None:
    """A folder as a finished quickstart leaves it."""
    with storage.lock(str(folder)):
        folder_module.claim(QuickstartConfig(output=str(folder), **changes), str(folder))
    for name in folder_module.MADE:
        if "." in name:
            (folder / name).touch(exist_ok=True)
        else:
            (folder / name).mkdir()
            (folder / name / "part").write_text("x")


NEW = ("optimizer", "learning_rate", "similar_captions", "matching_weight", "init_rules")
"""Settings that earlier versions did not have."""
BEFORE: dict[str, Any] = {
    "optimizer": "adamw",
    "learning_rate": None,
    "similar_captions": None,
    "matching_weight": 1.0,
    "init_rules": 2,
}


def forget(folder: Path, *names: str) -> None:
    """Write the claim as a version did that did not have these settings."""
    claim = str(folder / folder_module.CLAIM)
    record = storage.read_json(claim)
    for name in names:
        assert record.pop(name)
    storage.write_json(claim, record)


def test_fresh_in_a_new_folder_just_begins(tmp_path: Path) -> None:
    with storage.lock(str(tmp_path)):
        folder_module.claim(QuickstartConfig(output=str(tmp_path), fresh=True), str(tmp_path))
    assert storage.list_names(str(tmp_path)) == [".lock", "config.json", folder_module.CLAIM]


def test_fresh_deletes_all_and_nothing_else(tmp_path: Path) -> None:
    finished(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / f".clips.1234{storage.GONE}").mkdir()
    folder_module.claim(QuickstartConfig(output=str(tmp_path), fresh=True, seed=7), str(tmp_path))
    assert storage.list_names(str(tmp_path)) == [
        ".lock",
        "config.json",
        "notes.txt",
        folder_module.CLAIM,
    ]
    assert storage.read_json(str(tmp_path / folder_module.CLAIM))["seed"] == 7


@pytest.mark.parametrize("deletions", range(len(folder_module.MADE)))
def test_fresh_that_was_killed_leaves_no_result_of_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deletions: int
) -> None:
    finished(tmp_path)
    done: list[str] = []
    remove = storage.remove

    def removes_until_killed(uri: str) -> None:
        if len(done) == deletions:
            raise KeyboardInterrupt
        done.append(uri)
        remove(uri)

    monkeypatch.setattr(storage, "remove", removes_until_killed)
    with pytest.raises(KeyboardInterrupt):
        folder_module.claim(QuickstartConfig(output=str(tmp_path), fresh=True), str(tmp_path))
    with pytest.raises(STGTError, match="holds a quickstart with other settings"):
        folder_module.claim(QuickstartConfig(output=str(tmp_path), seed=7), str(tmp_path))
    assert deletions == 0 or not (tmp_path / folder_module.RESULT).exists()


def test_a_folder_of_somebody_else_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(STGTError, match="was not made by the quickstart"):
        folder_module.claim(QuickstartConfig(output=str(tmp_path), fresh=True), str(tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_quickstart_of_an_earlier_version_goes_on_with_its_sizes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finished(tmp_path, train_videos=1596, stage1_steps=450, stage2_steps=80)
    forget(tmp_path, *NEW)
    folder = str(tmp_path)
    with caplog.at_level("INFO"):
        continued = folder_module.with_earlier_settings(QuickstartConfig(output=folder), folder)
    assert (continued.stage1_steps, continued.stage2_steps) == (450, 80)
    assert continued.train_videos == 1596
    assert continued.optimizer == "adamw"
    assert (
        "was begun with other settings than today's defaults and continues with them: "
        "init_rules = 2, learning_rate = None, matching_weight = 1.0, optimizer = adamw, "
        "similar_captions = None, stage1_steps = 450, "
        "stage2_steps = 80, "
        "train_videos = 1596; add --fresh"
    ) in caplog.text
    folder_module.claim(continued, folder)
    asked = folder_module.with_earlier_settings(
        QuickstartConfig(output=folder, stage1_steps=900), folder
    )
    assert asked == QuickstartConfig(output=folder, stage1_steps=900, **BEFORE)
    with pytest.raises(
        STGTError, match=r"other settings \(stage1_steps, stage2_steps, train_videos\)"
    ):
        folder_module.claim(asked, folder)
    fresh = QuickstartConfig(output=folder, fresh=True)
    assert folder_module.with_earlier_settings(fresh, folder) == fresh


def test_a_quickstart_of_an_earlier_version_goes_on_with_its_training(tmp_path: Path) -> None:
    """A change in the middle would be refused by the training."""
    finished(tmp_path)
    forget(tmp_path, *NEW)
    folder = str(tmp_path)
    for _ in range(2):  # the record of the first continuation names it
        continued = folder_module.with_earlier_settings(QuickstartConfig(output=folder), folder)
        assert continued == QuickstartConfig(output=folder, **BEFORE)
        folder_module.claim(continued, folder)
    finished(tmp_path / "new")
    today = QuickstartConfig(output=str(tmp_path / "new"))
    assert folder_module.with_earlier_settings(today, today.output) == today


def test_a_quickstart_with_muon_of_an_earlier_version_keeps_its_learning_rate(
    tmp_path: Path,
) -> None:
    finished(tmp_path)
    forget(tmp_path, "learning_rate")
    folder = str(tmp_path)
    today = QuickstartConfig(output=folder)
    continued = folder_module.with_earlier_settings(today, folder)
    assert continued == replace(today, learning_rate=None)
    folder_module.claim(continued, folder)
    recipe = recipes.pretrain_stage1_tiny(("clips",), "run")
    for config, rate in ((continued, 0.003), (today, 0.0012)):
        stages = Stages(config, folder, lambda _: None)
        optim = stages.from_scratch(recipe).optim
        assert (optim.optimizer, optim.lr) == ("muon", rate)


@pytest.mark.parametrize("asked", [{}, {"stage2_steps": 80, "train_videos": 500}])
def test_a_quickstart_of_1500_steps_of_an_earlier_version_goes_on_with_them(
    tmp_path: Path, asked: dict[str, int]
) -> None:
    finished(tmp_path, stage1_steps=1500, **asked)
    forget(tmp_path, "matching_weight")
    folder = str(tmp_path)
    today = QuickstartConfig(output=folder, **asked)  # type: ignore[arg-type]
    for _ in range(2):  # the record of the first continuation names all settings
        continued = folder_module.with_earlier_settings(today, folder)
        assert continued == replace(today, stage1_steps=1500, matching_weight=1.0)
        folder_module.claim(continued, folder)
    recipe = recipes.pretrain_stage1_tiny(("clips",), "run")
    for config, weight in ((continued, 1.0), (today, 8.0)):
        found = Stages(config, folder, lambda _: None).from_scratch(recipe)
        assert found.loss_weights == LossWeights(matching=weight)


def test_groups_of_similar_captions_fit_a_small_batch(tmp_path: Path) -> None:
    config = QuickstartConfig(output=str(tmp_path), global_batch=4)
    recipe = recipes.pretrain_stage1_tiny(("clips",), "run")
    for batch in (4, 32):
        stages = Stages(replace(config, global_batch=batch), str(tmp_path), lambda _: None)
        found = stages.from_scratch(replace(recipe, global_batch=batch))
        assert found.similar_captions == min(batch, 8)


def test_the_steps_of_another_quickstart_are_those_that_were_asked_for(tmp_path: Path) -> None:
    finished(tmp_path, stage1_steps=20, stage2_steps=0)
    config = QuickstartConfig(output=str(tmp_path))
    assert folder_module.with_earlier_settings(config, str(tmp_path)) == config


@pytest.mark.parametrize(
    "settings",
    [
        {"num_workers": 0},
        {"global_batch": 1},
        {"global_batch": 7},
        {"stage1_steps": 0},
        {"stage2_steps": -1},
        {"learning_rate": -1.0},
        {"learning_rate": 1e-6},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"matching_weight": 0.0},
        {"matching_weight": float("nan")},
    ],
)
def test_sizes_that_cannot_work_are_refused_before_anything_is_made(settings: dict) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        QuickstartConfig(**settings)
