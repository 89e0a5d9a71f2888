"""Reads tables with a header whose columns are separated by commas, tabs, semicolons or pipes.

A row that cannot be read is yielded as an `Unreadable` and costs only its line, also if a quote in
it is never closed.
"""

from __future__ import annotations

import collections
import csv
import difflib
from collections.abc import Collection, Iterable, Iterator, Sequence

from pipelines.manifest.formats import opening
from pipelines.manifest.formats.opening import BYTE_ORDER_MARK, NOT_UTF8, Unreadable
from stgt.errors import ManifestError

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe"}
MAX_RECORD_LINES = 1000
"""Lines after which a quoted field counts as unclosed."""
MIN_ID_CHARACTERS = 8
"""Length from which two texts of the same length look like ids of the same kind."""

csv.field_size_limit(2**31 - 1)  # captions, transcripts and lists of clips can be long


class _Lines:
    """Iterates over lines, remembers those of the current record, and takes lines back."""

    def __init__(self, text: Iterable[str]) -> None:
        self._text = iter(text)
        self._returned: collections.deque[str] = collections.deque()
        self.record: list[str] = []
        self.number = 0
        """Number of the last line, counted from 1."""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if len(self.record) >= MAX_RECORD_LINES:
            raise csv.Error("a quoted field is too long")
        line = self._returned.popleft() if self._returned else next(self._text)
        line = line.removeprefix(BYTE_ORDER_MARK)
        self.number += 1
        self.record.append(line)
        return line

    def give_back(self, line: str) -> None:
        """Take back the line that was read last, as if it had not been read."""
        self._returned.appendleft(line)
        self.number -= 1

    def take_back(self) -> None:
        """Take back all lines of the record except the first."""
        self._returned.extendleft(reversed(self.record[1:]))
        self.number -= len(self.record) - 1
        del self.record[1:]


def csv_rows(
    uri: str,
    required: tuple[str, ...],
    what_to_do: str = "; the first line must contain the column names",
    used: Collection[str] | None = None,
) -> Iterator[tuple[int, dict[str, str | None] | Unreadable]]:
    """Yield the number and the values by column name of each row of a table with a header.

    Columns are separated by commas, tabs, semicolons or pipes, whichever gives the header the
    required columns.

    Args:
        uri: The file.
        required: Names of required columns; the first is the one that identifies a row.
        what_to_do: End of the message if a column is missing.
        used: Names of the columns that the caller uses; None means all.

    Raises:
        ManifestError: A required column is missing, or two used columns have the same name.
    """
    with opening.open_text(uri) as text:
        source = _Lines(text)
        delimiter, names = _header(uri, source, required)
        require_columns(uri, required, names, what_to_do)
        repeated = [
            name
            for name, count in collections.Counter(names).items()
            if count > 1 and name and (used is None or name in used)
        ]
        if repeated:
            raise ManifestError(
                f"{uri} has several columns named {', '.join(repeated)}; rename or remove all "
                "but one"
            )
        key = names.index(required[0])
        number = 0
        for line, values in _records(source, delimiter, len(names), key):
            if isinstance(values, list) and len(values) <= 1 and not "".join(values).strip():
                continue  # a blank line
            number += 1
            if isinstance(values, Unreadable):
                yield number, Unreadable(f"line {line}: {values.reason}")
            elif values == names:
                yield number, Unreadable(f"line {line} repeats the header")
            elif len(values) > len(names) and any(values[len(names) :]):
                yield (
                    number,
                    Unreadable(
                        f"line {line} has {len(values)} fields, {len(names)} expected; a field "
                        f"that contains a {DELIMITERS[delimiter]} must be quoted"
                    ),
                )
            elif len(values) < len(names) and any(
                names.index(name) >= len(values) for name in required
            ):
                yield (
                    number,
                    Unreadable(f"line {line} has {_fields(len(values))}, {len(names)} expected"),
                )
            else:
                missing = dict.fromkeys(names[len(values) :])
                yield number, {**dict(zip(names, values, strict=False)), **missing}


