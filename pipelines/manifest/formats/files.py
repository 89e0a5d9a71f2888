"""Finds the videos that annotations name. The same rule holds for all formats.

A row names a video by an id or by a path within the videos folders, with or without an extension.

1. A file at exactly the place that the format prescribes is used.
2. Otherwise, a video with the same stem is used: with any extension in any case, below any of the
   videos folders. If the row or the format names a folder, files in that folder are preferred. If a
   row names its folder itself, files in other folders are not used.
3. If several different files remain, the stem is ambiguous, which is an error of that row.
4. If there is none, the prescribed place is used, and the video counts as missing later.

`NAME.tar#MEMBER` names a member of an archive within the folders, unless a file has this name.

Folders are listed once, when the first video is looked up. A remote folder with more than
`MOST_LISTED` objects is not listed; videos are then only taken from the prescribed place.
"""

from __future__ import annotations

import logging
import posixpath
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

from pipelines.common import storage, tars

logger = logging.getLogger(__name__)

MOST_LISTED = 500_000
"""Largest number of objects of a remote folder that is listed; this takes five hundred requests."""
VIDEO_EXTENSIONS = frozenset(
    [
        *("mp4", "m4v", "mov", "qt", "avi", "divx", "wmv", "asf", "mkv", "webm", "flv", "f4v"),
        *("mpg", "mpeg", "mpe", "m2v", "m1v", "ts", "mts", "m2ts", "3gp", "3g2", "ogv", "ogg"),
        *("vob", "rm", "rmvb", "mxf", "y4m", "h264", "h265", "hevc", "264", "265", "gif", "null"),
    ]
)
"""Extensions that are not part of the stem of a name in the annotations."""
IMAGE_EXTENSIONS = frozenset(["jpg", "jpeg", "png", "bmp", "tif", "tiff", "webp", "avif", "heic"])
"""Extensions of files that are only used if there is no video with the same stem."""
OTHER_EXTENSIONS = frozenset(
    [
        *("txt", "json", "jsonl", "csv", "tsv", "parquet", "arrow", "xml", "html", "htm", "md"),
        *("srt", "vtt", "ass", "lrc", "wav", "mp3", "m4a", "aac", "flac", "opus", "npy", "npz"),
        *("pt", "pth", "pkl", "pickle", "h5", "hdf5", "yaml", "yml", "log", "zip", "tar", "gz"),
        *("part", "ytdl", "tmp", "crdownload", "aria2", "lock", "metadata", "md5", "sha256"),
    ]
)
"""Extensions of files that lie beside videos, and of downloads that are not complete."""
LOCAL_HOST = "file://localhost/"


@dataclass(frozen=True)
class AmbiguousVideo:
    """Several different files fit a row."""

    reason: str


