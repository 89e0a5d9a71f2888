"""Formats the short help of a job: the common settings, in groups, on one screen."""

from __future__ import annotations

import dataclasses
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

import docstring_parser
import tyro

from jobs.settings import SUPERSEDED, CommandLine
from stgt.field_marks import Common, config_fields, configs_of

FLAG_WIDTH = 28
MAX_COLUMNS = 110
TINY = "_tiny"
"""End of the name of a recipe's tiny variant."""
ROOMY_COLUMNS = 100
"""From this width on, help says what None means where it is the default."""
SHARED = {
    "--config FILE": "Read settings from a config.json or YAML.",
    "--timeline FILE": "Write a timeline for https://ui.perfetto.dev.",
    "--verbose": "Show the log lines of Ray and other libraries.",
    "--help-all": "Show every setting.",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One line of help."""

    group: str
    flag: str
    doc: str
    default: str | None
    """None for a required setting."""


def short_help(job: str, line: CommandLine, recipe: str | None) -> str:
    """Return the short help of a job or of one of its recipes."""
    width = min(MAX_COLUMNS, shutil.get_terminal_size((100, 24)).columns)
    default = line.recipes[recipe].config if recipe else line.default
    parts = [f"usage: python -m jobs.{job} {_usage(line, recipe)}", ""]
    described = line.recipes[recipe].description if recipe else line.description
    parts += _filled(described, width)
    if line.recipes and recipe is None:
        parts += ["", "recipes:"]
        parts += [
            _row(
                f"{name}[{TINY}]" if f"{name}{TINY}" in line.recipes else name,
                one.description.splitlines()[0],
                width,
            )
            for name, one in line.recipes.items()
            if name.removesuffix(TINY) == name or name.removesuffix(TINY) not in line.recipes
        ]
        parts += ["", *_filled(f"NAME{TINY} is the same stage at a size for two CPU cores.", width)]
        parts += ["", f"`python -m jobs.{job} RECIPE --help` shows the settings of a recipe."]
        if default is not None:
            parts += _filled(line.default_description, width)
    else:
        by_group: dict[str, list[Setting]] = {}
        for setting in _settings(line.config, default, roomy=width >= ROOMY_COLUMNS):
            by_group.setdefault(setting.group, []).append(setting)
        for group, settings in by_group.items():
            parts += ["", f"{group}:"]
            for one in settings:
                shown = "(required)" if one.default is None else f"(default: {one.default})"
                parts.append(_row(one.flag, f"{one.doc} {shown}", width))
    parts += [
        "",
        "options of every job:",
        *(_row(flag, doc, width) for flag, doc in SHARED.items()),
    ]
    return "\n".join(parts)


def _usage(line: CommandLine, recipe: str | None) -> str:
    if line.usage:
        return line.usage
    if recipe:
        return f"{recipe} [SETTINGS]"
    if line.recipes:
        choice = "RECIPE | --config FILE"
        return f"[{choice}] [SETTINGS]" if line.default else f"({choice}) [SETTINGS]"
    positional = [
        field.name.upper() if field.default is dataclasses.MISSING else f"[{field.name.upper()}]"
        for field, _, _ in config_fields(line.config)
        if is_positional(field)
    ]
    return " ".join([*positional, "[SETTINGS]"])


def is_positional(field: dataclasses.Field) -> bool:
    """Return whether a field is set by position instead of by a flag."""
    return "Positional" in str(field.type)


def is_flat(field: dataclasses.Field) -> bool:
    """Return whether the flags of a nested config have no prefix."""
    return 'arg(name="")' in str(field.type).replace("'", '"')


def _filled(text: str, width: int) -> list[str]:
    """The first two paragraphs: what it does, and an example. `--help-all` shows the others."""
    paragraphs = [" ".join(part.split()) for part in text.strip().split("\n\n")[:2]]
    lines = []
    for part in paragraphs:
        if part.startswith("python -m "):
            # Lines of an example end in backslashes, so that it can be pasted into a shell.
            wrapped = textwrap.wrap(part, width - 6, break_on_hyphens=False, break_long_words=False)
            lines += ["", "example:", "  " + " \\\n    ".join(wrapped)]
        else:
            lines += textwrap.wrap(part, width)
    return [line for one in lines for line in str(one).split("\n")]


def _row(flag: str, doc: str, width: int) -> str:
    indent = " " * (FLAG_WIDTH + 4)
    if len(flag) > FLAG_WIDTH:
        below = textwrap.fill(doc, width, initial_indent=indent, subsequent_indent=indent)
        return f"  {flag}\n{below}"
    head = f"  {flag:<{FLAG_WIDTH}}  "
    return textwrap.fill(doc, width, initial_indent=head, subsequent_indent=indent)


def _settings(
    config: type, default: Any, roomy: bool, prefix: str = "", shown_by: Common | None = None
) -> Iterator[Setting]:
    """Yield the settings of a config and its nested configs that are marked as common.

    Args:
        config: Config dataclass.
        default: Instance with the defaults, or None.
        roomy: Whether there is room to say what None means where it is the default.
        prefix: Prefix of the dotted names.
        shown_by: Mark of the field that contains a nested config. It selects the settings to show.
    """
    parsed = docstring_parser.parse_from_object(config)
    docs = {param.arg_name: " ".join((param.description or "").split()) for param in parsed.params}
    for field, hint, marks in config_fields(config):
        name = f"{prefix}{field.name}"
        mark = next((mark for mark in marks if isinstance(mark, Common)), None)
        if shown_by is not None:
            is_shown = not shown_by.only or field.name in shown_by.only
            mark = Common(shown_by.group, mark.only if mark else ()) if is_shown else None
        value = getattr(default, field.name, _default_of(field))
        if nested := configs_of(hint):
            if mark is not None or shown_by is None:
                below = prefix if is_flat(field) else f"{name}."
                kind = type(value) if isinstance(value, nested) else nested[0]
                yield from _settings(kind, value, roomy, below, mark)
        elif mark is not None and not (mark.if_set and value is None):
            flag = f"--{name.replace('_', '-')}"
            # Of a switch, the flag that changes the default.
            switch = f"--no-{flag[2:]}" if value is True else flag
            flag = switch if hint is bool else f"{flag} {_metavar(hint)}"
            if is_positional(field):
                flag = field.name.upper()
            shown = "none" if _is_replaced(name, default) else _shown(value)
            doc = _main_sentences(docs[field.name], with_none=shown == "none" and roomy)
            yield Setting(mark.group, flag, f"{doc}{_choices(hint, flag)}", shown)


def _is_replaced(name: str, default: Any) -> bool:
    """Return whether another setting of the default config replaces this one."""
    for setting, (other, off) in SUPERSEDED.items():
        if setting == f"--{name}" and default is not None:
            return str(getattr(default, other.removeprefix("--").replace("-", "_"), off)) != off
    return False


def _default_of(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return tyro.MISSING


def _shown(value: Any) -> str | None:
    if value is tyro.MISSING or value is tyro.MISSING_NONPROP:
        return None
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    if value == "":
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _metavar(hint: Any) -> str:
    if hint is bool:
        return ""  # a switch
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        choices = "{" + ",".join(map(str, args)) + "}"
        return choices if len(choices) <= FLAG_WIDTH else "NAME"
    if origin in (typing.Union, types.UnionType):
        return _metavar(next(one for one in args if one is not type(None)))
    if origin is tuple:
        return f"{_metavar(args[0])} ..."
    return {int: "INT", float: "FLOAT", str: "TEXT"}.get(hint, "VALUE")


def _main_sentences(doc: str, with_none: bool) -> str:
    """The first sentence of a field's documentation, and what None means if that is the default."""
    sentences = re.split(r"(?<=\.) (?=[A-Z0])", doc)
    meaning = [one for one in sentences[1:] if one.startswith("None ")]
    return " ".join([sentences[0], *(meaning[:1] if with_none else [])])


def _choices(hint: Any, flag: str) -> str:
    """The values of a field that allows a few, where the flag does not show them."""
    literal = next(
        (one for one in (hint, *typing.get_args(hint)) if typing.get_origin(one) is typing.Literal),
        None,
    )
    if literal is None or "{" in flag:
        return ""
    return f" One of {', '.join(map(str, typing.get_args(literal)))}."
