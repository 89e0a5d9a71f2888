"""A file that is being received, which a later attempt or a later run may continue."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import re
from collections.abc import Callable
from io import FileIO
from pathlib import Path

from pipelines.common import storage
from pipelines.fetch.checksums import READ_BYTES, new_checksum
from pipelines.fetch.config import ChecksumName
from pipelines.fetch.content import HEAD_BYTES
from pipelines.fetch.failures import PassingError
from stgt.errors import STGTError

WORTH_RESUMING_BYTES = 1024**2
"""Size from which a file is continued by a later attempt. Smaller ones are fetched anew."""
WORTH_RESUMING_S = 0.25
"""Time after which what is needed to continue a transfer is written down, in seconds. Most files of
a fast server are complete before, and writing it takes as long as receiving a tenth of a MB."""
KEY = re.compile("[0-9a-f]{32}")
"""Names of unfinished files, which are the keys of their URLs."""
FACTS = ".json"
"""Ending of the name of the file beside an unfinished one."""


class Partial:
    """An unfinished file, with what is needed to continue it.

    The version of the file on the server (ETag or date) and its length are in a small file beside
    it. Without them, the bytes are useless to a later attempt.
    """

    def __init__(self, path: str, file: FileIO, checksum: ChecksumName) -> None:
        """Use `open_partial`."""
        self.path = path
        self.size = 0
        self.head = b""
        """The first bytes, up to `HEAD_BYTES`."""
        self.validator: str | None = None
        self.total: int | None = None
        self._file = file
        self._checksum_name: ChecksumName = checksum
        self._checksum = new_checksum(checksum)
        self._facts = Path(f"{path}{FACTS}")
        self._has_facts = True
        """Whether there may be a file beside it, as an earlier run may have left it."""
        self._facts_due: asyncio.TimerHandle | None = None
        """Writes it, unless the file is complete before."""
        self._facts_error: OSError | None = None
        self._is_moved = False

    def read_back(self) -> None:
        """Take up what an earlier attempt has left."""
        try:
            facts = json.loads(self._facts.read_bytes())
            validator, total = facts["validator"], facts["total"]
        except FileNotFoundError:
            self.restart(None, None)
            return
        except (ValueError, TypeError, KeyError):  # written when the machine stopped
            self.restart(None, None)
            return
        while chunk := self._file.read(READ_BYTES):
            self._add(chunk)
        self.validator, self.total = validator, total

    def _add(self, data: bytes) -> None:
        self._checksum.update(data)
        if self.size < HEAD_BYTES:
            self.head = (self.head + data[:HEAD_BYTES])[:HEAD_BYTES]
        self.size += len(data)

    def write(self, data: bytes) -> None:
        """Append bytes."""
        if self._facts_error is not None:
            raise self._facts_error
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._add(data)

    def restart(self, validator: str | None, total: int | None) -> None:
        """Begin anew with another version of the file on the server.

        Args:
            validator: ETag or date of the version; None if it cannot be continued.
            total: Its length in bytes, if it is known.
        """
        # Without conditions, since a process that was killed may have left any part of this.
        self._file.seek(0)
        self._file.truncate()
        self._checksum = new_checksum(self._checksum_name)
        self.size, self.head = 0, b""
        self.validator, self.total = validator, total
        if self._has_facts:
            self._facts.unlink(missing_ok=True)
            self._has_facts = False
        self._cancel_facts()
        if validator is not None and (total is None or total > WORTH_RESUMING_BYTES):
            # By a timer, not with the next bytes: a transfer may stall, and the process be killed.
            loop = asyncio.get_running_loop()
            self._facts_due = loop.call_later(WORTH_RESUMING_S, self._write_due_facts)

    def _cancel_facts(self) -> None:
        if self._facts_due is not None:
            self._facts_due.cancel()
            self._facts_due = None

    def _write_due_facts(self) -> None:
        try:
            self._write_facts()
        except OSError as error:  # nobody would catch it here; the next bytes raise it
            self._facts_error = error

    def _write_facts(self) -> None:
        """Write what a later run needs to continue the file."""
        self._cancel_facts()
        self._has_facts = True
        self._facts.write_text(json.dumps({"validator": self.validator, "total": self.total}))

    def checksum(self) -> str:
        """Return the checksum of the bytes so far, in hexadecimal digits."""
        return self._checksum.hexdigest()

    async def move_to(self, uri: str) -> None:
        """Move the complete file to its place."""
        size = os.fstat(self._file.fileno()).st_size
        assert size == self.size, f"{self.path} has {size} bytes instead of {self.size}"
        await asyncio.to_thread(storage.move_file, Path(self.path), uri)
        self._is_moved = True

    def close(self, keep: bool) -> None:
        """Close the file.

        Args:
            keep: Whether a later attempt may continue it.
        """
        is_kept = keep and not self._is_moved and self.size > 0 and self._facts_error is None
        try:
            if is_kept and self._facts_due is not None:
                self._write_facts()
            self._cancel_facts()
            is_kept = is_kept and self._has_facts
            if not self._is_moved and not is_kept:
                Path(self.path).unlink(missing_ok=True)
            if self._has_facts and not is_kept:
                self._facts.unlink(missing_ok=True)
        finally:
            self._file.close()  # last, because this lets another process take the file up


async def open_partial(folder: str, key: str, checksum: ChecksumName) -> Partial:
    """Open the unfinished file of a URL, or begin one.

    Args:
        folder: Folder of unfinished files.
        key: Name of the file.
        checksum: Algorithm of its checksum.

    Raises:
        PassingError: Another process is writing it, such as one of a run that was killed just now.
        STGTError: There is a link of this name, which may lead to any file.
    """
    path = f"{folder}/{key}"
    try:
        file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+")
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise STGTError(f"{path} is a symbolic link; remove it") from error
    size = 0
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Until the lock was obtained, the other process may have moved or removed the file.
        found = os.stat(path)  # noqa: PTH116
        size, is_ours = found.st_size, os.path.samestat(found, os.fstat(file.fileno()))
    except (BlockingIOError, FileNotFoundError):
        is_ours = False
    if not is_ours:
        file.close()
        raise PassingError("unavailable", "a process of an earlier run is still writing the file")
    partial = Partial(path, file, checksum)
    try:
        if size:
            await asyncio.to_thread(partial.read_back)
    except BaseException:
        file.close()
        raise
    return partial


def remove_unfinished(folder: Path, is_wanted: Callable[[str], bool]) -> None:
    """Remove the unfinished files that nobody is going to continue, unless they are being written.

    Args:
        folder: Folder of unfinished files, which need not exist.
        is_wanted: Tells from the key of a URL whether its file may still be continued.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    for key in sorted({name.removesuffix(FACTS) for name in names}):
        if not KEY.fullmatch(key) or is_wanted(key):
            continue
        path = folder / key
        if key in names:
            try:
                file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            except OSError:  # it is gone, or nothing that this job has written
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except BlockingIOError:
                continue  # a worker of a run that was killed is still writing it
            finally:
                os.close(file)
        Path(f"{path}{FACTS}").unlink(missing_ok=True)
