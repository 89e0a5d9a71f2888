"""Tar archives of videos: their members, and the URIs that name one.

`NAME.tar#MEMBER` names a member of an archive. A file that has exactly this name comes first.

An archive is read by its headers, without the contents of its members, and nothing is extracted.
Members whose contents cannot be read by their position are refused one by one. What an archive that
was cut short contains before its end is used.
"""

from __future__ import annotations

import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, cast

from pipelines.common import storage

ENDING = ".tar"
BLOCK_BYTES = 64 * 1024
"""Bytes that a request for a remote header fetches: mostly also texts beside the video."""
MOST_HEADER_BYTES = 1024**2
"""Largest extended header that is read. A damaged one may declare any size."""
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""First bytes of compressed files."""
COMPRESSED_ENDINGS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
COMPRESSED = (
    "the archive is compressed ({kind}), so its members cannot be read by their position; "
    "decompress it to a .tar file first"
)
_MARK = re.compile(r"(?i)\.tar#")


@dataclass(frozen=True)
class Member:
    """A regular file in an archive."""

    number: int
    """Its place among all members, counted from 1."""
    name: str
    """Its path, without `./` at the beginning."""
    start: int
    """Position of its contents in the archive, in bytes."""
    size_bytes: int


@dataclass(frozen=True)
class Refused:
    """A member that cannot be used, or a place after which the archive cannot be read."""

    number: int
    reason: str


class _HeaderReader:
    """A file for `tarfile` that does not read an extended header of an absurd size to memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self.tell, self.seek = file.tell, file.seek
        self._file = file

    def read(self, size: int = -1) -> bytes:
        """Read some bytes.

        Raises:
            tarfile.ReadError: A header declares an absurd size.
        """
        if not 0 <= size <= MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header declares a size of {size:,} bytes")
        return self._file.read(size)


def member_uri(tar: str, name: str) -> str:
    """Return the URI of a member of an archive."""
    return f"{tar}#{name}"


def archive_of(uri: str) -> str | None:
    """Return the archive that a URI refers to by its form alone; None if it names a file."""
    found = _MARK.search(uri)
    return None if found is None else uri[: found.end() - 1]


def split(uri: str) -> tuple[str, str] | None:
    """Return the archive and the member that a URI names; None if it names a file.

    A URI that has the form of a member is looked up, since files may have such names as well.
    """
    places = [
        (uri[: found.end() - 1], uri[found.end() :])
        for found in _MARK.finditer(uri)
        if found.end() < len(uri)
    ]
    if not places or _is_file(uri):
        return None
    if len(places) == 1:
        return places[0]
    return next((place for place in places if _is_file(place[0])), places[0])


def is_there(uri: str) -> bool:
    """Return whether a video's file exists, or the archive that it is a member of."""
    place = split(uri)
    return storage.exists(uri if place is None else place[0])


def _is_file(uri: str) -> bool:
    try:
        storage.size_and_version(uri)
    except storage.UnreachableError:
        raise
    except (OSError, ValueError):
        return False  # S3 may forbid to ask for a key that does not exist
    return True


def members(file: IO[bytes]) -> Iterator[Member | Refused]:
    """Yield the regular files of an archive in their order, and a reason for all that is refused.

    Directories are passed over. Of several members with one name, the first is used.

    Args:
        file: the archive; its position may change between two members.
    """
    end = file.seek(0, os.SEEK_END)
    if reason := why_no_archive(file):
        yield Refused(1, reason)
        return
    number = 0
    file.seek(0)
    if file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE):
        return  # the end mark at the beginning: an archive without members
    try:
        file.seek(0)
        with tarfile.open(
            fileobj=cast("IO[bytes]", _HeaderReader(file)),
            mode="r:",
            encoding="utf-8",
            errors="surrogateescape",
        ) as archive:
            seen: set[str] = set()
            position = -1
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # a kilobyte for each
                number += 1
                if info.size < 0 or info.offset_data <= position:
                    raise tarfile.ReadError("a header declares an impossible size")
                position = info.offset_data
                if info.isdir():
                    continue
                name = posixpath.normpath(info.name)
                if reason := _fault(info, name, seen):
                    yield Refused(number, f"{info.name!r}: {reason}")
                    continue
                if position + info.size > end:
                    yield Refused(
                        number,
                        f"the archive ends at byte {end:,}, in the middle of {name!r}; fetch it "
                        "again for what is missing",
                    )
                    return
                seen.add(name)
                yield Member(number, name, position, info.size)
            if reason := _bad_end(file, archive.offset, end):
                yield Refused(number + 1, reason)
    except (tarfile.TarError, ValueError, LookupError, OverflowError, EOFError) as error:
        yield _unreadable(number, str(error))
    except RecursionError:  # `tarfile` reads what follows an extended header by a call of itself
        yield _unreadable(number, "too many extended headers follow one another")


def _unreadable(number: int, reason: str) -> Refused:
    what = f"cannot be read after member {number}" if number else "is not a tar archive"
    return Refused(number + 1, f"the file {what} ({reason}); fetch it again")


def why_no_archive(file: IO[bytes]) -> str | None:
    """Return why a file is no archive by its first bytes: empty or compressed; None otherwise."""
    if file.seek(0, os.SEEK_END) == 0:
        return "the file is empty"
    file.seek(0)
    beginning = file.read(8)
    for magic, kind in COMPRESSIONS.items():
        if beginning.startswith(magic):
            return COMPRESSED.format(kind=kind)
    return None


def _fault(info: tarfile.TarInfo, name: str, seen: set[str]) -> str | None:
    """Return why a member cannot be used, or None if it can."""
    try:
        info.name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8 text"
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "its name points outside of the archive"
    if info.issym() or info.islnk():
        return f"it is a link to {info.linkname!r}"
    if not info.isreg():
        return "it is a device, a pipe or of another kind that is not a file"
    if info.issparse():
        return "it is stored with holes (a sparse file); create the archive without --sparse"
    if name == "." or "\0" in name:
        return "its name is not valid"
    if name in seen:
        return "an earlier member has the same name"
    return None


def _bad_end(file: IO[bytes], place: int, end: int) -> str | None:
    """Return what is wrong with the end of an archive, or None if it is two blocks of zeros."""
    file.seek(place)
    block = file.read(tarfile.BLOCKSIZE)
    if block == bytes(tarfile.BLOCKSIZE):
        return None
    if len(block) < tarfile.BLOCKSIZE:
        return (
            f"the archive ends at byte {end:,} without the mark of its end, so it was probably "
            "cut short; fetch it again for what may be missing"
        )
    return f"the header at byte {place:,} is damaged, so what follows cannot be read"
