"""The space that a sweep searches: which settings of the training vary, and over which values.

A space is a list of texts such as `optim.lr=loguniform(1e-6,1e-4)`, or a YAML file with the same
names and expressions. All values are checked against the config before a trial starts.
"""

from __future__ import annotations

import ast
import difflib
import itertools
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.common.config import with_settings
from pipelines.train.config import TrainConfig
from stgt.errors import SettingError, STGTError
from stgt.field_marks import FieldMark, config_fields, configs_of, is_below, marked_fields

if typing.TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

RANGES = ("uniform", "loguniform", "randint")
LISTS = ("choice", "grid")
EXAMPLE = "for example optim.lr=loguniform(1e-6,1e-4)"
NOT_SEARCHED = {
    "output": "each trial has a folder of its own",
    "name": "each trial has a name of its own",
    "recipe": "it names the recipe that the settings come from",
    "seed": "use --repeats to train a setting with several seeds",
    "tracking": "all trials are recorded in the same place",
    "allow_changes": "it does not change a training",
    "val_store": "trials are compared on the same clips",
    "test_store": "trials are compared on the same clips",
    "val_clips": "trials are compared on the same clips",
    "hold_out": "trials are compared on the same clips",
    "hold_out_by": "trials are compared on the same clips",
    "select_on": "trials are compared by the same metric",
    "select_metric": "trials are compared by the same metric",
    "frame_rules": "it is decided by the version that began a run",
}
"""Settings that do not vary between the trials of a sweep, and why."""
SEARCHED_ANYWAY = frozenset({"compile", "micro_batch"})
"""Settings that change only how fast a training is, which is worth a search as well."""
MOST_COMBINATIONS = 4096
"""Number of combinations that are checked one by one before the sweep."""


class SpaceError(STGTError):
    """A space cannot be searched."""


@dataclass(frozen=True)
class Parameter:
    """One searched setting."""

    name: str
    """Dotted name of the config field."""
    kind: str
    """`uniform`, `loguniform`, `randint`, `choice` or `grid`."""
    values: tuple[Any, ...]
    """Lower and upper bound, both included; or the values of `choice` and `grid`."""

    @property
    def is_list(self) -> bool:
        """Whether the parameter takes one of a few given values."""
        return self.kind in LISTS

    def distribution(self) -> BaseDistribution:
        """Return Optuna's distribution of the parameter."""
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        if self.is_list:
            return CategoricalDistribution(self.values)
        low, high = self.values
        if self.kind == "randint":
            return IntDistribution(low, high)
        return FloatDistribution(low, high, log=self.kind == "loguniform")

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(map(repr, self.values))})"


def read_space(texts: Sequence[str], train: TrainConfig) -> dict[str, Parameter]:
    """Read a space, and check names, types and bounds of its values.

    Args:
        texts: Texts `NAME=DISTRIBUTION(VALUES)`, or YAML files that map names to `DISTRIBUTION(
            VALUES)` or to a list of values, which is a choice.
        train: Config whose settings are searched.

    Returns:
        The parameters by the dotted name of the field, in the given order.

    Raises:
        SpaceError: The space is empty or contradictory, names an unknown field, or has a value of
            another type than the field.
    """
    found: dict[str, Parameter] = {}
    for name, text in _entries(texts):
        if name in found:
            raise SpaceError(f"the space gives {name} twice; keep one of them")
        found[name] = _parameter(name, text, train)
    if not found:
        raise SpaceError(f"the space is empty; give --space with at least one setting, {EXAMPLE}")
    if "steps" in found and "epochs" in found:
        raise SpaceError("the space gives both steps and epochs; keep one of them")
    return found


def _entries(texts: Sequence[str]) -> Iterator[tuple[str, Any]]:
    import yaml

    for text in texts:
        name, equals, expression = text.partition("=")
        if equals:
            yield name.strip(), expression.strip()
            continue
        path = Path(text)
        if path.suffix not in (".yaml", ".yml", ".json"):
            raise SpaceError(
                f"{text!r} is not a part of a space; write NAME=DISTRIBUTION(VALUES), {EXAMPLE}, "
                "or give a YAML file"
            )
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            why = " ".join(str(error).split())
            raise SpaceError(f"the space {path} cannot be read: {why}") from error
        if not isinstance(content, Mapping):
            raise SpaceError(f"the space {path} must map names to distributions, {EXAMPLE}")
        yield from ((str(name), value) for name, value in content.items())


def _parameter(name: str, text: Any, train: TrainConfig) -> Parameter:
    hint = _type_of(name, type(train))
    if isinstance(text, list):
        kind, values = "choice", tuple(text)
    else:
        kind, values = _parsed(name, str(text))
    written = f"{name}={kind}({', '.join(map(str, values))})"
    if kind in LISTS:
        if not values:
            raise SpaceError(f"{written} has no values; give at least one")
        values = tuple(_checked(written, value, hint) for value in values)
        if len(set(map(repr, values))) < len(values):
            raise SpaceError(f"{written} contains a value twice")
        if not all(isinstance(value, (bool, int, float, str, type(None))) for value in values):
            raise SpaceError(
                f"{written}: only numbers, texts, true, false and none can be searched"
            )
        if any(isinstance(value, float) and not math.isfinite(value) for value in values):
            raise SpaceError(f"{written}: values must be finite")
        return Parameter(name, kind, values)
    if len(values) != 2:
        raise SpaceError(f"{written} needs two bounds, such as {kind}(1, 8)")
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        raise SpaceError(f"{written} needs numbers as bounds")
    if _accepts(hint, bool):
        raise SpaceError(f"{written}: {name} is on or off; use choice(true,false)")
    integral = _accepts(hint, int) and not _accepts(hint, float)
    if kind == "randint" and not all(isinstance(value, int) for value in values):
        raise SpaceError(f"{written} needs integers as bounds")
    if kind != "randint" and integral:
        raise SpaceError(f"{written}: {name} is an integer; use randint, choice or grid")
    for value in values:
        _checked(written, value, hint)
    low, high = values
    if kind != "randint":
        low, high = float(low), float(high)
    if not low < high:
        raise SpaceError(f"{written}: the lower bound must be below the upper bound")
    if kind == "loguniform" and low <= 0:
        raise SpaceError(f"{written}: the bounds of loguniform must be positive")
    return Parameter(name, kind, (low, high))


