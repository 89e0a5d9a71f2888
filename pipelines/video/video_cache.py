"""Keeps fetched videos on a node's local disk, shared by its decoding workers.

Many clips may come from one video, and workers meet them in any order. The first process that needs
a video fetches it, while others wait for it. Videos are known by their URI, size and version (ETag
or time), so a changed object is fetched again.

Layout of the folder, in which any file may be deleted at any time:
    <key>.video     a video
    <nn>.lock       lock for fetching the videos that are assigned to it by their key
    indexes/        indexes of long videos, and tables of the members of tar archives; see
                    `index_cache` and `tar_members`
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from pipelines.common import storage
from pipelines.video import disk_cache
from pipelines.video.config import DEFAULT_VIDEO_CACHE_BYTES

LOCKS = 256
"""Number of lock files. One per video would leave too many files behind."""
SCAN_SHARE = 1 / 256
"""Share of the maximum size that a process may fetch before it looks at all files of the cache."""
SUFFIX = ".video"
INDEXES = "indexes"


class TooLargeError(Exception):
    """A video exceeds the size limit."""


@dataclass(frozen=True)
class OpenVideo:
    """A fetched video that stays readable until it is closed, even if its name is deleted."""

    descriptor: int
    identity: str
    """Text that changes whenever the contents of the video change."""

    @property
    def path(self) -> str:
        """Path at which this process and its children can open the video."""
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"

    def close(self) -> None:
        """Close the video; its disk space is freed if its name was deleted."""
        os.close(self.descriptor)


@dataclass(frozen=True)
class Facts:
    """What is known of a remote file without fetching it."""

    identity: str
    """Text that changes whenever the contents of the file change."""
    size_bytes: int

    @property
    def key(self) -> str:
        """Name of the file in the cache, in hexadecimal digits."""
        return hashlib.sha256(self.identity.encode()).hexdigest()


class VideoCache:
    """Fetched videos by their URI and version."""

    def __init__(
        self, folder: str | Path | None = None, most_bytes: int = DEFAULT_VIDEO_CACHE_BYTES
    ) -> None:
        """Set up the cache. Its folder is created on first use.

        Args:
            folder: folder of the cache; None uses a folder of this user for temporary files.
            most_bytes: maximum size; the least recently used videos are deleted beyond it.
        """
        self._place = Path(folder) if folder is not None else disk_cache.default_folder()
        self._most_bytes = most_bytes
        self._counting = threading.Lock()
        self._new_bytes = math.inf  # the first video looks at all files

    @functools.cached_property
    def folder(self) -> Path:
        """Folder of the cache, which exists."""
        return disk_cache.make_folder(self._place)

    @property
    def index_folder(self) -> Path:
        """Folder for the indexes of long videos."""
        return self._place / INDEXES

    @contextmanager
    def opened(self, uri: str, max_bytes: int) -> Iterator[OpenVideo]:
        """Provide a remote video, fetched if it is not there."""
        video = self.open(uri, max_bytes)
        try:
            yield video
        finally:
            video.close()

    def open(self, uri: str, max_bytes: int) -> OpenVideo:
        """Open a remote video, fetched if it is not there; close it after use.

        Raises:
            TooLargeError: It has more than max_bytes.
            OSError: It cannot be fetched or kept.
        """
        facts = self.facts(uri)
        if facts.size_bytes > max_bytes:
            raise TooLargeError(f"the file has {facts.size_bytes:,} bytes")
        video = self.find(facts)
        if video is not None:
            return video
        # Each call has its own lock object, so that threads of a process exclude each other.
        number = int(facts.key, 16) % LOCKS
        with FileLock(self.folder / f"{number:03d}.lock", thread_local=False):
            video = self.find(facts)
            if video is not None:
                return video
            return OpenVideo(self._fetch(uri, self._path(facts), facts.size_bytes), facts.identity)

    def facts(self, uri: str) -> Facts:
        """Return the size and the version of a remote file, with one request."""
        size_bytes, version = storage.size_and_version(uri)
        return Facts(f"{uri}|{size_bytes}|{version}", size_bytes)

    def find(self, facts: Facts) -> OpenVideo | None:
        """Open a file of the cache; close it after use. None if it is not there."""
        descriptor = _open(self._path(facts), facts.size_bytes)
        return None if descriptor is None else OpenVideo(descriptor, facts.identity)

    def _path(self, facts: Facts) -> Path:
        return self.folder / f"{facts.key}{SUFFIX}"

    def has_room(self, size_bytes: int) -> bool:
        """Return whether a file of a size fits into the cache at all."""
        return disk_cache.has_room(self.folder, SUFFIX, self._most_bytes, size_bytes)

    def clear(self) -> None:
        """Delete all videos, because the disk is full; those that are open stay readable."""
        disk_cache.make_room(self.folder, SUFFIX, most_bytes=0)

    def _make_room(self, size_bytes: int) -> None:
        """Make room for a video, without listing thousands of files for every short one."""
        with self._counting:
            self._new_bytes += size_bytes
            if self._new_bytes <= SCAN_SHARE * self._most_bytes:
                return
            self._new_bytes = 0
        disk_cache.make_room(self.folder, SUFFIX, self._most_bytes, size_bytes)

    def _fetch(self, uri: str, path: Path, size_bytes: int) -> int:
        self._make_room(size_bytes)
        temporary = disk_cache.temporary_name(self.folder)
        try:
            try:
                storage.fetch_file(uri, temporary)
            except OSError as error:
                if not disk_cache.is_full(error):
                    raise
                # Others have filled the disk, so all other videos leave the cache.
                temporary.unlink(missing_ok=True)
                self.clear()
                storage.fetch_file(uri, temporary)
            # Open it before it gets its final name, under which another process could delete it.
            descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
            fetched_bytes = os.fstat(descriptor).st_size
            if fetched_bytes != size_bytes:
                os.close(descriptor)
                raise OSError(
                    f"{fetched_bytes:,} bytes came instead of {size_bytes:,}; the file was "
                    "probably replaced while it was fetched"
                )
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return descriptor


def _open(path: Path, size_bytes: int) -> int | None:
    """Open a file and mark it as recently used; return None if it is not there or not whole."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size != size_bytes:
        # The machine stopped before the contents were on disk, which follow the name.
        os.close(descriptor)
        path.unlink(missing_ok=True)
        return None
    disk_cache.mark_used(path)
    return descriptor
