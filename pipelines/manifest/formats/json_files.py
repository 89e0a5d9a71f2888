"""Reads JSON: lines, and lists and objects of any size as a stream; NaN and Infinity are null.

An entry that cannot be used is yielded as an `Unreadable`. A list or an object that is not valid
cannot be read past its error, which names the entry before it.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import ijson

from pipelines.manifest.formats import opening
from pipelines.manifest.formats.opening import Unreadable
from stgt.errors import ManifestError

SCANNED_BYTES = 1 << 20
LONGEST_CONSTANT_BYTES = 64
"""Bytes that a constant with the blanks around it has at most, for the scan of a file."""

_CONSTANT = re.compile(rb"[:,\[]\s*(?:NaN|-?Infinity)\s*[,}\]]")
_JSON_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*(?:(?P<closed>")|\\?\Z)|NaN|-?Infinity', re.DOTALL)
_JSON_REST = re.compile(rb"(?:N|Na|-|-?I[nfity]*)\Z")


def json_lines(uri: str) -> Iterator[tuple[int, Any]]:
    """Yield the number and value of each line of a JSON lines file; NaN is null."""
    for number, line in opening.lines(uri):
        if isinstance(line, Unreadable):
            yield number, line
            continue
        try:
            yield number, _DECODER.decode(line)
        except json.JSONDecodeError as error:
            where = f"{error.msg} at character {error.pos + 1}"
            yield number, Unreadable(f"line {number} is not valid JSON: {where}")
        except ValueError as error:
            yield number, Unreadable(f"line {number} is not usable: {error}")
        except RecursionError:
            yield number, Unreadable(f"line {number} is nested too deeply")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [
            name for name, count in collections.Counter(n for n, _ in pairs).items() if count > 1
        ]
        raise ValueError(f"it has several fields named {', '.join(names)}")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=lambda _: None)


def json_list(uri: str, prefix: str = "item") -> Iterator[tuple[int, Any]]:
    """Yield the number and value of each entry of a JSON list, read as a stream; NaN is null.

    Args:
        uri: The file.
        prefix: path of the entries: "item" if the file is the list, "sentences.item" if the list is
            under the key `sentences`.

    Raises:
        ManifestError: The file is not a JSON list, or not valid; the message names the entry.
    """
    if prefix == "item" and (first := opening.first_character(uri)) != "[":
        holds = "nothing" if not first else "an object" if first == "{" else f"{first!r}..."
        hint = "; if it has one object per line, name it .jsonl" if first == "{" else ""
        raise ManifestError(f"{uri} contains {holds}, but this format requires a JSON list{hint}")
    with _json(uri) as (binary, place):
        values = ijson.items(binary, prefix, use_float=True, map_type=_Entry)
        for number, value in enumerate(values, start=1):
            place.after = f"entry {number}"
            yield number, _checked(value)


def json_object(uri: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the key and value of each entry of a JSON object, read as a stream; NaN is null.

    Args:
        uri: The file.
        prefix: Path of the object; empty if the file is the object.

    Raises:
        ManifestError: The file is not valid JSON; the message names the entry.
    """
    with _json(uri) as (binary, place):
        for key, value in ijson.kvitems(binary, prefix, use_float=True, map_type=_Entry):
            place.after = f"entry {key}"
            yield key, _checked(value)


class _Entry(dict[str, Any]):
    """An object of a JSON file that remembers fields which occur more than once."""

    repeated: tuple[str, ...] = ()

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self:
            self.repeated = (*self.repeated, name)
        super().__setitem__(name, value)


def _checked(value: Any) -> Any:
    if isinstance(value, _Entry) and value.repeated:
        return Unreadable(f"it has several fields named {', '.join(value.repeated)}")
    return value


def json_value(uri: str) -> Any:
    """Return the value of a small JSON file; NaN is null.

    Raises:
        ManifestError: The file is not valid JSON.
    """
    with opening.open_text(uri) as text:
        try:
            return decode(text.read())
        except ValueError as error:
            raise ManifestError(f"{uri} is not valid UTF-8 JSON: {error}") from error


def decode(text: str) -> Any:
    """Return the value of JSON text; NaN is null.

    Raises:
        ValueError: The text is not valid JSON, or has several fields with one name.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError(f"it is nested too deeply: {error}") from error


@dataclass
class _Place:
    """What was read last, for error messages."""

    after: str = "the beginning"


@contextmanager
def _json(uri: str) -> Iterator[tuple[Any, _Place]]:
    place = _Place()
    has_constants = _has_constants(uri)
    with opening.open_binary(uri) as binary:
        mark = binary.read(3)
        if mark[:2] in opening.UTF16_MARKS:
            raise ManifestError(f"{uri} is UTF-16 text; convert it to UTF-8")
        start = mark.removeprefix(opening.BYTE_ORDER_MARK.encode())
        try:
            yield _JsonBytes(binary, start, has_constants), place
        except (ijson.JSONError, UnicodeDecodeError) as error:
            said = error.args[0] if error.args else ""
            text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(error)
            first_line = text.splitlines()[0] if text else type(error).__name__
            raise ManifestError(
                f"{uri} is not valid UTF-8 JSON after {place.after}: {first_line}"
            ) from error


def _has_constants(uri: str) -> bool:
    """Return whether a file may contain NaN or Infinity as values, which JSON does not have."""
    with opening.open_binary(uri) as binary:
        end = b""
        while data := binary.read(SCANNED_BYTES):
            data = end + data
            if (b"NaN" in data or b"Infinity" in data) and _CONSTANT.search(data):
                return True
            end = data[-LONGEST_CONSTANT_BYTES:]
    return False


class _JsonBytes:
    """The bytes of a JSON file, in which NaN and Infinity are replaced by null."""

    def __init__(self, binary: BinaryIO, start: bytes, replaces: bool) -> None:
        self._binary = binary
        self._rest = start
        self._replaces = replaces

    def read(self, size: int = -1) -> bytes:
        """Read some bytes; empty only at the end of the file."""
        if size == 0:
            return b""
        while True:
            data = self._binary.read(size)
            whole = self._rest + data
            self._rest = b""
            if not self._replaces or not data:
                return _without_constants(whole) if self._replaces else whole
            if rest := self._unfinished(whole):
                whole, self._rest = whole[: -len(rest)], rest
            if whole:
                return _without_constants(whole)

    @staticmethod
    def _unfinished(data: bytes) -> bytes:
        """Return the string or constant at the end of data that may continue after it."""
        end = 0
        for match in _JSON_TOKEN.finditer(data):
            if match[0][:1] == b'"' and match["closed"] is None:
                return match[0]
            end = match.end()
        rest = _JSON_REST.search(data, end)
        return rest.group() if rest else b""


def _without_constants(data: bytes) -> bytes:
    return _JSON_TOKEN.sub(lambda match: match[0] if match[0][:1] == b'"' else b"null", data)