def _parsed(name: str, text: str) -> tuple[str, tuple[Any, ...]]:
    kinds = (*RANGES, *LISTS)
    wrong = SpaceError(
        f"{name}={text} is not a distribution; write one of {', '.join(kinds)} with its values in "
        f"parentheses, {EXAMPLE}"
    )
    try:
        call = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise wrong from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.keywords:
        raise wrong
    kind = call.func.id
    if kind not in kinds:
        near = difflib.get_close_matches(kind, kinds, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SpaceError(f"{name}={text}: there is no distribution {kind!r}{hint}")
    try:
        return kind, tuple(_literal(one) for one in call.args)
    except ValueError as error:
        raise wrong from error


def _literal(node: ast.expr) -> Any:
    """Return the value of an expression; a bare word is a text, as on a command line."""
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "none": None}.get(node.id.lower(), node.id)
    return ast.literal_eval(node)


def _type_of(name: str, config: type) -> Any:
    """Return the type of a field.

    Raises:
        SpaceError: There is no such field, or it cannot be searched.
    """
    reason = next(
        (why for one, why in NOT_SEARCHED.items() if is_below(name, frozenset([one]))), ""
    )
    operational = frozenset(marked_fields(TrainConfig, FieldMark.OPERATIONAL))
    if not reason and is_below(name, operational) and name not in SEARCHED_ANYWAY:
        reason = "it does not change what is learned, and all trials use the same resources"
    if reason:
        raise SpaceError(f"{name} cannot be searched: {reason}")
    known = dict(_fields(config))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        last = name.rpartition(".")[2]
        near = near or [one for one in known if one.rpartition(".")[2] == last][:3]
        did_you_mean = f"; did you mean {' or '.join(near)}?" if near else ""
        raise SpaceError(f"there is no setting {name!r} to search{did_you_mean}")
    return known[name]


def _fields(config: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field, hint, _ in config_fields(config):
        if not (nested := configs_of(hint)):
            yield f"{prefix}{field.name}", hint
        for one in nested:
            yield from _fields(one, f"{prefix}{field.name}.")


def _checked(written: str, value: Any, hint: Any) -> Any:
    import pydantic

    try:
        return pydantic.TypeAdapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        raise SpaceError(
            f"{written}: {value!r} is not valid: {error.errors()[0]['msg']}"
        ) from error


def _accepts(hint: Any, kind: type) -> bool:
    return hint is kind or kind in typing.get_args(hint)


def with_values(train: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """Return a config with some settings replaced.

    Args:
        train: The config.
        values: New values by dotted name. `steps` turns off the epochs of the recipe.

    Raises:
        SettingError: The config refuses the combination; the message names it.
    """
    values = dict(values)
    if "steps" in values and "epochs" not in values:
        values["epochs"] = None
    try:
        return with_settings(train, values)
    except SettingError as error:
        raise SettingError(f"the setting {in_words(values)} is refused: {error}") from error


def in_words(values: Mapping[str, Any]) -> str:
    """Return searched values as text, such as `optim.lr = 0.001, num_frames = 8`."""
    return ", ".join(
        f"{name} = {value:.4g}" if isinstance(value, float) else f"{name} = {value}"
        for name, value in values.items()
        if not (name == "epochs" and value is None)
    )


def combinations(space: Mapping[str, Parameter]) -> Iterator[dict[str, Any]]:
    """Yield every combination of the values of lists and of the bounds of ranges."""
    names = list(space)
    for values in itertools.product(*(space[name].values for name in names)):
        yield dict(zip(names, values, strict=True))


def check_values(space: Mapping[str, Parameter], train: TrainConfig) -> list[TrainConfig]:
    """Check that the config accepts the values of a space, before any trial starts.

    Up to 4,096 combinations are checked one by one; of a larger space, each value with the first
    values of the others.

    Returns:
        Configs whose data must be checked as well: one for each value of the settings that decide
        which data suits the training.

    Raises:
        SettingError: The config refuses a combination.
    """
    first = {name: one.values[0] for name, one in space.items()}
    single = [{**first, name: value} for name, one in space.items() for value in one.values]
    many = math.prod(len(one.values) for one in space.values()) > MOST_COMBINATIONS
    for values in single if many else combinations(space):
        with_values(train, values)
    of_data = [name for name in space if _concerns_data(name)]
    return [with_values(train, {name: value}) for name in of_data for value in space[name].values]


def _concerns_data(name: str) -> bool:
    """Return whether a setting decides which data suits a training."""
    if name.startswith(("optim.", "augment.", "label_smoothing.", "loss_weights.", "cache")):
        return False
    operational = frozenset(marked_fields(TrainConfig, FieldMark.OPERATIONAL))
    return name in ("model.vision.image_size", "model.image_size") or not (
        name.startswith("model.") or is_below(name, operational)
    )
