"""Reads folders and S3 prefixes of videos, which need no annotations.

All videos in all subfolders become clips, in any container. Links are followed, also those that
lead out of the folder, and each folder is visited once. Hidden files and folders are passed over.
Captions come from the files that video2dataset writes beside its videos, where there are any; other
clips have none.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipelines.common import storage
from pipelines.manifest.formats import footage, reading
from pipelines.manifest.formats.opening import Unreadable
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows
from stgt.errors import ManifestError

logger = logging.getLogger(__name__)

MERGES = False
FINDS_VIDEOS = True
MOST_LISTED = 100_000_000
BATCH = 512
"""Number of videos whose descriptions are read at a time; from S3, concurrently."""


@dataclass(frozen=True)
class _Video:
    number: int
    """Its place among the files of its folder, counted from 1."""
    path: str
    """Path within the folder."""
    clip_id: str


def read(source: AnnotationSource) -> Rows:
    """Yield a clip for each video, and a rejected row for each file that is not used.

    Raises:
        ManifestError: A folder contains no files or must not be listed, or two have the same name.
    """
    folders = source.videos
    names = [storage.name_of(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise ManifestError(
            f"the folders {', '.join(folders)} do not all have different names, by which the ids "
            "of their clips would differ; give the folder above them, or one folder at a time"
        )
    for folder, name in zip(folders, names, strict=True):
        prefix = f"{name}/" if len(folders) > 1 else ""
        yield from _read_folder(folder, prefix, source)


def _read_folder(folder: str, prefix: str, source: AnnotationSource) -> Rows:
    paths = _listed(folder)
    present = frozenset(paths)
    found: list[tuple[int, str]] = []
    pictures: list[tuple[int, str]] = []
    described: list[str] = []
    rejected = 0
    for number, path in enumerate(paths, start=1):
        if path.rpartition("/")[2].startswith("."):
            continue
        if reason := _fault(folder, path, present):
            rejected += 1
            yield BadRow(file=folder, row=number, reason=f"{path!r}: {reason}")
            continue
        if footage.extension(path) in footage.SIDECARS:
            described.append(path)
        try:
            kind = footage.kind_of(path, lambda path=path: _beginning(storage.join(folder, path)))
        except storage.UnreachableError:
            raise
        except OSError as error:
            rejected += 1
            reason = reading.cannot_be_read(error)
            yield BadRow(file=folder, row=number, reason=f"{path}: {reason}")
            continue
        if kind == "video":
            found.append((number, path))
        elif kind == "picture":
            pictures.append((number, path))
        elif kind != "other":
            rejected += 1
            yield BadRow(file=folder, row=number, reason=f"{path}: {footage.SAID[kind]}")
    if not found and not pictures and not rejected:
        raise ManifestError(
            f"{folder} contains {len(paths):,} files but no video; give the folder with the videos"
        )
    stems = {footage.stem(path) for _, path in found}
    for number, path in pictures:
        if footage.stem(path) not in stems:  # otherwise it is the preview of a video
            yield BadRow(file=folder, row=number, reason=f"{path}: {footage.SAID['picture']}")
    ids = footage.clip_ids([path for _, path in found])
    videos = [
        _Video(number, path, prefix + clip_id)
        for (number, path), clip_id in zip(found, ids, strict=True)
    ]
    sidecars = _Sidecars(folder, described)
    for start in range(0, len(videos), BATCH):
        batch = videos[start : start + BATCH]
        for video, contents in zip(batch, sidecars.read(batch), strict=True):
            name = footage.stem(video.path) or video.path
            try:
                captions, extras = footage.described(name, *contents)
            except ValueError as error:
                yield BadRow(file=folder, row=video.number, reason=f"{video.path}: {error}")
                continue
            yield ClipRow(
                clip_id=video.clip_id,
                video_id=video.clip_id,
                video_uri=storage.join(folder, video.path),
                captions=captions,
                split=source.split or "train",
                source="folder",
                extras=extras,
            )


def _listed(folder: str) -> list[str]:
    if storage.is_remote(folder):
        logger.info("manifest: listing the videos in %s", folder)
    elif Path(folder).is_file():
        raise ManifestError(f"{folder} is a file; give the folder that contains it")
    try:
        paths = storage.list_below(folder, MOST_LISTED)
    except PermissionError as error:
        raise ManifestError(
            f"{folder} must not be listed ({error.strerror or error}); ask for the permission to "
            "list it, or name its videos in a table (--format generic)"
        ) from error
    except FileNotFoundError as error:
        raise ManifestError(f"{folder} does not exist; check its name") from error
    if not paths:
        raise ManifestError(f"{folder} contains no files; give the folder with the videos")
    return paths


def _fault(folder: str, path: str, present: frozenset[str]) -> str | None:
    """Return why a file cannot be used, whatever its contents are, or None if it can."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8 text; rename it"
    for ending in footage.CONTROL_FILES:
        if f"{path}.{ending}" in present:
            return f"its download is not complete, since there is a file {path}.{ending}"
    if storage.is_remote(folder):
        return None
    return reading.fault_of_local(Path(folder, path))


def _beginning(uri: str) -> bytes:
    try:
        return storage.read_beginning(uri, footage.PROBED_BYTES)
    except PermissionError:
        return b""


class _Sidecars:
    """Files beside the videos of a folder that describe them."""

    def __init__(self, folder: str, paths: Sequence[str]) -> None:
        """Remember where the files are.

        Args:
            folder: The folder.
            paths: The text and JSON files in it that can be opened.
        """
        self._folder = folder
        self._paths = {(footage.stem(path), footage.extension(path)): path for path in paths}

    def read(self, videos: Sequence[_Video]) -> Iterator[list[bytes | Unreadable | None]]:
        """Yield what the text file and the JSON file of each video contain, if there are."""
        wanted = [
            self._paths.get((footage.stem(video.path) or video.path, ending))
            for video in videos
            for ending in footage.SIDECARS
        ]
        if storage.is_remote(self._folder) and any(wanted):
            with ThreadPoolExecutor(storage.READERS) as pool:
                contents = list(pool.map(self._contents, wanted))
        else:
            contents = [self._contents(path) for path in wanted]
        width = len(footage.SIDECARS)
        return (contents[place : place + width] for place in range(0, len(contents), width))

    def _contents(self, path: str | None) -> bytes | Unreadable | None:
        if path is None:
            return None
        uri = storage.join(self._folder, path)
        try:
            return storage.read_beginning(uri, footage.MOST_SIDECAR_BYTES + 1)
        except storage.UnreachableError:
            raise
        except OSError as error:
            return Unreadable(f"cannot be read ({error.strerror or error})")
