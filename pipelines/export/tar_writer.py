"""The workers that write the tars of an export."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from pipelines.artifacts.manifest import ManifestRows
from pipelines.common import ray_errors, storage, tars
from pipelines.export.plan import TarPlan
from pipelines.export.tar_form import (
    RejectedVideo,
    SampleWriter,
    TarFile,
    TarRecord,
    TooManyClipsError,
    UnreadableVideoError,
    key_of,
    member_extension,
    num_videos,
    record_uri,
    tar_name,
)
from pipelines.video.tar_members import TarMembers
from pipelines.video.video_cache import VideoCache
from stgt.errors import STGTError

S3 = "s3://"
MOST_UNREACHABLE = 10
"""Number of consecutive videos that cannot be fetched after which the run ends, because then the
storage is assumed to be unavailable."""


class _RejectedError(Exception):
    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class TarWriter:
    """Writes the tars of parts of an export (a Ray Data actor).

    Reads:
        part: Number of the part.
    Adds:
        done: Number of its videos, including those that could not be read.
    """

    def __init__(self, plan: TarPlan, output: str, bytes_per_tar: int) -> None:
        """Open a manifest.

        Args:
            plan: Which rows of it belong to each part.
            output: Folder of the tars.
            bytes_per_tar: Size from which the videos of a part continue in another tar.
        """
        self._plan = plan
        self._output = output
        self._bytes_per_tar = bytes_per_tar
        self._manifest = ManifestRows(plan.manifest)
        self._opener = VideoOpener()

    @ray_errors.errors_as_rows
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Write the parts of a batch."""
        done = [num_videos(self._write(int(part))) for part in batch["part"]]
        return {"part": np.array(batch["part"]), "done": np.array(done)}

    def _write(self, part: int) -> TarRecord:
        clips_of: dict[str, list[dict[str, Any]]] = {}
        for row in self._manifest.take(self._plan.rows_of(part)):
            clips_of.setdefault(row["video_uri"], []).append(row)
        rejected: list[RejectedVideo] = []
        unreachable = 0
        with _Tars(self._output, part, self._bytes_per_tar) as tars_of_part:
            for place, (video_uri, rows) in enumerate(clips_of.items()):
                failure = _add(self._opener, tars_of_part, key_of(part, place), video_uri, rows)
                if failure is not None:
                    rejected.append(failure)
                is_away = failure is not None and failure["reason"] == "unreachable"
                unreachable = unreachable + 1 if is_away else 0
                if failure is not None and unreachable == MOST_UNREACHABLE:
                    raise STGTError(
                        f"{unreachable} videos in a row could not be fetched (the last one: "
                        f"{failure['message']}); finished tars are kept"
                    )
        record = TarRecord(part=part, files=tars_of_part.files, rejected=rejected)
        storage.write_json(record_uri(self._output, part), record)
        return record


class _Tars:
    """Writes the videos of a part to one tar, or to several of limited size. A context manager.

    A tar is on local disk until it is finished, so its size is what a worker needs there.
    """

    def __init__(self, output: str, part: int, most_bytes: int) -> None:
        self._output = output
        self._part = part
        self._most_bytes = most_bytes
        self._open = ExitStack()
        self.files: list[TarFile] = []

    def __enter__(self) -> _Tars:
        self._writer = self._open.enter_context(self._next())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)
        if error is None and len(self.files) > 1 and not self.files[-1]["videos"]:
            # The video that it was begun for cannot be read, and was the last one.
            storage.remove(storage.join(self._output, self.files.pop()["name"]))

    def writer_for(self, size_bytes: int) -> SampleWriter:
        """Return the writer of the tar that a video of this size belongs to."""
        now = self._writer.size_bytes
        if now and now + size_bytes > self._most_bytes:
            self._open.close()  # which finishes the tar
            self._writer = self._open.enter_context(self._next())
        return self._writer

    @contextmanager
    def _next(self) -> Iterator[SampleWriter]:
        name = tar_name(self._part, len(self.files))
        with storage.writing(storage.join(self._output, name)) as path:
            with SampleWriter(path) as writer:
                yield writer
            made = TarFile(
                name=name,
                videos=writer.videos,
                clips=writer.clips,
                bytes=path.stat().st_size,
                sha256=storage.digest(str(path)),
            )
        self.files.append(made)


def _add(
    opener: VideoOpener,
    tars_of_part: _Tars,
    key: str,
    video_uri: str,
    rows: list[dict[str, Any]],
) -> RejectedVideo | None:
    """Add a video to a tar, and return None; return why not if it cannot be read."""
    try:
        with opener.opened(video_uri) as (file, size_bytes):
            writer = tars_of_part.writer_for(size_bytes)
            writer.add(key, member_extension(video_uri), file, size_bytes, rows)
            return None
    except _RejectedError as error:
        reason, message = error.reason, str(error)
    except UnreadableVideoError as error:
        reason, message = "unreachable", f"{video_uri}: {error}"
    except TooManyClipsError as error:
        reason, message = "too_large", f"{video_uri}: {error}"
    return RejectedVideo(
        video_uri=video_uri,
        clip_ids=[row["clip_id"] for row in rows],
        reason=reason,
        message=message,
    )


class VideoOpener:
    """Opens videos: local files, remote ones, and members of tars."""

    def __init__(self) -> None:
        self._cache = VideoCache()
        self._members = TarMembers(self._cache)

    @contextmanager
    def opened(self, uri: str) -> Iterator[tuple[BinaryIO, int]]:
        """Open a video, and return it with its size in bytes.

        Raises:
            _RejectedError: It cannot be opened or fetched, or it is empty.
            OSError: The disk is full, which is no fault of the video.
        """
        with ExitStack() as stack:
            try:
                file = stack.enter_context(self._path(uri, stack).open("rb"))
            except FileNotFoundError as error:
                raise _RejectedError("missing", f"{uri} does not exist") from error
            except IsADirectoryError as error:
                raise _RejectedError("not_a_video", f"{uri} is a folder") from error
            except PermissionError as error:
                raise _RejectedError("forbidden", f"{uri}: {error.strerror or error}") from error
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise
                raise _RejectedError("unreachable", f"{uri}: {str(error)[:300]}") from error
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes == 0:
                raise _RejectedError("empty", f"{uri} is empty")
            yield file, size_bytes

    def _path(self, uri: str, stack: ExitStack) -> Path:
        """Return the path of a video, or of a temporary copy that is there as long as the stack."""
        place = tars.split(uri)
        if place is not None:
            with closing(self._members.open_archive(place[0])) as archive:
                opened = self._members.open(archive, place[1], sys.maxsize)
            member = stack.enter_context(closing(opened))
            return Path(member.path)
        if not storage.is_remote(uri):
            return Path(storage.resolve(uri))
        if not uri.startswith(S3):
            raise OSError("only local files and s3:// are supported; copy the video there")
        path = Path(stack.enter_context(TemporaryDirectory())) / "video"
        storage.fetch_file(uri, path)  # each video is read once, so it does not enter the cache
        return path
