"""Output folders: bound to the settings of their first run, with the config that made them.

`config.json` beside an output holds the complete config with the names of the job and the recipe.
Facts that a run found out, such as a digest of its data, are kept under `recorded`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pipelines.common import storage
from pipelines.common.config import flatten, to_dict

CONFIG = "config.json"
JOB, RECIPE, RECORDED = "job", "recipe", "recorded"
_MISSING = object()


def config_record(job: str, config: Any, **recorded: Any) -> dict[str, Any]:
    """What `config.json` holds.

    Args:
        job: name of the job.
        config: its config; a field `recipe` becomes the name of the recipe.
        recorded: facts found out by the run, by name.
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
    """Settings and recorded facts by dotted name, of any form that `config.json` has had.

    Earlier versions wrote no names of job and recipe, and recorded facts among the settings.
    """
    values = {name: value for name, value in record.items() if name not in (JOB, RECIPE, RECORDED)}
    return flatten({**values, **record.get(RECORDED, {})})


def write_config(uri: str, job: str, config: Any) -> None:
    """Write the config of a job that has no other record of its settings.

    Args:
        uri: the output: a folder, which gets a `config.json`, or a file, which gets one beside it,
            `NAME.config.json`.
        job: name of the job.
        config: its config.
    """
    stem, dot, ending = storage.name_of(uri).rpartition(".")
    if dot and ending in ("parquet", "pth"):
        target = f"{uri.removesuffix(storage.name_of(uri))}{stem}.{CONFIG}"
    else:
        target = storage.join(uri, CONFIG)
    storage.write_json(target, config_record(job, config))


def differing_names(
    before: Mapping[str, Any], now: Mapping[str, Any], ignored: Callable[[str], bool]
) -> list[str]:
    """Dotted names whose values differ between two flat mappings, sorted."""
    return sorted(
        name
        for name in before.keys() | now.keys()
        if before.get(name, _MISSING) != now.get(name, _MISSING) and not ignored(name)
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
    """Bind a folder to a record of settings, or check it against the record that it is bound to.

    Args:
        folder: the output folder.
        file: name of the JSON file that holds the record.
        record: the settings of this run.
        refuse: makes the error to raise, from the record found and the names that differ.
        compared: picks what is compared from a record, as a flat mapping.
        ignored: names that may differ.
        has_results: whether the folder holds results; without any, an earlier record binds nobody.
        overwrite: go on when settings differ, and write the new record.

    Returns:
        Names that differ; empty unless `overwrite`.

    Raises:
        Exception: what `refuse` makes, when settings differ.
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
