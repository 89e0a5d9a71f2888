"""Opens annotation files, which may be compressed or members of a zip archive, local or remote."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from pipelines.common import storage
from stgt.errors import ManifestError

COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DATA_EXTENSIONS = frozenset(
    ["csv", "tsv", "json", "jsonl", "ndjson", "txt", "pkl", "pickle", "parquet", "arrow", "feather"]
)
"""Extensions of the members of a zip archive that are read, also if they are compressed."""
NOT_DATA = re.compile(r"(?i)(readme|license|licence|notice|changelog)\b")
"""Names of members that only describe the others."""
BYTE_ORDER_MARK = "\ufeff"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What `open_text` gives for bytes that are not UTF-8."""


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


def lines(uri: str) -> Iterator[tuple[int, str | Unreadable]]:
    """Yield the number and text of each line that is not blank, without the line ending."""
    with open_text(uri) as text:
        for number, line in enumerate(text, start=1):
            line = line.removeprefix(BYTE_ORDER_MARK).strip("\r\n")
            if not line.strip():
                continue
            if not line.isascii() and NOT_UTF8.search(line):
                yield number, Unreadable(f"line {number} is not UTF-8 text")
            elif "\0" in line:
                yield number, Unreadable(f"line {number} contains a NUL character")
            else:
                yield number, line


def first_character(uri: str) -> str:
    """Return the first nonblank character, which distinguishes a JSON list from an object."""
    with open_text(uri) as text:
        while character := text.read(1):
            if not character.isspace():
                return character
    return ""
