"""Parses a job's command line: its config, with tyro, and the options of all jobs."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import tyro

from jobs.config_file import ConfigFileError, read_config_file
from jobs.settings import SUPERSEDED, CommandLine
from jobs.short_help import short_help
from pipelines.common.redaction import without_secrets
from stgt.errors import SettingError

EXIT_USAGE = 2
MAX_SIMILAR = 3
"""Similar flags to suggest."""


@dataclass(frozen=True)
class Options:
    """Options of all jobs."""

    config: str | None
    """File to read the config from."""
    timeline: str | None
    """File to write a timeline to."""
    verbose: bool


def print_and_exit(message: str, code: int) -> NoReturn:
    """Print an error message, without secrets, and exit."""
    print(f"error: {without_secrets(message)}", file=sys.stderr, flush=True)
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one sentence, without the usage."""
        print_and_exit(f"{message}; see {self.prog} --help", EXIT_USAGE)


def read_command_line(job: str, line: CommandLine, argv: Sequence[str]) -> tuple[Any, Options]:
    """Parse the config and the options of all jobs, or print help or an error and exit.

    Args:
        job: Name of the job.
        line: The job's command line.
        argv: Arguments, without the program name.
    """
    shared = _Parser(prog=f"python -m jobs.{job}", add_help=False, allow_abbrev=False)
    shared.add_argument("--config")
    shared.add_argument("--timeline")
    shared.add_argument("--verbose", action="store_true")
    shared.add_argument("-h", "--help", action="store_true")
    shared.add_argument("--help-all", action="store_true")
    known, rest = shared.parse_known_args(list(argv))
    options = Options(known.config, known.timeline, known.verbose)
    recipe = _recipe_of(line, rest, options)
    if known.help:
        print(short_help(job, line, recipe))
        sys.exit(0)
    prog = f"python -m jobs.{job}"
    description, default = line.description, line.default
    if options.config is not None:
        try:
            default = read_config_file(Path(options.config), job, line)
        except ConfigFileError as error:
            print_and_exit(str(error), EXIT_USAGE)
    elif recipe is not None:
        prog, rest = f"{prog} {recipe}", rest[1:]
        description, default = line.recipes[recipe].description, line.recipes[recipe].config
    elif line.recipes and known.help_all and default is None:
        print(short_help(job, line, None))
        sys.exit(0)
    elif line.recipes and default is None:
        print_and_exit(f"give a recipe or --config FILE; {prog} --help lists them", EXIT_USAGE)
    for word in rest:
        flag = word.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and (today := line.renamed(flag)) is not None:
            print_and_exit(f"{flag} is now {today}; see {prog} --help", EXIT_USAGE)
    rest = ["--help"] if known.help_all else _with_superseded(rest)
    return _parse(line.config, rest, prog, description, default), options


def _parse(config: type, args: Sequence[str], prog: str, description: str, default: Any) -> Any:
    """Parse settings with tyro, which describes an error in a box; print it as one sentence."""
    given = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config, args=args, prog=prog, description=description, **given)
    except SystemExit as error:
        if error.code:
            print_and_exit(f"{_sentence(said.getvalue())}; see {prog} --help", EXIT_USAGE)
        raise
    except SettingError as error:  # of a nested config whose flags have no prefix
        print_and_exit(f"{error}; see {prog} --help", EXIT_USAGE)


def _sentence(box: str) -> str:
    """The message in an error box of tyro, with the names of similar flags.

    A box has a title and sections that are divided by rules: the message, then what helps.
    """
    sections: list[list[str]] = [[]]
    for line in box.strip().splitlines():
        text = line.strip("│|╭╮╰╯ ")
        if set(text) <= set("─- ") or line.startswith(("╭", "╰")):
            sections.append([])
        else:
            sections[-1].append(text)
    # Where the terminal draws no boxes, the title is a section of its own.
    head, *others = [one for one in sections if one][0 if box.startswith("╭") else 1 :]
    if head[0].startswith("Missing from"):
        # The last name of a setting is its own, those before it are aliases.
        needed = [re.findall(r"--[\w.-]+", line)[-1] for line in head[1:] if line.startswith("--")]
        return f"required settings are missing: {', '.join(needed)}"
    message = re.sub(r"^Error parsing \w+: ", "", " ".join(head).removesuffix("."))
    hints = [line.split()[0] for section in others for line in section if line.startswith("--")]
    if hints and message.startswith("Unrecognized"):
        near = list(dict.fromkeys(hint.rstrip(",") for hint in hints))[:MAX_SIMILAR]
        message += f"; did you mean {' or '.join(near)}?"
    return message


def _recipe_of(line: CommandLine, args: Sequence[str], options: Options) -> str | None:
    """Return the given recipe, if any; for an unknown one, print similar names and exit."""
    if not line.recipes or not args or args[0].startswith("-"):
        return None
    name = args[0]
    if options.config is not None:
        print_and_exit(f"give either a recipe ({name}) or --config, not both", EXIT_USAGE)
    if name not in line.recipes:
        near = difflib.get_close_matches(name, line.recipes, n=3, cutoff=0.4)
        did_you_mean = f"did you mean {' or '.join(near)}? " if near else ""
        print_and_exit(
            f"there is no recipe {name!r}; {did_you_mean}all recipes: {', '.join(line.recipes)}",
            EXIT_USAGE,
        )
    return name


def _with_superseded(args: Sequence[str]) -> list[str]:
    """Return the arguments, with flags added that turn off settings which others replace.

    For example, `--steps` on the command line turns off the epochs that a recipe sets.
    """
    given = {
        word.partition("=")[0].replace("_", "-"): position
        for position, word in enumerate(args)
        if word.startswith("--")
    }
    added: list[str] = []
    for name, (replaced, off) in SUPERSEDED.items():
        if name not in given:
            continue
        position = given[name]
        value = args[position].partition("=")[2] or "".join(args[position + 1 : position + 2])
        if replaced not in given and value != "None":
            added += [replaced, off]
        elif name.endswith("steps") and replaced in given:
            other = given[replaced]
            asked = args[other].partition("=")[2] or "".join(args[other + 1 : other + 2])
            if asked != "None":
                print_and_exit(f"give either {name} or {replaced}, not both", EXIT_USAGE)
    return [*args, *added]
