"""Reads configs from files: the `config.json` of an earlier run, or YAML with the same names."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.settings import SUPERSEDED, CommandLine
from pipelines.common.config import flatten
from pipelines.common.output_folder import JOB, RECIPE, RECORDED
from stgt.errors import STGTError
from stgt.field_marks import config_fields, configs_of, earlier_values

FACTS_OF_EARLIER_VERSIONS = ("data_digest", "identity")
"""Facts that earlier versions recorded among the settings."""


class ConfigFileError(STGTError):
    """A config file cannot be used."""


def read_config_file(path: Path, job: str, line: CommandLine) -> Any:
    """Read a config; settings that the file omits come from its recipe or the defaults.

    Args:
        path: JSON or YAML file. Besides settings it may contain the names of the job and the
            recipe. Recorded facts are ignored. Nested and dotted names are equivalent.
        job: Name of the job that reads the file.
        line: The job's command line.

    Raises:
        ConfigFileError: The file cannot be read, belongs to another job, has an unknown recipe or
            setting, or has an invalid value.
    """
    values = _read(path)
    is_record = path.suffix == ".json" and any(
        name in values for name in (JOB, *FACTS_OF_EARLIER_VERSIONS)
    )
    if (other := values.pop(JOB, job)) != job:
        raise ConfigFileError(
            f"{path} is a config of the job {other}; use it with python -m jobs.{other}"
        )
    values.pop(RECORDED, None)
    for name in FACTS_OF_EARLIER_VERSIONS:
        values.pop(name, None)
    recipe = values.pop(RECIPE, None)
    default = line.default
    if recipe is not None and line.recipes:
        if str(recipe) not in line.recipes:
            raise ConfigFileError(
                f"{path}: there is no recipe {recipe!r}{_near(str(recipe), line.recipes)}"
            )
        default = line.recipes[str(recipe)].config
    values = _nested(line.translate(_nested(values, path)), path)
    _refuse_unknown(path, values, line.config)
    for name, (replaced, off) in SUPERSEDED.items():
        key, other = (one.lstrip("-").replace("-", "_") for one in (name, replaced))
        if values.get(key) is not None and other not in values and _has(line.config, other):
            values[other] = None if off == "None" else int(off)
    if is_record:
        # The record of an earlier version describes what that version did.
        given = flatten(values)
        for name, value in earlier_values(line.config).items():
            if name not in given:
                values = _nested({**flatten(values), name: value}, path)
    return _build(path, line.config, values, default)


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigFileError(
            f"{path} cannot be read: {error}; give a JSON or YAML file"
        ) from error
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        where = " ".join(str(error).split())
        raise ConfigFileError(f"{path} is not valid JSON or YAML: {where}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigFileError(f"{path}: expected a mapping from names to settings at the top level")
    return values


def _nested(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Convert dotted names, read from a file, to nested mappings."""
    nested: dict[str, Any] = {}
    for name, value in flatten(dict(values)).items():
        *parents, last = name.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigFileError(
                    f"{path}: {parent} has a value of its own, so {name} cannot be set; give only "
                    "one of them"
                )
        place[last] = value
    return nested


def _refuse_unknown(path: Path, values: Mapping[str, Any], config: type) -> None:
    known = frozenset(setting_names(config))
    for name in flatten(dict(values)):
        if name not in known:
            raise ConfigFileError(f"{path}: there is no setting {name!r}{_near(name, known)}")


def _near(name: str, known: Mapping[str, Any] | frozenset[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def setting_names(config: type, prefix: str = "") -> list[str]:
    """Return the dotted names of all settings of a config dataclass."""
    names: list[str] = []
    for field, hint, _ in config_fields(config):
        if not (nested := configs_of(hint)):
            names.append(f"{prefix}{field.name}")
        for one in nested:
            names += setting_names(one, f"{prefix}{field.name}.")
    return list(dict.fromkeys(names))


def _has(config: type, name: str) -> bool:
    return any(field.name == name for field in dataclasses.fields(config))


def _build(path: Path, config: type, values: Mapping[str, Any], default: Any) -> Any:
    """Create a config from nested values and, for the others, a default config."""
    import pydantic
    import tyro

    missing = (tyro.MISSING, tyro.MISSING_NONPROP)

    def settings_of(one: Any) -> dict[str, Any]:
        return {
            field.name: settings_of(value) if dataclasses.is_dataclass(value) else value
            for field in dataclasses.fields(one)
            if not any((value := getattr(one, field.name)) is mark for mark in missing)
        }

    def merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
        both = dict(low)
        for name, value in high.items():
            below = both.get(name)
            if isinstance(below, dict) and isinstance(value, dict):
                value = merged(below, value)
            both[name] = value
        return both

    values = _with_lists(config, values)
    everything = merged({} if default is None else settings_of(default), values)
    try:
        return pydantic.TypeAdapter(config).validate_python(everything)
    except pydantic.ValidationError as error:
        raise ConfigFileError(f"{path}: {_in_words(error.errors()[0])}") from error


def _with_lists(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a text to a list of one where a setting takes several.

    Such a setting took one value in earlier versions, and one value is also natural in YAML.
    """
    changed = dict(values)
    for field, hint, _ in config_fields(config):
        value = changed.get(field.name)
        if isinstance(value, str) and typing.get_origin(hint) is tuple:
            changed[field.name] = [value]
        elif isinstance(value, Mapping):
            for nested in configs_of(hint):
                changed[field.name] = _with_lists(nested, changed[field.name])
    return changed


def _in_words(error: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{name} is not set; add it to the file, or use a complete config.json"
    return f"{name}: {message}" if name and error["type"] != "value_error" else message
