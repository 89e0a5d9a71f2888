"""Reads annotation files: text, tables, streamed JSON, and pickles of plain values.

Files may be compressed (.gz, .bz2, .xz) or members of a zip archive. A row that cannot be read is
yielded as an `Unreadable`, which `require` turns into the reason of a rejected row, so it costs
only itself.
"""

from __future__ import annotations

import bz2
import collections
import csv
import difflib
import gzip
import html
import io
import json
import lzma
import pickle
import re
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import ijson

from pipelines.common import storage
from pipelines.manifest.formats.values import is_null, required_id
from stgt.errors import ManifestError
from stgt.inputs.caption_text import clean_caption

EMPTY = "caption is empty after cleaning"
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DATA_EXTENSIONS = frozenset(
    ["csv", "tsv", "json", "jsonl", "ndjson", "txt", "pkl", "pickle", "parquet", "arrow", "feather"]
)
"""Extensions of the members of a zip archive that are read, also if they are compressed."""
NOT_DATA = re.compile(r"(?i)(readme|license|licence|notice|changelog)\b")
DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe"}
MAX_RECORD_LINES = 1000
"""Lines after which a quoted field counts as unclosed."""
MIN_ID_CHARACTERS = 8
BYTE_ORDER_MARK = "\ufeff"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
SCANNED_BYTES = 1 << 20
MAX_DECODINGS = 3
JSON_BUFFER_BYTES = 1 << 16

