"""Tar archives for tests, also with members that no careful program writes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

Entry = bytes | str | tarfile.TarInfo
"""Contents of a member, or its whole header if it has no contents."""


def write_tar(
    path: Path, entries: Mapping[str, Entry], form: int = tarfile.GNU_FORMAT, end: bool = True
) -> Path:
    """Write an archive with members in the given order; without `end`, its end mark is missing."""
    with tarfile.open(path, "w", format=form, errors="surrogateescape") as archive:
        for name, entry in entries.items():
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
                continue
            data = entry.encode() if isinstance(entry, str) else entry
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        used = archive.offset
    if not end:
        with path.open("r+b") as file:
            file.truncate(used)
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    """The header of a link or, by its kind, of a device."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info
