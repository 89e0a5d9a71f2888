"""Records the settings of a run in its output folder, and refuses runs with other settings.

`config.json` beside an output contains the complete config with the names of the job and the
recipe. Facts that a run determined, such as a digest of its data, are below `recorded`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pipelines.common import storage
from pipelines.common.config import flatten, to_dict

CONFIG = "config.json"
RUN = "mlflow_run.json"
"""File in an output folder with the id of the run in MLflow, and where MLflow is."""
JOB, RECIPE, RECORDED = "job", "recipe", "recorded"


def config_record(job: str, config: Any, **recorded: Any) -> dict[str, Any]:
    """Return the content of `config.json`.

    Args:
        job: Name of the job.
        config: Config of the job. Its field `recipe`, if any, is the name of the recipe.
        recorded: Facts that the run determined, by name.
    """
    values = json.loads(json.dumps(to_dict(config)))
    record: dict[str, Any] = {JOB: job}
    if recipe := values.pop(RECIPE, None):
        record[RECIPE] = recipe
    record.update(values)
    if recorded:
        record[RECORDED] = recorded
    return record


def settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings and recorded facts by dotted name, from any version of `config.json`.

    Earlier versions wrote no names of job and recipe, and put recorded facts among the settings.
    """
    values = {name: value for name, value in record.items() if name not in (JOB, RECIPE, RECORDED)}
    return flatten({**values, **record.get(RECORDED, {})})


def write_config(folder: str, job: str, config: Any) -> None:
    """Write the config of a job that has no other record of its settings into its output folder."""
    storage.write_json(storage.join(folder, CONFIG), config_record(job, config))


def write_config_beside(file: str, job: str, config: Any, **recorded: Any) -> None:
    """Write the config of a job whose output is a file, as `NAME.config.json` beside the file."""
    storage.write_json(config_beside(file), config_record(job, config, **recorded))


def config_beside(file: str) -> str:
    """Return the URI of the config of a job whose output is a file."""
    name = storage.name_of(file)
    stem = name.rpartition(".")[0] or name
    return f"{file.removesuffix(name)}{stem}.{CONFIG}"


def differing_names(
    before: Mapping[str, Any], now: Mapping[str, Any], ignored: Callable[[str], bool]
) -> list[str]:
    """Return the sorted names whose values differ between two flat mappings."""
    return sorted(
        name
        for name in before.keys() | now.keys()
        # A setting that an earlier version did not have is the same as one that is not set.
        if before.get(name) != now.get(name) and not ignored(name)
    )


def claim_folder(
    folder: str,
    file: str,
    record: Mapping[str, Any],
    refuse: Callable[[Mapping[str, Any], list[str]], Exception],
    *,
    compared: Callable[[Mapping[str, Any]], dict[str, Any]] = settings_of,
    ignored: Collection[str] | Callable[[str], bool] = (),
    has_results: bool = True,
    overwrite: bool = False,
) -> list[str]:
    """Record the settings of a run in its folder, or check them against an earlier record.

    Args:
        folder: The output folder.
        file: Name of the JSON file with the record.
        record: Settings of this run.
        refuse: Creates the error to raise, from the earlier record and the names that differ.
        compared: Returns the settings to compare from a record, as a flat mapping.
        ignored: Names that may differ.
        has_results: Whether the folder contains results. Without results, an earlier record is
            replaced.
        overwrite: Whether to accept differing settings and write the new record.

    Returns:
        Names that differ; empty unless `overwrite`.

    Raises:
        Exception: The error of `refuse`, if settings differ.
    """
    uri = storage.join(folder, file)
    found = storage.read_json(uri) if storage.exists(uri) else None
    skip = ignored if callable(ignored) else frozenset(ignored).__contains__
    differing = []
    if found is not None and has_results:
        differing = differing_names(compared(found), compared(record), skip)
        if differing and not overwrite:
            raise refuse(found, differing)
    if found != record:
        storage.write_json(uri, dict(record))
    return differing