def _header(uri: str, source: _Lines, required: tuple[str, ...]) -> tuple[str, list[str]]:
    """Return the delimiter and the column names of a table.

    Raises:
        ManifestError: The header is not UTF-8, or a quote in it is not closed.
    """
    header = ""
    while not header.strip():
        source.record.clear()
        header = next(source, None)
        if header is None:
            return ",", []
    if NOT_UTF8.search(header):
        raise ManifestError(f"{uri} line {source.number} is not UTF-8 text; convert the file")
    delimiter, number = _delimiter(uri, header, required), source.number
    source.give_back(header)
    source.record.clear()
    try:
        names = next(csv.reader(source, delimiter=delimiter))
        if len(source.record) > 1:
            next(csv.reader(source.record, delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise ManifestError(
            f"{uri} line {number}: the column names cannot be read: {error}; a quote may be "
            "unclosed"
        ) from error
    return delimiter, names


def _fields(count: int) -> str:
    return "1 field" if count == 1 else f"{count} fields"


def _delimiter(uri: str, header: str, required: tuple[str, ...]) -> str:
    """Return the first delimiter that gives the header all required columns."""
    first = "\t" if opening.extension(uri) == "tsv" else ","
    order = [first, *(one for one in DELIMITERS if one != first)]
    for delimiter in order:
        names = next(csv.reader([header], delimiter=delimiter), [])
        if all(name in names for name in required):
            return delimiter
    return max(order, key=lambda one: (header.count(one), one == first))


def _records(
    source: _Lines, delimiter: str, num_columns: int, key: int
) -> Iterator[tuple[int, list[str] | Unreadable]]:
    """Yield the number of the first line and the values of each record.

    A record whose quote is not closed costs only its first line: reading continues with the next
    line.
    """
    reader = csv.reader(source, delimiter=delimiter)
    unclosed = Unreadable("a field spans several lines: a quote may be unclosed")
    while True:
        source.record.clear()
        line = source.number + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # The parser starts afresh with the next call.
            reason = unclosed if len(source.record) > 1 else Unreadable(str(error))
            source.take_back()
            yield line, reason
            continue
        if len(source.record) > 1 and _swallows_rows(source.record, delimiter, num_columns, key):
            source.take_back()
            yield line, unclosed
            # The parser may have reached the end of the file, but not that of the lines.
            reader = csv.reader(source, delimiter=delimiter)
            continue
        text = "".join(source.record)
        if text.count('"') % 2 and len(source.record) == 1 and _is_unclosed(text, delimiter):
            yield line, Unreadable("a quote is not closed, or the file is cut off")
        elif "\0" in text:
            yield line, Unreadable("the line contains a NUL character")
        elif not text.isascii() and NOT_UTF8.search(text):
            yield line, Unreadable("the line is not UTF-8 text")
        else:
            yield line, values


def _is_unclosed(line: str, delimiter: str) -> bool:
    """Return whether the last field of a line begins with a quote and is never closed."""
    try:
        next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False


def _swallows_rows(record: list[str], delimiter: str, num_columns: int, key: int) -> bool:
    """Return whether a quoted field of several lines probably contains other rows."""
    try:
        (values,) = csv.reader(record, delimiter=delimiter, strict=True)
    except csv.Error:
        return True  # the quote is never closed, or text follows the closing quote
    own = values[key] if key < len(values) else ""
    if "\n" in own or "\r" in own:
        return True
    for line in record[1:]:
        fields = line.strip("\r\n").split(delimiter)
        if len(fields) == num_columns and _is_alike(fields[key], own):
            return True
    return False


def _is_alike(one: str, other: str) -> bool:
    """Return whether two texts look like names or ids of the same kind."""
    endings = [text.strip().rpartition(".")[1:] for text in (one, other)]
    if endings[0][0] and endings[0] == endings[1] and " " not in endings[0][1]:
        return True
    if one.strip().isdigit() and other.strip().isdigit():
        return True
    return len(one) == len(other) >= MIN_ID_CHARACTERS and " " not in one.strip()


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