class VideoFinder:
    """Finds videos below one or several folders or prefixes by the rule of this module."""

    def __init__(
        self,
        folders: Sequence[str],
        extension: str = "",
        *,
        first_dot: bool = False,
        takes_first: bool = False,
    ) -> None:
        """Set up the lookup.

        Args:
            folders: Folders or prefixes, in order of preference.
            extension: Extension that the format prescribes, such as ".mp4"; empty if rows contain
                the extension.
            first_dot: Whether the stem of a file ends at the first dot instead of the last one.
            takes_first: Whether several files with the same stem directly in the first folder are
                not ambiguous: the first one by name is used.
        """
        self._folders = tuple(folders)
        self._extension = extension
        self._first_dot = first_dot
        self._takes_first = takes_first
        self.has_found = False
        """Whether a video was found so far."""

    def stem(self, name: str) -> str:
        """Return the part of a file's name that identifies the video."""
        return name.partition(".")[0] if self._first_dot else name.rpartition(".")[0]

    def of_id(
        self, video_id: str, *others: str, folders: Sequence[str] = ("",)
    ) -> str | AmbiguousVideo:
        """Return the URI of the video with an id.

        Args:
            video_id: The id, which is the stem of the file.
            others: Other ids of the same video, tried in order if there is no file for the first.
            folders: Folders within the videos folders in which the format expects the file, in
                order of preference. Other folders are searched if none of them contains it.
        """
        for stem in (video_id, *others):
            name = f"{stem}{self._extension}"
            places = [f"{folder}/{name}" if folder else name for folder in folders]
            for place in places:
                if found := self._at(place):
                    return found
            if found := self._with_stem(stem, self._extension, folders, is_strict=False):
                return found
        prescribed = [folders[0], f"{video_id}{self._extension}"]
        return storage.join(self._folders[0], *filter(None, prescribed))

    def has_id(self, video_id: str) -> bool:
        """Return whether there is a file with an id as its stem."""
        return bool(self._candidates(video_id))

    def of_path(self, path: str) -> str | AmbiguousVideo:
        """Return the URI of the video that a row names by a path within the videos folders.

        Absolute paths and URIs are taken as they are.
        """
        if path.startswith(storage.LOCAL_SCHEME):
            return _local_path(path)
        if storage.is_remote(path):
            return path
        if found := self._at(path):
            return found
        archive = tars.archive_of(path)
        if archive is not None and isinstance(found := self._at(archive), str):
            return tars.member_uri(found, path[len(archive) + 1 :])
        if path.startswith("/"):
            return path
        folder, _, name = path.rpartition("/")
        stem, _, extension = name.rpartition(".")
        ending = f".{extension}" if stem else ""
        stems = [name]
        if stem and (not extension or extension.lower() in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS):
            stems.append(stem)
        for stem in stems:
            if found := self._with_stem(stem, ending, [folder], is_strict=True):
                return found
        return storage.join(self._folders[0], path)

    def _at(self, path: str) -> str | AmbiguousVideo | None:
        """Return the URI of the file at a place within the videos folders, if there is one."""
        uris = [
            storage.join(folder, path)
            for place, folder in enumerate(self._folders)
            if self._is_file(place, path)
        ]
        self.has_found = self.has_found or bool(uris)
        return _only(path, uris) if uris else None

    def _with_stem(
        self, stem: str, extension: str, folders: Sequence[str], is_strict: bool
    ) -> str | AmbiguousVideo | None:
        """Return the URI of the file with a stem, if there is one.

        Args:
            stem: The stem.
            extension: Extension to prefer among several files of a folder.
            folders: Folders to prefer.
            is_strict: Whether files in other folders are not used.
        """
        found = self._candidates(stem)
        own = [_parts(folder) for folder in folders]
        near = [
            (place, path)
            for place, path in found
            if any(_agree(self._folder_of(place, path, is_strict), parts) for parts in own)
        ]
        if near or is_strict:
            found = near
        if not found:
            return None
        self.has_found = True
        if len({(place, path.rpartition("/")[0]) for place, path in found}) == 1:
            wanted = extension.lower()
            preferred = [one for one in found if one[1].lower().endswith(f"{stem}{wanted}".lower())]
            found = preferred if len(preferred) == 1 else found
        if self._takes_first:
            top = sorted(path for place, path in found if place == 0 and "/" not in path)
            found = [(0, path) for path in top[:1]] or found
        return _only(stem, [storage.join(self._folders[place], path) for place, path in found])

    def _folder_of(self, place: int, path: str, is_strict: bool) -> list[str]:
        """Return the parts of a file's folder within the videos folders.

        For a row that names a folder, the files directly in a videos folder are in a folder of its
        name. Otherwise `train/1.mp4` would also be found for a row with `test/1.mp4`.
        """
        inside = _parts(path.rpartition("/")[0])
        return inside or ([storage.name_of(self._folders[place])] if is_strict else [])

    def _is_file(self, place: int, path: str) -> bool:
        listing = self._listings[place]
        if listing is None:
            return False
        if path in listing:
            return True
        normal = posixpath.normpath(path).lstrip("/")
        if normal in listing:
            return True
        # Hidden folders are not listed.
        is_hidden = any(part.startswith(".") for part in normal.split("/"))
        return is_hidden and storage.exists(storage.join(self._folders[place], path))

    def _candidates(self, stem: str) -> list[tuple[int, str]]:
        """Return the folder numbers and the paths of the files with a stem."""
        found = [
            (place, path)
            for place, by_stem in enumerate(self._by_stem)
            for path in _as_list(by_stem.get(_composed(stem)))
        ]
        videos = [one for one in found if _extension(one[1]) not in IMAGE_EXTENSIONS]
        return videos or found

    @cached_property
    def _listings(self) -> list[frozenset[str] | None]:
        """Return the paths of all files of each folder; None for one that is too large to list."""
        listings: list[frozenset[str] | None] = []
        for folder in self._folders:
            if storage.is_remote(folder):
                logger.info("manifest: listing the videos in %s", folder)
            try:
                names = storage.list_below(folder, MOST_LISTED)
            except PermissionError as error:
                logger.warning(
                    "%s must not be listed (%s); videos are taken from the places that the "
                    "format prescribes",
                    folder,
                    error.strerror or error,
                )
                listings.append(None)
                continue
            if names is None:
                logger.warning(
                    "%s contains more than %d objects and is not listed; videos are taken from "
                    "the places that the format prescribes",
                    folder,
                    MOST_LISTED,
                )
                # Formats without folders have always listed the objects directly below the prefix.
                names = storage.list_names(folder) if self._takes_first else None
            listings.append(None if names is None else frozenset(names))
        return listings

    @cached_property
    def _by_stem(self) -> list[dict[str, str | list[str]]]:
        """Return the paths by stem of each folder; a list only where there are several."""
        result: list[dict[str, str | list[str]]] = []
        for listing in self._listings:
            found: dict[str, str | list[str]] = {}
            for path in sorted(listing or ()):
                name = path.rpartition("/")[2]
                if _extension(name) in OTHER_EXTENSIONS or name.startswith("."):
                    continue
                for stem in {self.stem(name), name.rpartition(".")[0]} - {""} or {name}:
                    stem = _composed(stem)
                    known = found.get(stem)
                    found[stem] = path if known is None else [*_as_list(known), path]
            result.append(found)
        return result


