"""Reads members of tar archives without extracting the archive.

The headers of an archive are read once and give the place of each member. A member's bytes are then
copied to an unnamed file, which decoders open like any other video. So they need not know archives,
and what is copied is gone when the file is closed.

A remote archive is fetched once per node. If it has left the cache since, because this is too small
for all archives, its members are fetched by their position, which is still known. So are those of
an archive that does not fit into the cache at all.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from pipelines.common import storage, tars
from pipelines.video import disk_cache
from pipelines.video.video_cache import OpenVideo, TooLargeError, VideoCache

logger = logging.getLogger(__name__)

Places = dict[str, tuple[int, int]]
"""Position and size of each member of an archive, in bytes, by its name."""

TABLES_IN_MEMORY = 32
MOST_BYTES = 256 * 1024**2
"""Maximum size of the tables on disk; those of some five million members."""
SUFFIX = ".members"
VERSION = 1
"""Increased whenever tables are made or stored differently."""
CHUNK_BYTES = 16 * 1024**2


@dataclass(frozen=True)
class RemoteArchive:
    """An archive of which only parts are fetched."""

    uri: str
    identity: str

    def close(self) -> None:
        """Do nothing: there is no connection."""


Archive = OpenVideo | RemoteArchive


class NoMemberError(FileNotFoundError):
    """An archive has no such member, or not one that can be used."""


class TarMembers:
    """Members of archives that are open, with tables of their places that a node shares."""

    def __init__(self, cache: VideoCache) -> None:
        """Set up the tables.

        Args:
            cache: keeps remote archives; tables and unnamed files are on its disk.
        """
        self._cache, self._tables = cache, cache.index_folder
        self._lock = threading.Lock()
        self._recent: OrderedDict[str, Places] = OrderedDict()

    def open_archive(self, uri: str) -> Archive:
        """Open an archive; close it after use.

        Raises:
            OSError: There is no such file, or it cannot be fetched.
        """
        if not storage.is_remote(uri):
            return _local(storage.resolve(uri))
        facts = self._cache.facts(uri)
        video = self._cache.find(facts)
        if video is not None:
            return video
        if self._is_known(facts.identity) or not self._cache.has_room(facts.size_bytes):
            return RemoteArchive(uri, facts.identity)
        return self._cache.open(uri, facts.size_bytes)

    def open(self, archive: Archive, name: str, max_bytes: int) -> OpenVideo:
        """Open a member of an archive; close it after use, also after the archive.

        Args:
            archive: the open archive.
            name: path of the member in the archive.
            max_bytes: largest member to open.

        Raises:
            NoMemberError: The archive has no such member.
            TooLargeError: The member has more than max_bytes.
            OSError: It cannot be copied.
        """
        place = self._places(archive).get(name)
        if place is None:
            raise NoMemberError("the archive has no such member that can be read")
        start, size_bytes = place
        if size_bytes > max_bytes:
            raise TooLargeError(f"the file has {size_bytes:,} bytes")
        identity = f"{archive.identity}|{name}|{start}|{size_bytes}"
        try:
            return OpenVideo(self._copied(archive, start, size_bytes), identity)
        except OSError as error:
            if not disk_cache.is_full(error):
                raise
            self._cache.clear()  # the archive stays readable, since it is open
            return OpenVideo(self._copied(archive, start, size_bytes), identity)

    def _copied(self, archive: Archive, start: int, size_bytes: int) -> int:
        """Copy a part of an archive to a file without a name, and return its descriptor."""
        with TemporaryFile(dir=self._cache.folder) as copy:
            _copy(archive, start, size_bytes, copy)
            return os.dup(copy.fileno())

    def _is_known(self, identity: str) -> bool:
        with self._lock:
            return identity in self._recent or self._path(identity).exists()

    def _places(self, archive: Archive) -> Places:
        with self._lock:
            found = self._recent.get(archive.identity)
            if found is None:
                found = self._load(archive.identity)
            if found is None:
                found = _read(archive)
                self._save(archive.identity, found)
            self._recent[archive.identity] = found
            self._recent.move_to_end(archive.identity)
            while len(self._recent) > TABLES_IN_MEMORY:
                self._recent.popitem(last=False)
            return found

    def _path(self, identity: str) -> Path:
        return self._tables / (sha256(f"{VERSION}{identity}".encode()).hexdigest() + SUFFIX)

    def _load(self, identity: str) -> Places | None:
        path = self._path(identity)
        try:
            told = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s is damaged and will be recreated: %s", path, error)
            return None
        disk_cache.mark_used(path)
        return {name: (start, size_bytes) for name, (start, size_bytes) in told.items()}

    def _save(self, identity: str, places: Places) -> None:
        """Write the table of an archive; a full disk only costs other processes the time."""
        try:
            folder = disk_cache.make_folder(self._tables)
            temporary = disk_cache.temporary_name(folder)
            try:
                temporary.write_text(json.dumps(places))
                temporary.replace(self._path(identity))
            finally:
                temporary.unlink(missing_ok=True)
            disk_cache.make_room(folder, SUFFIX, MOST_BYTES)
        except OSError as error:
            logger.warning("the members of an archive are not shared with others: %s", error)


def _local(path: str) -> OpenVideo:
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
        raise FileNotFoundError(f"{path} is not a file")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    identity = f"{path}|{status.st_ino}|{status.st_size}|{status.st_mtime_ns}"
    return OpenVideo(descriptor, identity)


def _read(archive: Archive) -> Places:
    if isinstance(archive, RemoteArchive):
        return _read_remote(archive.uri)
    # Opened again, because threads that share a descriptor also share the position in its file.
    with Path(archive.path).open("rb") as file:
        return _places_in(file)


@storage.patient
def _read_remote(uri: str) -> Places:
    with storage.opened(uri, tars.BLOCK_BYTES) as file:
        return _places_in(file)


def _places_in(file: IO[bytes]) -> Places:
    return {
        member.name: (member.start, member.size_bytes)
        for member in tars.members(file)
        if isinstance(member, tars.Member)
    }


def _copy(archive: Archive, start: int, size_bytes: int, target: IO[bytes]) -> None:
    place, end = start, start + size_bytes
    while place < end:
        stop = min(place + CHUNK_BYTES, end)
        if isinstance(archive, RemoteArchive):
            data = storage.read_range(archive.uri, place, stop)
        else:
            data = os.pread(archive.descriptor, stop - place, place)
        if not data:
            raise OSError(f"the archive ends at byte {place:,}, within the member")
        target.write(data)
        place += len(data)
    target.flush()
