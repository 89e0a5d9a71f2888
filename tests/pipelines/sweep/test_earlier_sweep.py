"""Sweeps that earlier versions left unfinished are continued under their own settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.common import storage
from pipelines.common.config import flatten, to_dict, with_settings
from pipelines.sweep import earlier
from pipelines.sweep.journal import Journal
from pipelines.sweep.recipes import sweep_of, sweep_tiny
from pipelines.sweep.space import read_space
from pipelines.train import metrics_log, recipes

METRIC = "val/t2v/R10"


def begun(tmp_path: Path) -> Path:
    """A sweep of an earlier version: one trial finished, one stopped, one was being trained."""
    folder = tmp_path / "sweep"
    sweep = sweep_tiny("train", "val", "vocab", "sqlite:///db", str(folder))
    recorded: dict[str, Any] = {
        "job": "sweep",
        "train": json.loads(json.dumps(to_dict(sweep.train))),
        "output": str(folder),
        "name": "sweep",
        "lr": [3e-4, 1e-3],
        "similarity_threshold": [0.5, 0.95],
        "metric": METRIC,
        "max_concurrent_trials": 1,
        "grace_steps": 4,
        "reduction_factor": 2,
    }
    recorded["train"]["name"] = "pretrain_stage1_tiny"
    storage.write_json(str(folder / "config.json"), recorded)
    settings = [(3e-4, 0.5), (1e-3, 0.5), (3e-4, 0.95)]
    trials = []
    for number, (lr, threshold) in enumerate(settings):
        trial = folder / "trials" / f"trial_{number:05d}"
        train = replace(
            sweep.train,
            optim=replace(sweep.train.optim, lr=lr),
            model=replace(
                sweep.train.model,
                graph=replace(sweep.train.model.graph, similarity_threshold=threshold),
            ),
        )
        storage.write_json(str(trial / "config.json"), {"job": "train", **to_dict(train)})
        metrics_log.write(str(trial), [{"step": 4, "time_ms": 0, "metrics": {METRIC: 10.0}}])
        status = "RUNNING" if number == 2 else "TERMINATED"
        trials.append([json.dumps({"trial_id": f"1a2b3_{number:05d}", "status": status}), "{}"])
    result = {"checkpoint": "c", "step": 12, "best": None, "metrics": {METRIC: 10.0}}
    storage.write_json(str(folder / "trials" / "trial_00000" / "result.json"), result)
    state = folder / "ray_tune" / "experiment_state-2026-01-01_00-00-00.json"
    storage.write_json(str(state), {"trial_data": trials})
    return folder


def test_its_trials_are_taken_over_with_their_ends(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    sweep = sweep_tiny("train", "val", "vocab", "sqlite:///db", str(folder))
    journal = Journal(str(folder))
    earlier.adopt(sweep, journal)
    again = Journal(str(folder))
    assert {one.name: tuple(one.values.values()) for one in again.trials.values()} == {
        "trial_00000": (3e-4, 0.5),
        "trial_00001": (1e-3, 0.5),
        "trial_00002": (3e-4, 0.95),
    }
    assert {name: end.status for name, end in again.ends.items()} == {"trial_00001": "stopped"}
    assert [one.name for one in again.unfinished()] == ["trial_00000", "trial_00002"]
    earlier.adopt(sweep, again)  # and only once
    assert again.trials == journal.trials


def test_its_settings_are_todays_by_other_names(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    before = earlier.translated(storage.read_json(str(folder / "config.json")))
    sweep = sweep_tiny("train", "val", "vocab", "sqlite:///db", str(folder))
    space = read_space(sweep.space, sweep.train)
    today = flatten(json.loads(json.dumps(to_dict(sweep))))
    today["space"] = [f"{name}={one}" for name, one in space.items()]
    differing = {name for name, value in before.items() if today[name] != value}
    assert differing <= {"train.recipe", "max_concurrent_trials"}
    missing = today.keys() - before.keys()
    assert missing == {"search", "trials", "scheduler", "repeats", "refit", "round_steps"}
    continued = earlier.with_earlier_rules(replace(sweep, search="random"))
    assert continued.search == "grid"
    by_metric = replace(sweep.train, select_metric="t2v/R10")
    assert earlier.with_earlier_rules(replace(sweep, train=by_metric)).train == sweep.train


@pytest.mark.parametrize(
    ("name", "changes", "before"),
    [
        ("finetune_msrvtt", {}, {"optim.warmup_steps": 200}),
        (
            "qa_msvd_stgt_tiny",
            {"questions": "questions.parquet", "answers": "answers.json"},
            {"steps": 800, "global_batch": 64, "optim.optimizer": "adamw", "optim.lr": 1e-3},
        ),
    ],
)
def test_it_keeps_the_settings_that_its_recipe_had(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    changes: dict[str, Any],
    before: dict[str, Any],
) -> None:
    caplog.set_level("INFO")
    recipe = recipes.RECIPES[name](("train",), str(tmp_path), init_from="model")
    sweep = sweep_of(name, replace(recipe, **changes))
    began = with_settings(sweep.train, before)
    record = to_dict(replace(sweep, train=began))
    record["train"]["optim"].pop("optimizer")  # versions before Muon did not record it
    storage.write_json(str(tmp_path / "config.json"), {"job": "sweep", **record})
    assert earlier.with_earlier_rules(sweep).train == began
    for setting, value in before.items():
        assert f"{setting} = {value}" in caplog.text
    asked = with_settings(sweep.train, {"optim.warmup_steps": 7})
    assert earlier.with_earlier_rules(replace(sweep, train=asked)).train.optim.warmup_steps == 7
