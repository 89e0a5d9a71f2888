"""Reads annotation files: text, CSV, streamed JSON, and pickles of plain values."""

from __future__ import annotations

import csv
import difflib
import io
import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import ijson

from pipelines.common import storage
from stgt.errors import ManifestError
from stgt.inputs.caption_text import clean_caption

EMPTY = "caption is empty after cleaning"


@contextmanager
def open_binary(uri: str) -> Iterator[BinaryIO]:
    """Open an annotation file as bytes.

    Raises:
        ManifestError: The file does not exist.
    """
    try:
        with storage.as_local(uri) as path, path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise ManifestError(f"annotation file {uri} does not exist; check the path") from error


@contextmanager
def open_text(uri: str) -> Iterator[io.TextIOWrapper]:
    """Open an annotation file as UTF-8 text, with or without a byte order mark.

    Raises:
        ManifestError: The file does not exist or is not UTF-8.
    """
    with open_binary(uri) as binary:
        try:
            yield io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
        except UnicodeDecodeError as error:
            raise ManifestError(f"{uri} is not UTF-8 text: {error}") from error


def csv_rows(
    uri: str,
    required: tuple[str, ...],
    what_to_do: str = "; the first line must contain the column names",
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number and the values by column name of each row of a CSV file with a header.

    Raises:
        ManifestError: A column is missing, or a field cannot be read.
    """
    with open_text(uri) as text:
        reader = csv.DictReader(text)
        try:
            found = reader.fieldnames or []
            require_columns(uri, required, found, what_to_do)
            for number, row in enumerate(reader, start=1):
                yield number, {name: value for name, value in row.items() if name in found}
        except csv.Error as error:
            raise ManifestError(
                f"{uri} line {reader.line_num}: {error}; a quote may be unclosed"
            ) from error


def require_columns(
    uri: str, required: Sequence[str], found: Sequence[str], what_to_do: str = ""
) -> None:
    """Check that a table has all required columns.

    Raises:
        ManifestError: A column is missing; the message suggests similar column names.
    """
    missing = [name for name in required if name not in found]
    if not missing:
        return
    plain = {_plain(name): name for name in found}
    near = {
        name: plain[match]
        for name in missing
        for match in difflib.get_close_matches(_plain(name), list(plain), n=1)
    }
    hints = ", ".join(f"{theirs} may be {name}" for name, theirs in near.items())
    raise ManifestError(
        f"{uri} lacks the columns {', '.join(missing)} (found: {', '.join(found) or 'none'})"
        f"{f'; {hints}' if hints else ''}{what_to_do}"
    )


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def lines(uri: str) -> Iterator[tuple[int, str]]:
    """Yield the number and text of each nonempty line, without the line ending."""
    with open_text(uri) as text:
        for number, line in enumerate(text, start=1):
            if line := line.strip("\r\n"):
                yield number, line


def json_lines(uri: str) -> Iterator[tuple[int, Any]]:
    """Yield the number and value of each line of a JSON lines file."""
    number = 0
    try:
        for number, line in lines(uri):
            yield number, json.loads(line)
    except json.JSONDecodeError as error:
        raise ManifestError(f"{uri} line {number} is not valid JSON: {error}") from error


def json_list(uri: str, prefix: str = "item") -> Iterator[tuple[int, Any]]:
    """Yield the number and value of each entry of a JSON list, read as a stream.

    Args:
        uri: the file.
        prefix: path of the entries: "item" if the file is the list, "sentences.item" if the list is
            under the key `sentences`.
    """
    if prefix == "item" and (first := first_character(uri)) != "[":
        holds = "nothing" if not first else "an object" if first == "{" else f"{first!r}..."
        raise ManifestError(f"{uri} contains {holds}, but this format requires a JSON list")
    with _json(uri) as binary:
        yield from enumerate(ijson.items(binary, prefix, use_float=True), start=1)


def json_object(uri: str) -> Iterator[tuple[str, Any]]:
    """Yield the key and value of each entry of a JSON object, read as a stream."""
    with _json(uri) as binary:
        yield from ijson.kvitems(binary, "", use_float=True)


@contextmanager
def _json(uri: str) -> Iterator[BinaryIO]:
    with open_binary(uri) as binary:
        try:
            yield binary
        except (ijson.JSONError, UnicodeDecodeError) as error:
            said = error.args[0] if error.args else ""
            text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(error)
            first_line = text.splitlines()[0] if text else type(error).__name__
            raise ManifestError(f"{uri} is not valid UTF-8 JSON: {first_line}") from error


def first_character(uri: str) -> str:
    """Return the first nonblank character, which distinguishes a JSON list from an object."""
    with open_text(uri) as text:
        while character := text.read(1):
            if not character.isspace():
                return character
    return ""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it would import {module_name}.{global_name}")


def plain_pickle(uri: str) -> Any:
    """Read a pickle that contains only lists, dicts and strings.

    Raises:
        ManifestError: The pickle would import code, or it is damaged.
    """
    with open_binary(uri) as binary:
        try:
            return _PlainUnpickler(binary, encoding="utf-8").load()
        except (pickle.UnpicklingError, EOFError, ValueError, IndexError) as error:
            raise ManifestError(
                f"{uri} was not read: {error}; a pickle may only contain lists, dicts and strings"
            ) from error


def caption_list(value: Any) -> list[str]:
    """Return the usable captions, stripped, of a field with one caption or a list of captions."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        return []
    stripped = [text.strip() for text in texts if isinstance(text, str)]
    return [text for text in stripped if text.lower() != "nan" and clean_caption(text)]


def require(row: Any, fields: tuple[str, ...]) -> str | None:
    """Return why a row is unusable because of missing fields, or None if it has all of them."""
    if not isinstance(row, dict):
        return f"expected an object with {', '.join(fields)}, got {type(row).__name__}"
    empty = [name for name in fields if row.get(name) in (None, "")]
    return f"{', '.join(empty)} is missing or empty" if empty else None
