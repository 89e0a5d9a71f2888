"""Folders of files on a node's local disk, shared by processes and bounded in size.

A file appears under its name only when it is complete, and any file may be deleted at any time.
Loads nothing outside the standard library, because decoder child processes load it.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path

from pipelines.common.private_folder import ForeignFolderError, make_private_folder

TEMPORARY = ".tmp"
STALE_S = 3600.0
"""Age at which a partially written file is deleted, in seconds. A process that was killed left
it."""


def default_folder() -> Path:
    """Return the folder for shared videos: one of this user, for temporary files."""
    return Path(tempfile.gettempdir()) / f"stgt-videos-{os.getuid()}"


def make_folder(folder: Path) -> Path:
    """Create a folder that only this user can read, and return it.

    Raises:
        PermissionError: The folder belongs to another user, who could replace its files.
        OSError: The folder cannot be created.
    """
    try:
        return make_private_folder(folder, may_be_link=True)
    except ForeignFolderError as error:
        raise PermissionError(
            f"the folder for shared videos cannot be used: {error}; set TMPDIR to another folder"
        ) from error


def temporary_name(folder: Path) -> Path:
    """Return a name for a file that is being written, in the folder that it belongs to."""
    return folder / f".{uuid.uuid4().hex}{TEMPORARY}"


def is_full(error: Exception) -> bool:
    """Return whether an error says that the disk or the user's share of it is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def make_room(folder: Path, suffix: str, most_bytes: int, needed_bytes: int = 0) -> None:
    """Delete the least recently used files of a folder until a new one fits.

    The files also take no more than half of the disk space that is left without them.

    Args:
        folder: the folder.
        suffix: ending of the files that may be deleted.
        most_bytes: maximum size of these files together, with the new one.
        needed_bytes: size of the new file.
    """
    files = _files(folder, suffix)
    total = sum(size for _, size, _ in files)
    allowed = _allowed_bytes(folder, total, most_bytes) - needed_bytes
    for _, size, path in sorted(files):
        if total <= allowed:
            return
        path.unlink(missing_ok=True)
        total -= size


def has_room(folder: Path, suffix: str, most_bytes: int, needed_bytes: int) -> bool:
    """Return whether `make_room` could make room for a file, by deleting all others if need be."""
    total = sum(size for _, size, _ in _files(folder, suffix))
    return needed_bytes <= _allowed_bytes(folder, total, most_bytes)


def _files(folder: Path, suffix: str) -> list[tuple[float, int, Path]]:
    """Return the time of last use, the size and the path of files with a suffix."""
    files = []
    for path in folder.iterdir():
        try:
            facts = path.stat()
        except FileNotFoundError:
            continue  # another process has just deleted it
        if path.suffix == TEMPORARY and time.time() - facts.st_mtime > STALE_S:
            path.unlink(missing_ok=True)
        elif path.suffix == suffix:
            files.append((facts.st_mtime, facts.st_size, path))
    return files


def _allowed_bytes(folder: Path, used_bytes: int, most_bytes: int) -> int:
    return min(most_bytes, (shutil.disk_usage(folder).free + used_bytes) // 2)


def mark_used(path: Path) -> None:
    """Mark a file as recently used, unless it was deleted in the meantime."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return
