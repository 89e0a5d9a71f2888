"""Reads tar archives of videos, such as those that video2dataset writes as webdataset.

Every video in an archive becomes a clip whose URI is `ARCHIVE.tar#MEMBER`. What describes it is
beside it in the archive, as `KEY.json` and `KEY.txt`. Archives that `jobs.export` wrote list the
clips of each video there, which come back with their ids, spans and captions. Archives are read by
their headers, local or remote, and nothing is extracted: the ingest reads members by their
position.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pipelines.artifacts import tar_samples
from pipelines.artifacts.tar_samples import CLIPS
from pipelines.common import storage, tars
from pipelines.manifest.formats import footage, reading, values
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows
from stgt.errors import ManifestError

logger = logging.getLogger(__name__)

MERGES = False
FINDS_VIDEOS = True
REJECTS_REPEATED = True
ENDINGS = (tars.ENDING, *tars.COMPRESSED_ENDINGS)
MOST_LISTED = 10_000_000
AHEAD = 8
"""Number of remote archives that are read at the same time."""
MISNAMED = (
    "its name is that of a compressed archive, but its contents are not compressed; if it is a tar "
    "archive, rename it to end in .tar"
)
"""Why a plain archive with such a name is refused: `x.tgz#MEMBER` is not the URI of a member."""
_GLOB = re.compile(r"[*?\[]")


@dataclass
class _Contents:
    """What an archive contains."""

    videos: list[tars.Member] = field(default_factory=list)
    sidecars: dict[tuple[str, str], bytes] = field(default_factory=dict)
    """Contents of the files that describe videos, by the path without the extension, and by the
    extension."""
    numbers: dict[str, int] = field(default_factory=dict)
    """Number of the JSON member by its path without the extension."""
    refused: list[tars.Refused] = field(default_factory=list)


def read(source: AnnotationSource) -> Rows:
    """Yield a clip for each video of each archive, and a rejected row for what is not used.

    Raises:
        ManifestError: An archive or a folder is missing, or a folder contains no archives.
    """
    archives = list(dict.fromkeys(_archives((*source.annotations, *source.videos))))
    logger.info("manifest: reading the headers of %s archives", f"{len(archives):,}")
    for uri, contents in _read_all(archives):
        yield from _rows(uri, contents, source)


def _archives(uris: Sequence[str]) -> Iterator[str]:
    """Yield the archives that are given by name, by a pattern, or by the folder with them."""
    for uri in uris:
        is_folder = storage.is_local(uri) and Path(uri).is_dir()
        if uri.lower().endswith(ENDINGS) and not is_folder and not _GLOB.search(uri):
            yield uri
            continue
        if storage.is_local(uri) and Path(uri).is_file():
            if not uri.lower().endswith(ENDINGS):
                raise ManifestError(f"{uri} is not a .tar file; give .tar files or their folder")
            yield uri
            continue
        folder, pattern = _folder_and_pattern(uri) if not is_folder else (uri, "")
        names = [name for name in _listed(folder) if name.lower().endswith(ENDINGS)]
        if pattern:
            names = [name for name in names if _matches(name, pattern)]
        if not names:
            what = f"match {pattern}" if pattern else "end in .tar"
            raise ManifestError(f"{folder} contains no files that {what}; give .tar files")
        yield from (storage.join(folder, name) for name in names)


def _folder_and_pattern(uri: str) -> tuple[str, str]:
    """Return the folder of a pattern, and the pattern of the paths in it; empty for a folder."""
    parts = uri.split("/")
    first = next((place for place, part in enumerate(parts) if _GLOB.search(part)), len(parts))
    return "/".join(parts[:first]), "/".join(parts[first:])


def _matches(path: str, pattern: str) -> bool:
    parts, patterns = path.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _listed(folder: str) -> list[str]:
    try:
        return storage.list_below(folder, MOST_LISTED) or []
    except PermissionError as error:
        raise ManifestError(
            f"{folder} must not be listed ({error.strerror or error}); give its .tar files by name"
        ) from error
    except FileNotFoundError as error:
        raise ManifestError(f"{folder} does not exist; check its name") from error


def _read_all(archives: Sequence[str]) -> Iterator[tuple[str, _Contents]]:
    """Yield the contents of archives in their order; of remote ones, some are read ahead."""
    with ThreadPoolExecutor(AHEAD) as pool:
        pending: deque[tuple[str, Future[_Contents]]] = deque()
        try:
            for uri in archives:
                if storage.is_local(uri):
                    while pending:
                        name, future = pending.popleft()
                        yield name, future.result()
                    yield uri, _read(uri)
                    continue
                if len(pending) == AHEAD:
                    name, future = pending.popleft()
                    yield name, future.result()
                pending.append((uri, pool.submit(_read, uri)))
            while pending:
                name, future = pending.popleft()
                yield name, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _read(uri: str) -> _Contents:
    is_listed = storage.is_local(uri) and os.path.lexists(uri)
    if is_listed and (reason := reading.fault_of_local(Path(uri))):
        return _Contents(refused=[tars.Refused(1, reason)])
    try:
        return _contents(uri)
    except FileNotFoundError as error:
        raise ManifestError(f"{uri} does not exist; check its name") from error
    except PermissionError as error:
        raise ManifestError(f"{uri} must not be read ({error.strerror or error})") from error


@storage.patient
def _contents(uri: str) -> _Contents:
    """Read the headers of an archive, and the texts in it."""
    found = _Contents()
    with storage.opened(uri, tars.BLOCK_BYTES) as file:
        if uri.lower().endswith(tars.COMPRESSED_ENDINGS):
            found.refused.append(tars.Refused(1, tars.why_no_archive(file) or MISNAMED))
            return found
        pictures: list[tars.Member] = []
        for member in tars.members(file):
            if isinstance(member, tars.Refused):
                found.refused.append(member)
                continue
            if any(part.startswith(".") for part in member.name.split("/")):
                continue  # such as the files `._NAME` that macOS adds to archives
            kind = footage.kind_of(
                member.name, lambda member=member: _part(file, member, footage.PROBED_BYTES)
            )
            stem, ending = footage.stem(member.name), footage.extension(member.name)
            if kind == "video":
                found.videos.append(member)
            elif kind == "picture":
                pictures.append(member)
            elif ending in footage.SIDECARS:
                data = footage.read_description(
                    ending, lambda most_bytes, member=member: _part(file, member, most_bytes)
                )
                found.sidecars[stem, ending] = data
                if ending == "json":
                    found.numbers[stem] = member.number
    stems = {footage.stem(video.name) for video in found.videos}
    found.refused += (
        tars.Refused(picture.number, f"{picture.name}: {footage.SAID['picture']}")
        for picture in pictures
        if footage.stem(picture.name) not in stems
    )
    return found


def _part(file: IO[bytes], member: tars.Member, most_bytes: int) -> bytes:
    file.seek(member.start)
    return file.read(min(member.size_bytes, most_bytes))


def _rows(uri: str, contents: _Contents, source: AnnotationSource) -> Rows:
    refused = list(contents.refused)
    if not contents.videos and not refused and not contents.numbers:
        refused.append(tars.Refused(1, "the archive contains no videos"))
    ids = footage.clip_ids([video.name for video in contents.videos])
    for video, clip_id in zip(contents.videos, ids, strict=True):
        stem = footage.stem(video.name) or video.name
        beside = (contents.sidecars.get((stem, ending)) for ending in footage.SIDECARS)
        try:
            captions, extras = footage.described(stem, *beside)
            clips = _exported(extras)
        except ValueError as error:
            refused.append(tars.Refused(video.number, f"{video.name}: {error}"))
            continue
        member = tars.member_uri(uri, video.name)
        if clips:
            yield from (_clip(clip, member, source) for clip in clips)
            continue
        yield ClipRow(
            clip_id=clip_id,
            video_id=clip_id,
            video_uri=member,
            captions=captions,
            split=source.split or "train",
            source="webdataset",
            extras=extras,
        )
    refused += _failed_downloads(contents)
    name = uri.encode("utf-8", "backslashreplace").decode()  # it may have bytes that are not UTF-8
    for row in sorted(refused, key=lambda one: one.number):
        yield BadRow(file=name, row=row.number, reason=row.reason)


def _exported(extras: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the clips that `jobs.export` lists beside a video; none for other archives.

    Raises:
        ValueError: An entry is not that of a clip, or its times or captions are impossible.
    """
    if CLIPS not in extras:
        return []
    clips = tar_samples.clips_of_sample(extras[CLIPS])
    for place, clip in enumerate(clips):
        _check_exported(clip, f"entry {place} of {CLIPS}")
    return clips


