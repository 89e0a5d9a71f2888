"""Shards on the disk of a node, shared by the data workers there.

The order of a training deals the clips of a shard out over all data workers, and Parquet gives no
single rows: without this, each worker would fetch, decode and hold every shard for the few clips
that it needs of it. Here the first worker that needs a shard writes it as an Arrow file, which all
map into their memory: one fetch and one copy a node, whatever the number of workers.

Layout of the folder, of which any file may be deleted at any time:
    <key>.arrow     a shard, named by its checksum
    <nn>.lock       held by whoever writes one of the shards that fall to it
"""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from filelock import FileLock, Timeout

from pipelines.common.ray_errors import disk_is_full
from pipelines.feed.config import DEFAULT_CACHE_BYTES
from stgt.errors import STGTError

logger = logging.getLogger(__name__)

"""A dozen shards of the usual size; those in use at a time are a few."""
LOCKS = 64
"""Files that locks are taken on: as many as shards would leave as many behind."""
STALE_S = 3600.0
"""Age at which a file that was left half-written is deleted."""

Load = Callable[[], pa.Table]


class ShardCache:
    """Tables by key, on the local disk."""

    def __init__(
        self, folder: str | Path | None = None, most_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        """Set up the cache.

        Args:
            folder: where it lies; None for this user's folder among the temporary files.
            most_bytes: the least recently used shards go when there are more.
        """
        self._place = Path(folder) if folder is not None else _default_folder()
        self.most_bytes = most_bytes

    @functools.cached_property
    def folder(self) -> Path:
        """The folder, made when it is first needed.

        Not with the cache: of an error in an actor's constructor Ray keeps the words alone, and
        tries again.

        Raises:
            STGTError: it cannot be used.
        """
        folder = self._place
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = folder.stat().st_uid
        except OSError as error:
            raise STGTError(
                f"the cache of shards cannot be made at {folder}: {error.strerror}; give another "
                "--cache-dir"
            ) from error
        # Whoever owns the folder decides what is trained on.
        if owner != os.getuid():
            raise STGTError(
                f"the cache of shards at {folder} belongs to another user; give another --cache-dir"
            )
        return folder

    def table(self, key: str, load: Load) -> pa.Table:
        """A shard, mapped into memory.

        Args:
            key: names its content.
            load: gives the shard where the cache does not have it.

        Raises:
            STGTError: there is no space for it, or the folder cannot be used.
        """
        found = self._open(key)
        if found is None:
            with self._lock(key):
                # It may have come while this process waited.
                found = self._open(key) or self._write(key, load())
        return found

    def prepare(self, key: str, load: Load) -> None:
        """Have a shard ready that is needed soon, unless another process is at it."""
        if self._path(key).exists():
            return
        try:
            with self._lock(key).acquire(blocking=False):
                if not self._path(key).exists():
                    self._write(key, load())
        except Timeout:
            return  # the other process will have it ready

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.arrow"

    def _lock(self, key: str) -> FileLock:
        # Of this call alone: threads of one process must exclude each other as well.
        place = zlib.crc32(key.encode()) % LOCKS
        return FileLock(self.folder / f"{place:02d}.lock", thread_local=False)

    def _open(self, key: str) -> pa.Table | None:
        """A shard that is there; one that a lost machine left damaged is none."""
        path = self._path(key)
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            os.utime(path)  # it is in use
        except FileNotFoundError:
            return None
        except pa.ArrowInvalid:
            logger.warning("%s is damaged and is made again", path)
            return None
        return table

    def _write(self, key: str, table: pa.Table) -> pa.Table:
        temporary = self.folder / f".{key}.{uuid.uuid4().hex}.tmp"
        try:
            with (
                pa.OSFile(str(temporary), "wb") as file,
                pa.ipc.new_file(file, table.schema) as out,
            ):
                out.write_table(table)
            # Opened before another process can delete it to make room.
            mapped = pa.ipc.open_file(pa.memory_map(str(temporary))).read_all()
            temporary.replace(self._path(key))
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if not disk_is_full(error):
                raise
            raise STGTError(
                f"no space for a shard of {table.nbytes / 1e6:.0f} MB in the cache at "
                f"{self.folder}; free some, or give another --cache-dir"
            ) from error
        self._make_room(self._path(key))
        return mapped

    def _make_room(self, newest: Path) -> None:
        """Delete what was not used for longest; who has it mapped keeps it."""
        files = []
        for path in self.folder.iterdir():
            try:
                facts = path.stat()
            except FileNotFoundError:
                continue  # another process makes room as well
            files.append((facts.st_mtime, facts.st_size, path))
        now = max(modified for modified, _, _ in files)
        for modified, _, path in files:
            if path.suffix == ".tmp" and now - modified > STALE_S:
                path.unlink(missing_ok=True)
        shards = sorted(one for one in files if one[2].suffix == ".arrow")
        total = sum(size for _, size, _ in shards)
        for _, size, path in shards:
            if total <= self.most_bytes:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size


def _default_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"stgt-shards-{os.getuid()}"