def _composed(stem: str) -> str:
    """Return a text with composed letters; macOS writes the letters of file names decomposed."""
    return stem if stem.isascii() else unicodedata.normalize("NFC", stem)


def _as_list(paths: str | list[str] | None) -> list[str]:
    if paths is None:
        return []
    return [paths] if isinstance(paths, str) else paths


def is_outside(path: str) -> bool:
    """Return whether a path that is meant to be within the videos folders leaves them."""
    is_own = path.startswith(("/", storage.LOCAL_SCHEME)) or storage.is_remote(path)
    return not is_own and ".." in path.split("/")


def _extension(path: str) -> str:
    return path.rpartition(".")[2].lower()


def _parts(folder: str) -> list[str]:
    normal = posixpath.normpath(folder).strip("/")
    return [] if normal == "." else normal.split("/")


def _agree(one: list[str], other: list[str]) -> bool:
    """Return whether one of two folders is the end of the other's path."""
    length = min(len(one), len(other))
    return length == 0 or one[-length:] == other[-length:]


def _only(name: str, uris: list[str]) -> str | AmbiguousVideo:
    """Return the only file of several URIs, of which some may be links to the same file."""
    if len(uris) > 1 and len({_identity(uri) for uri in uris}) > 1:
        shown = " and ".join(uris[:2])
        more = f" and {len(uris) - 2} more" if len(uris) > 2 else ""
        return AmbiguousVideo(
            f"several files fit {name}: {shown}{more}; rename or remove all but one, or give only "
            "the folder with the right one"
        )
    return uris[0]


def _identity(uri: str) -> str:
    return uri if storage.is_remote(uri) else str(Path(uri).resolve())


def _local_path(uri: str) -> str:
    """Return the path of a file:// URI, which may be percent-encoded."""
    path = uri.removeprefix(storage.LOCAL_SCHEME)
    if uri.startswith(LOCAL_HOST):
        path = "/" + uri.removeprefix(LOCAL_HOST)
    if "%" in path and not storage.exists(path) and storage.exists(unquote(path)):
        path = unquote(path)
    return storage.resolve(f"{storage.LOCAL_SCHEME}{path}")
