"""Continues sweeps of earlier versions, under the rules they began with.

Earlier versions searched learning rates and graph thresholds only, and kept no record of trials
besides Ray Tune's state.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipelines.common import storage
from pipelines.common.config import flatten, to_dict
from pipelines.common.output_folder import CONFIG, JOB, settings_of
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.journal import PREFIX, TRIALS, TUNE_STATE, Journal
from pipelines.train import run_folder
from pipelines.train.recipes import with_earlier_settings
from stgt.field_marks import with_earlier_values

logger = logging.getLogger(__name__)

SEARCHED = {"lr": "optim.lr", "similarity_threshold": "model.graph.similarity_threshold"}
"""Settings that earlier versions searched, and their dotted names in the training config."""
MOVED = {"output": "train.output", "name": "train.name"}


def is_earlier(values: Mapping[str, Any]) -> bool:
    """Return whether settings are those of an earlier version."""
    return "space" not in values and all(name in values for name in SEARCHED)


def translated(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a record of any version by today's dotted names."""
    settings = settings_of(dict(record))
    if not is_earlier(settings):
        return settings
    for earlier, name in MOVED.items():
        if earlier in settings:
            settings[name] = settings.pop(earlier)
    settings["space"] = [
        f"{name}=grid({', '.join(map(str, settings.pop(earlier)))})"
        for earlier, name in SEARCHED.items()
    ]
    return settings


def with_earlier_rules(config: SweepConfig) -> SweepConfig:
    """Return the config under the rules that the sweep in its output folder began with."""
    uri = storage.join(config.output, CONFIG)
    if not storage.exists(uri):
        return config
    found = storage.read_json(uri)
    if found.get(JOB, "sweep") != "sweep":
        return config  # another job's folder, which is refused
    record = translated(found)
    config = with_earlier_values(config, record)
    # Earlier versions chose the best checkpoint of a trial by the metric of its recipe.
    train = replace(config.train, select_metric=record["train.select_metric"])
    kept = with_earlier_settings(train, record, "train.")
    if kept != train:
        settings = flatten(to_dict(kept))
        changed = [
            name for name, value in flatten(to_dict(train)).items() if settings[name] != value
        ]
        logger.info(
            "%s was begun when its recipe had other settings, and continues with them: %s; choose "
            "another --output to search with those of today",
            config.output,
            ", ".join(f"{name} = {settings[name]}" for name in changed),
        )
        train = kept
    return replace(config, train=train)


def adopt(config: SweepConfig, journal: Journal) -> None:
    """Record the trials of a sweep that an earlier version began.

    Trials that it stopped are told from unfinished ones by Tune's state.
    """
    trials = storage.join(config.output, TRIALS)
    names = [name for name in storage.list_names(trials) if name.startswith(PREFIX)]
    left = [name for name in sorted(names) if name not in journal.trials]
    if not left:
        return
    ended = _ended_trials(config.output)
    for name in left:
        folder = storage.join(trials, name)
        if not storage.exists(storage.join(folder, CONFIG)):
            continue  # killed before it began
        settings = settings_of(storage.read_json(storage.join(folder, CONFIG)))
        values = {one: settings[one] for one in SEARCHED.values()}
        trial = journal.adopt(
            int(name.removeprefix(PREFIX)), len(journal.trials), settings["seed"], values
        )
        reports = journal.reports(trial.name, config.metric)
        finished = storage.exists(storage.join(folder, run_folder.RESULT))
        if name in ended and not finished and reports:
            journal.end(name, "stopped", *reports[-1], "behind other trials")
    logger.info(
        "%s was begun by an earlier version: %d trials, %d of them stopped early",
        config.output,
        len(left),
        len(journal.ends),
    )


def _ended_trials(output: str) -> set[str]:
    """Return the names of the trials that Tune's state says have ended."""
    folder = storage.join(output, TUNE_STATE)
    states = [name for name in storage.list_names(folder) if name.startswith("experiment_state")]
    if not states:
        return set()
    state = storage.read_json(storage.join(folder, max(states)))
    trials = [json.loads(trial) for trial, _ in state["trial_data"]]
    return {
        f"{PREFIX}{one['trial_id'].rpartition('_')[2]}"
        for one in trials
        if one["status"] == "TERMINATED"
    }