_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_CONSTANT = re.compile(rb"[:,\[]\s*(?:NaN|-?Infinity)\s*[,}\]]")
_JSON_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*(?:(?P<closed>")|\\?\Z)|NaN|-?Infinity', re.DOTALL)
_JSON_REST = re.compile(rb"(?:N|Na|-|-?I[nfity]*)\Z")

csv.field_size_limit(2**31 - 1)  # captions, transcripts and lists of clips can be long


class AnnotationFile(str):
    """URI of an annotation file that is read from elsewhere: from an archive or a local copy."""

    path: Path | None = None
    """Local copy of a remote file."""
    archive: zipfile.ZipFile | None = None
    """Archive that contains the file; the URI then ends with the name of the member."""
    member: str = ""


@dataclass(frozen=True)
class Unreadable:
    """A row that cannot be read."""

    reason: str


def prepare(uris: Sequence[str], scratch: Path) -> tuple[str, ...]:
    """Return annotation files: zip archives replaced by their members, and remote files fetched.

    Args:
        uris: Annotation files.
        scratch: Folder for local copies of remote files.

    Raises:
        ManifestError: A remote file or an archive is missing, or an archive is damaged or contains
            no annotation file.
    """
    found: list[str] = []
    for number, uri in enumerate(uris):
        file = AnnotationFile(uri)
        if storage.is_remote(uri):
            file.path = scratch / f"{number}"
            with _named_if_missing(uri):
                storage.fetch_file(uri, file.path)
        if uri.lower().endswith(".zip"):
            found += _members(uri, file.path or Path(uri))
        else:
            found.append(file)
    return tuple(found)


def _members(uri: str, path: Path) -> Iterator[AnnotationFile]:
    try:
        with _named_if_missing(uri):
            archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ManifestError(f"{uri} is not a valid zip archive: {error}") from error
    names = sorted(name for name in archive.namelist() if _is_data(name))
    if not names:
        inside = ", ".join(archive.namelist()[:3]) or "nothing"
        raise ManifestError(
            f"{uri} contains no annotation file (found: {inside}); extract it and give the "
            "annotation file itself"
        )
    for name in names:
        file = AnnotationFile(f"{uri}/{name}")
        file.archive, file.member = archive, name
        yield file


@contextmanager
def _named_if_missing(uri: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ManifestError(f"annotation file {uri} does not exist; check the path") from error


def _is_data(name: str) -> bool:
    parts = name.split("/")
    if any(part.startswith((".", "__MACOSX")) for part in parts) or NOT_DATA.match(parts[-1]):
        return False
    return extension(name) in DATA_EXTENSIONS


def extension(uri: str) -> str:
    """Return the extension of an annotation file in lower case, without that of a compression."""
    name = storage.name_of(uri).lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return name.rpartition(".")[2]


@contextmanager
def open_binary(uri: str) -> Iterator[BinaryIO]:
    """Open an annotation file as bytes, decompressed.

    Raises:
        ManifestError: The file does not exist, or its compressed data is damaged or encrypted.
    """
    try:
        with _named_if_missing(uri), _opened(uri) as file, _decompressed(uri, file) as binary:
            yield binary
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise ManifestError(f"{uri} is damaged: {error}; fetch or compress it again") from error


@contextmanager
def _opened(uri: str) -> Iterator[Any]:
    if isinstance(uri, AnnotationFile) and uri.archive is not None:
        try:
            file = uri.archive.open(uri.member)
        except (RuntimeError, NotImplementedError) as error:
            raise ManifestError(f"{uri} cannot be read: {error}; extract the archive") from error
        with file:
            yield file
    elif isinstance(uri, AnnotationFile) and uri.path is not None:
        with uri.path.open("rb") as file:
            yield file
    else:
        with storage.as_local(uri) as path, path.open("rb") as file:
            yield file


@contextmanager
def _decompressed(uri: str, file: Any) -> Iterator[BinaryIO]:
    for ending, opened in COMPRESSED.items():
        if uri.lower().endswith(ending):
            with opened(file, "rb") as binary:
                yield cast("BinaryIO", binary)
            return
    yield file


@contextmanager
def open_text(uri: str) -> Iterator[io.TextIOWrapper]:
    """Open an annotation file as UTF-8 text, with or without a byte order mark.

    Bytes that are not UTF-8 become lone surrogates, so that they cost only their line.

    Raises:
        ManifestError: The file does not exist or is UTF-16.
    """
    with open_binary(uri) as binary:
        buffered = io.BufferedReader(cast("io.RawIOBase", binary))
        if buffered.peek(2)[:2] in UTF16_MARKS:
            raise ManifestError(f"{uri} is UTF-16 text; convert it to UTF-8")
        yield io.TextIOWrapper(buffered, "utf-8-sig", "surrogateescape", newline="")


def decode_entities(text: str) -> str:
    """Decode the HTML entities of a caption, such as `&amp;` and `&#39;`, also if encoded twice.

    Only entities that end with a semicolon are decoded, so `R&D` and `a&b` stay as they are.
    """
    if "&" not in text:
        return text
    for _ in range(MAX_DECODINGS):
        decoded = _ENTITY.sub(lambda match: html.unescape(match.group()), text)
        decoded = decoded.replace("\xa0", " ")
        if decoded == text:
            break
        text = decoded
    return text


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
    with open_text(uri) as text:
        source = _Lines(text)
        header = next((line for line in source if line.strip()), "")
        if _NOT_UTF8.search(header):
            raise ManifestError(f"{uri} line {source.number} is not UTF-8 text; convert the file")
        delimiter = _delimiter(uri, header, required)
        if header:
            source.give_back(header)
        source.record.clear()
        names = next(csv.reader(source, delimiter=delimiter), [])
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


def _fields(count: int) -> str:
    return "1 field" if count == 1 else f"{count} fields"


def _delimiter(uri: str, header: str, required: tuple[str, ...]) -> str:
    """Return the first delimiter that gives the header all required columns."""
    first = "\t" if extension(uri) == "tsv" else ","
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
        elif not text.isascii() and _NOT_UTF8.search(text):
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


def lines(uri: str) -> Iterator[tuple[int, str | Unreadable]]:
    """Yield the number and text of each line that is not blank, without the line ending."""
    with open_text(uri) as text:
        for number, line in enumerate(text, start=1):
            line = line.removeprefix(BYTE_ORDER_MARK).strip("\r\n")
            if not line.strip():
                continue
            if not line.isascii() and _NOT_UTF8.search(line):
                yield number, Unreadable(f"line {number} is not UTF-8 text")
            elif "\0" in line:
                yield number, Unreadable(f"line {number} contains a NUL character")
            else:
                yield number, line


def json_lines(uri: str) -> Iterator[tuple[int, Any]]:
    """Yield the number and value of each line of a JSON lines file; NaN is null."""
    for number, line in lines(uri):
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
    if prefix == "item" and (first := first_character(uri)) != "[":
        holds = "nothing" if not first else "an object" if first == "{" else f"{first!r}..."
        raise ManifestError(f"{uri} contains {holds}, but this format requires a JSON list")
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
    with open_text(uri) as text:
        try:
            return _DECODER.decode(text.read())
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"{uri} is not valid UTF-8 JSON: {error}") from error


@dataclass
class _Place:
    """What was read last, for error messages."""

    after: str = "the beginning"


@contextmanager
def _json(uri: str) -> Iterator[tuple[Any, _Place]]:
    place = _Place()
    has_constants = _has_constants(uri)
    with open_binary(uri) as binary:
        mark = binary.read(3)
        if mark[:2] in UTF16_MARKS:
            raise ManifestError(f"{uri} is UTF-16 text; convert it to UTF-8")
        start = mark.removeprefix(BYTE_ORDER_MARK.encode())
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
    with open_binary(uri) as binary:
        end = b""
        while data := binary.read(SCANNED_BYTES):
            data = end + data
            if (b"NaN" in data or b"Infinity" in data) and _CONSTANT.search(data):
                return True
            end = data[-64:]
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
    """Return the usable captions of a field with one caption or a list of captions.

    Captions are stripped, and their HTML entities are decoded.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        return []
    stripped = [decode_entities(text).strip() for text in texts if isinstance(text, str)]
    return [text for text in stripped if text.lower() != "nan" and clean_caption(text)]


def require(row: Any, fields: tuple[str, ...], ids: tuple[str, ...] = ()) -> str | None:
    """Return why a row is unusable because of its fields, or None if it has all of them.

    Args:
        row: The row.
        fields: Names of fields that must not be missing or empty.
        ids: Names of those fields that must be ids: texts or numbers.
    """
    if isinstance(row, Unreadable):
        return row.reason
    if not isinstance(row, dict):
        return f"expected an object with {', '.join(fields)}, got {type(row).__name__}"
    empty = [name for name in fields if is_null(row.get(name))]
    if empty:
        return f"{', '.join(empty)} is missing or empty"
    try:
        for name in ids:
            required_id(row[name], name)
    except ValueError as error:
        return str(error)
    return None
