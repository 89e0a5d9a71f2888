"""Keeps the indexes of videos, in memory and, for long videos, on disk.

Indexing reads all packets of a file, which takes a second for an hour of video. With the index of
the file at hand, a span costs only the decoding of its frames.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import av
import numpy as np

from pipelines.video import disk_cache
from pipelines.video.exact_frames import VideoIndex

logger = logging.getLogger(__name__)

INDEXES_IN_MEMORY = 16
LONG_FRAMES = 2000
"""Number of frames from which on an index is kept on disk."""
MOST_BYTES = 512 * 1024**2
"""Maximum size of the indexes on disk; those of some three hundred hours of video."""
SUFFIX = ".npz"
FACTS = "facts"
VERSION = 1
"""Increased whenever indexes are made or stored differently."""

ARRAYS = ("pts", "shown_s", "key_pts", "key_positions")


class IndexCache:
    """Indexes of videos by the identity of their files."""

    def __init__(self, folder: str = "") -> None:
        """Set up the cache.

        Args:
            folder: folder shared with other processes of the node; empty for none.
        """
        self._folder = Path(folder) if folder else None
        self._recent: OrderedDict[str, VideoIndex] = OrderedDict()

    def get(self, identity: str, read: Callable[[], VideoIndex]) -> VideoIndex:
        """Return the index of a file.

        Args:
            identity: text that changes whenever the contents of the file change.
            read: makes the index. Its errors are raised and not kept.
        """
        index = self._recent.get(identity) or self._load(identity)
        if index is None:
            index = read()
            self._save(identity, index)
        self._recent[identity] = index
        self._recent.move_to_end(identity)
        while len(self._recent) > INDEXES_IN_MEMORY:
            self._recent.popitem(last=False)
        return index

    def _path(self, folder: Path, identity: str) -> Path:
        made_by = (VERSION, av.__version__, sorted(av.library_versions.items()))
        return folder / (hashlib.sha256(f"{made_by}{identity}".encode()).hexdigest() + SUFFIX)

    def _load(self, identity: str) -> VideoIndex | None:
        if self._folder is None:
            return None
        path = self._path(self._folder, identity)
        try:
            with np.load(path, allow_pickle=False) as stored:
                facts = json.loads(stored[FACTS].tobytes())
                arrays = {name: stored[name] for name in ARRAYS}
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("%s is damaged and will be recreated: %s", path, error)
            return None
        disk_cache.mark_used(path)
        return VideoIndex(**{**facts, "containers": frozenset(facts["containers"]), **arrays})

    def _save(self, identity: str, index: VideoIndex) -> None:
        """Write the index of a long video; a full disk only costs other processes the time."""
        if self._folder is None or index.num_frames < LONG_FRAMES:
            return
        facts = {
            field.name: getattr(index, field.name)
            for field in fields(index)
            if field.name not in ARRAYS
        }
        coded = json.dumps({**facts, "containers": sorted(index.containers)}).encode()
        stored: dict[str, Any] = {name: getattr(index, name) for name in ARRAYS}
        stored[FACTS] = np.frombuffer(coded, dtype=np.uint8)
        try:
            disk_cache.make_folder(self._folder)
            self._write(self._folder, identity, stored)
            disk_cache.make_room(self._folder, SUFFIX, MOST_BYTES)
        except OSError as error:
            logger.warning("the index of a video is not shared with other processes: %s", error)

    def _write(self, folder: Path, identity: str, stored: dict[str, Any]) -> None:
        temporary = disk_cache.temporary_name(folder)
        try:
            with temporary.open("wb") as file:
                np.savez(file, **stored)
            temporary.replace(self._path(folder, identity))
        finally:
            temporary.unlink(missing_ok=True)
