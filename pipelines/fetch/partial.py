"""A file that is being received, which a later attempt or a later run may continue."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO

from pipelines.common import storage
from pipelines.fetch.failures import PassingError

WORTH_RESUMING_BYTES = 1024**2
"""Size from which a file is continued by a later run. Smaller ones are fetched anew."""
READ_BYTES = 1024**2


class Partial:
    """An unfinished file, with what is needed to continue it.

    The version of the file on the server (ETag or date) and its length are in a small file beside
    it. Without them, the bytes are useless to a later run.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Use `open_partial`."""
        self.path = path
        self.size = 0
        self.validator: str | None = None
        self.total: int | None = None
        self._file = file
        self._sha256 = hashlib.sha256()

    @property
    def _facts(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    def _read_back(self) -> None:
        """Take up what an earlier run has left."""
        if not self._facts.exists():
            self.restart(None, None)
            return
        try:
            facts = json.loads(self._facts.read_bytes())
            validator, total = facts["validator"], facts["total"]
        except (ValueError, KeyError):  # written when the machine stopped
            self.restart(None, None)
            return
        while chunk := self._file.read(READ_BYTES):
            self._sha256.update(chunk)
            self.size += len(chunk)
        self.validator, self.total = validator, total

    def head(self, count: int) -> bytes:
        """Return the first bytes."""
        return os.pread(self._file.fileno(), count, 0)

    def write(self, data: bytes) -> None:
        """Append bytes."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._sha256.update(data)
        self.size += len(data)

    def restart(self, validator: str | None, total: int | None) -> None:
        """Begin anew with another version of the file on the server.

        Args:
            validator: ETag or date of the version; None if it cannot be continued.
            total: Its length in bytes, if it is known.
        """
        self._file.seek(0)
        self._file.truncate()
        self._sha256 = hashlib.sha256()
        self.size, self.validator, self.total = 0, validator, total
        if validator is not None and (total is None or total > WORTH_RESUMING_BYTES):
            self._facts.write_text(json.dumps({"validator": validator, "total": total}))
        else:
            self._facts.unlink(missing_ok=True)

    def sha256(self) -> str:
        """Return the hexadecimal SHA-256 of the bytes so far."""
        return self._sha256.hexdigest()

    async def move_to(self, uri: str) -> None:
        """Move the complete file to its place."""
        self._file.flush()
        size = os.fstat(self._file.fileno()).st_size
        assert size == self.size, f"{self.path} has {size} bytes instead of {self.size}"
        await asyncio.to_thread(storage.move_file, self.path, uri)
        self._facts.unlink(missing_ok=True)

    def close(self, keep: bool) -> None:
        """Close the file.

        Args:
            keep: Whether a later run may continue it.
        """
        self._file.close()
        if not keep or self.size == 0 or not self._facts.exists():
            self.path.unlink(missing_ok=True)
            self._facts.unlink(missing_ok=True)


async def open_partial(folder: Path, key: str) -> Partial:
    """Open the unfinished file of a URL, or begin one.

    Raises:
        PassingError: Another process is writing it, such as one of a run that was killed just now.
    """
    path = folder / key
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Until the lock was obtained, the other process may have moved or removed the file.
        is_ours = os.path.samestat(os.fstat(file.fileno()), os.stat(path))  # noqa: PTH116
    except (BlockingIOError, FileNotFoundError):
        is_ours = False
    if not is_ours:
        file.close()
        raise PassingError("unavailable", "a process of an earlier run is still writing the file")
    partial = Partial(path, file)  # type: ignore[arg-type]
    try:
        if os.fstat(file.fileno()).st_size:
            await asyncio.to_thread(partial._read_back)
    except BaseException:
        file.close()
        raise
    return partial