def _check_exported(clip: dict[str, Any], where: str) -> None:
    """Check the values of a clip, and convert its times to float."""
    start_s, end_s = (
        values.seconds(clip[name], f"{where}: {name}") for name in ("start_s", "end_s")
    )
    if start_s is not None and end_s is not None and end_s <= start_s:
        raise ValueError(f"{where}: the end ({end_s} s) is not after the start ({start_s} s)")
    # Captions are not cleaned, so that those of an export come back unchanged.
    if not all(text.strip() for text in clip["captions"]):
        raise ValueError(f"{where}: a caption is blank")
    clip.update(start_s=start_s, end_s=end_s)


def _clip(clip: dict[str, Any], member: str, source: AnnotationSource) -> ClipRow:
    return ClipRow(**{**clip, "split": source.split or clip["split"]}, video_uri=member)


def _failed_downloads(contents: _Contents) -> Iterator[tars.Refused]:
    """Yield the descriptions without a video: what video2dataset could not download."""
    stems = {footage.stem(video.name) or video.name for video in contents.videos}
    for stem, number in contents.numbers.items():
        if stem in stems:
            continue
        try:
            footage.described(stem, None, contents.sidecars[stem, "json"])
        except ValueError as error:
            yield tars.Refused(number, f"{stem}: {error}")
        else:
            yield tars.Refused(number, f"{stem}: the archive has its description, but no video")
