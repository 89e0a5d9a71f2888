"""The form of the tars that an export writes, and a writer of one tar.

Each video file is one sample, with the members KEY.EXTENSION (the bytes of the file), KEY.json and
KEY.txt (the first caption of its first clip, if it has one). The JSON lists all clips of the video;
see `pipelines.artifacts.tar_samples`. Keys are numbers, so any id of a video is allowed, names that
differ only in case do not meet, and no member can point outside the folder it is extracted to.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypedDict

from pipelines.artifacts import tar_samples
from pipelines.common import storage

EXTENSION = "mp4"
"""Extension of the member with a video whose own name has no extension of a video."""
VIDEO_EXTENSIONS = frozenset(
    [
        *("mp4", "m4v", "mov", "avi", "wmv", "asf", "mkv", "webm", "flv", "mpg", "mpeg", "ts"),
        *("mts", "m2ts", "3gp", "3g2", "ogv", "gif", "webp"),
    ]
)
"""Extensions that a member keeps. Readers of webdataset tars tell members apart by extension."""
RECORDS = "records"
"""Folder with a record of each finished part."""
CONTINUED = re.compile(r"\d{5,}_\d{3,}\.tar")
"""Names of tars that continue another one."""


class UnreadableVideoError(Exception):
    """A video cannot be read to its end."""


class TooManyClipsError(Exception):
    """The clips of a video are more than one sample may list."""


class RejectedVideo(TypedDict):
    """A video that could not be read."""

    video_uri: str
    clip_ids: list[str]
    reason: str
    """A key of `pipelines.video.decoder.REASONS`."""
    message: str


class TarFile(TypedDict):
    """A tar."""

    name: str
    videos: int
    clips: int
    bytes: int
    sha256: str


class TarRecord(TypedDict):
    """Record of a finished part of an export: the tars with its videos, of which most have one."""

    part: int
    files: list[TarFile]
    rejected: list[RejectedVideo]


def num_videos(record: TarRecord) -> int:
    """Return the number of videos of a part, including those that could not be read."""
    return sum(file["videos"] for file in record["files"]) + len(record["rejected"])


def tar_name(part: int, number: int = 0) -> str:
    """Return the file name of a tar: the first of a part, or one that continues it."""
    return f"{part:05d}_{number:03d}.tar" if number else f"{part:05d}.tar"


def record_uri(output: str, part: int) -> str:
    """Return the URI of a part's record, which is written after its tars."""
    return storage.join(output, RECORDS, f"{part:05d}.json")


def key_of(part: int, place: int) -> str:
    """Return the key of a sample: the number of its part and its place among the part's videos."""
    return f"{part:05d}-{place:06d}"


def member_extension(uri: str) -> str:
    """Return the extension, without dot, of the member that holds a video."""
    _, dot, extension = storage.name_of(uri).rpartition(".")
    return extension.lower() if dot and extension.lower() in VIDEO_EXTENSIONS else EXTENSION


class _HashingReader(io.RawIOBase):
    """Reads a file of known size, hashes what is read, and tells errors of reading from others."""

    def __init__(self, file: BinaryIO, size_bytes: int) -> None:
        self._file = file
        self._left = size_bytes
        self.found = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as error:
            raise UnreadableVideoError(str(error)) from error
        if len(data) < (self._left if size < 0 else min(size, self._left)):
            raise UnreadableVideoError(
                f"{self._left - len(data):,} bytes are missing at its end; it was probably "
                "replaced while it was read"
            )
        self._left -= len(data)
        self.found.update(data)
        return data


class SampleWriter:
    """Writes a tar whose bytes depend only on its samples. A context manager."""

    def __init__(self, path: Path) -> None:
        self.videos = self.clips = 0  # that were added
        self._file = path.open("wb")
        self._archive = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._archive.close()
        self._file.close()

    @property
    def size_bytes(self) -> int:
        """Size of the tar so far, in bytes."""
        return self._archive.offset

    def add(
        self,
        key: str,
        extension: str,
        video: BinaryIO,
        size_bytes: int,
        clips: Sequence[Mapping[str, Any]],
    ) -> None:
        """Add a video with its clips.

        Args:
            key: Key of the sample.
            extension: Extension of the member that holds the video.
            video: The video, open at its beginning.
            size_bytes: Its size.
            clips: Rows of the manifest, all of this video.

        Raises:
            UnreadableVideoError: The video cannot be read to its end; the tar is as before.
            TooManyClipsError: The JSON with its clips would be larger than `jobs.manifest` reads;
                the tar is as before.
        """
        sample = tar_samples.sample_of_clips(key, clips, hashlib.sha256().hexdigest())
        size_of_text = len(_encoded(sample))  # it does not depend on the value of the checksum
        if size_of_text > tar_samples.MOST_BYTES:
            raise TooManyClipsError(
                f"its {len(clips):,} clips have {size_of_text:,} bytes of captions and extras, "
                f"more than the {tar_samples.MOST_BYTES:,} bytes that are read back; remove some"
            )
        before = self._archive.offset
        reader = _HashingReader(video, size_bytes)
        try:
            self._archive.addfile(_member(f"{key}.{extension}", size_bytes), reader)
        except UnreadableVideoError:
            self._file.seek(before)
            self._file.truncate()
            self._archive.offset = before
            raise
        sample["sha256"] = reader.found.hexdigest()
        self._add_text(f"{key}.json", _encoded(sample))
        if "caption" in sample:
            self._add_text(f"{key}.txt", sample["caption"].encode())
        self.videos += 1
        self.clips += len(clips)

    def _add_text(self, name: str, data: bytes) -> None:
        self._archive.addfile(_member(name, len(data)), io.BytesIO(data))


def _encoded(sample: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(sample, sort_keys=True, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        # Half of a character that UTF-16 writes as two, which JSON can hold as an escape alone.
        return (json.dumps(sample, sort_keys=True) + "\n").encode()


def _member(name: str, size_bytes: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size_bytes
    return member  # time, owner and rights have fixed defaults
