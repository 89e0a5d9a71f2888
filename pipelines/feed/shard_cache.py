"""Caches shards on a node's local disk, shared by its data workers.

The clips of a shard are spread over all data workers, and Parquet cannot read single rows. Without
a cache, each worker would fetch, decode and keep every shard for only a few of its clips. Instead,
the first worker that needs a shard writes it as an Arrow file, and all workers of the node map that
file into memory.

Layout of the folder, in which any file may be deleted at any time:
    <key>.arrow     a shard, named by its checksum
    <nn>.lock       lock for writing the shards that are assigned to it by a hash of their key
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

from pipelines.common.private_folder import ForeignFolderError, make_private_folder
from pipelines.common.ray_errors import disk_is_full
from pipelines.feed.config import DEFAULT_CACHE_BYTES
from stgt.errors import STGTError

logger = logging.getLogger(__name__)

LOCKS = 64
"""Number of lock files. One per shard would leave too many files behind."""
STALE_S = 3600.0
"""Age at which a partially written file is deleted, in seconds."""

Load = Callable[[], pa.Table]
Fetch = Callable[[Path], None]
"""Writes an Arrow file to a local path."""


class ShardCache:
    """A cache of tables by key on the local disk."""

    def __init__(
        self, folder: str | Path | None = None, most_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        """Set up the cache.

        Args:
            folder: folder of the cache; None uses a folder of this user for temporary files.
            most_bytes: maximum size; the least recently used shards are deleted beyond it.
        """
        self._place = Path(folder) if folder is not None else _default_folder()
        self.most_bytes = most_bytes

    @functools.cached_property
    def folder(self) -> Path:
        """Folder of the cache, created on first use.

        It is not created in the constructor, because Ray keeps only the message of an error in an
        actor's constructor and retries it.

        Raises:
            STGTError: The folder cannot be created or belongs to another user.
        """
        try:
            return make_private_folder(self._place, may_be_link=True)
        except ForeignFolderError as error:  # the owner of the folder controls the training data
            raise STGTError(
                f"the shard cache cannot be used: {error}; give another --cache-dir"
            ) from error
        except OSError as error:
            raise STGTError(
                f"cannot create the shard cache at {self._place}: {error.strerror}; give another "
                "--cache-dir"
            ) from error

    def table(self, key: str, load: Load) -> pa.Table:
        """Return a shard, mapped into memory.

        Args:
            key: identifies the contents of the shard.
            load: loads the shard if it is not in the cache.

        Raises:
            STGTError: There is no space for the shard, or the folder cannot be used.
        """
        found = self._open(key)
        if found is None:
            with self._lock(key):
                # Another process may have written it while this one waited.
                found = self._open(key) or self._write(key, load())
        return found

    def file(self, key: str, fetch: Fetch, size_bytes: int) -> pa.MemoryMappedFile:
        """Return an Arrow file, mapped into memory, without reading it.

        Args:
            key: identifies the contents of the file.
            fetch: writes the file if it is not in the cache.
            size_bytes: its size.

        Raises:
            STGTError: There is no space for the file, or the folder cannot be used.
        """
        found = self._map(key)
        if found is None:
            with self._lock(key):
                # Another process may have written it while this one waited.
                found = self._map(key) or self._add(key, fetch, size_bytes)
        return found

    def prepare_file(self, key: str, fetch: Fetch, size_bytes: int) -> None:
        """Put a file into the cache before it is needed, unless another process is doing so."""
        self._prepare(key, lambda: self._add(key, fetch, size_bytes))

    def prepare(self, key: str, load: Load) -> None:
        """Put a shard into the cache before it is needed, unless another process is doing so."""
        self._prepare(key, lambda: self._write(key, load()))

    def _prepare(self, key: str, add: Callable[[], object]) -> None:
        if self._path(key).exists():
            return
        try:
            with self._lock(key).acquire(blocking=False):
                if not self._path(key).exists():
                    add()
        except Timeout:
            return  # another process is writing it

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.arrow"

    def _lock(self, key: str) -> FileLock:
        # Each call has its own lock object, so that threads of a process also exclude each other.
        place = zlib.crc32(key.encode()) % LOCKS
        return FileLock(self.folder / f"{place:02d}.lock", thread_local=False)

    def _open(self, key: str) -> pa.Table | None:
        """Open a cached shard; return None if it does not exist or is damaged."""
        found = self._map(key)
        return None if found is None else pa.ipc.open_file(found).read_all()

    def _map(self, key: str) -> pa.MemoryMappedFile | None:
        """Map a cached file; return None if it does not exist or is damaged."""
        path = self._path(key)
        try:
            mapped = pa.memory_map(str(path))
            pa.ipc.open_file(mapped)
            os.utime(path)  # marks it as recently used
        except FileNotFoundError:
            return None
        except pa.ArrowInvalid:
            logger.warning("%s is damaged and will be recreated", path)
            return None
        return mapped

    def _write(self, key: str, table: pa.Table) -> pa.Table:
        def write(path: Path) -> None:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
                out.write_table(table)

        return pa.ipc.open_file(self._add(key, write, table.nbytes)).read_all()

    def _add(self, key: str, write: Fetch, size_bytes: int) -> pa.MemoryMappedFile:
        temporary = self.folder / f".{key}.{uuid.uuid4().hex}.tmp"
        try:
            write(temporary)
            # Open it before it gets its final name, under which another process could delete it.
            mapped = pa.memory_map(str(temporary))
            temporary.replace(self._path(key))
        except (OSError, STGTError) as error:
            temporary.unlink(missing_ok=True)
            if not disk_is_full(error):
                raise
            raise STGTError(
                f"no space for a shard of {size_bytes / 1e6:.0f} MB in the cache at "
                f"{self.folder}; free some disk space, or give another --cache-dir"
            ) from error
        self._make_room(self._path(key))
        return mapped

    def _make_room(self, newest: Path) -> None:
        """Delete the least recently used shards; a process that has mapped one can still use it."""
        files = []
        for path in self.folder.iterdir():
            try:
                facts = path.stat()
            except FileNotFoundError:
                continue  # another process has just deleted it
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
