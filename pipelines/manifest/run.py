"""Writes the clip manifest: reads annotations, rejects unusable rows, and sorts clips by id hash.

Clips with the same id are merged if the format allows several rows per clip. Otherwise, equal rows
are dropped and counted, and rows that contradict each other are an error.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.artifacts.manifest import (
    BUFFER_ROWS,
    ROWS_PER_GROUP,
    SCHEMA,
    clip_hash,
    is_web_address,
)
from pipelines.common import storage, tars
from pipelines.common.config import without_credentials
from pipelines.common.output_folder import write_config_beside
from pipelines.manifest import published
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.formats import (
    activitynet,
    alpro,
    didemo,
    folder,
    generic,
    internvid,
    lavis,
    lsmdc,
    msrvtt,
    msrvtt_qa,
    msvd,
    msvd_qa,
    opening,
    panda70m,
    urls,
    vatex,
    vidal,
    video2dataset,
    vript,
    webdataset,
    webvid,
    youcook2,
)
from pipelines.manifest.formats.files import AmbiguousVideo
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows
from stgt.errors import ManifestError

logger = logging.getLogger(__name__)

BUCKET_BITS = 6

NUM_BUCKETS = 2**BUCKET_BITS

SHOWN_DUPLICATES = 5

SHOWN_FILES = 5

SCHEME = "s3://"
"""Remote videos that can be fetched."""

REPORT_EVERY_S = 5.0

LOOKED_AT = 1000

READERS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        webvid,
        vidal,
        msrvtt,
        didemo,
        lsmdc,
        msvd,
        msrvtt_qa,
        msvd_qa,
        lavis,
        alpro,
        panda70m,
        internvid,
        vatex,
        activitynet,
        youcook2,
        vript,
        video2dataset,
        urls,
        folder,
        webdataset,
        generic,
    )
}
"""Reader module of each format. It has `read(source)` and `MERGES`: whether a clip may have several
rows. One that lists the videos themselves has `FINDS_VIDEOS`, and one whose sources may have chosen
the same id independently has `REJECTS_REPEATED`: all but the first clip with an id are rejected."""


class ManifestSummary(TypedDict):
    """Result of `run_manifest`."""

    manifest: str
    clips: int
    captions: int
    rejected: int
    rejected_rows: str | None
    equal_rows_dropped: int


class _Buckets:
    """Rows on disk, partitioned by the first bits of their hash and sorted within each partition.

    A manifest of any length can thus be sorted with the memory for one partition.
    """

    def __init__(self, folder: Path) -> None:
        self._paths = [folder / f"{bucket:02d}.parquet" for bucket in range(NUM_BUCKETS)]
        self._writers: dict[int, pq.ParquetWriter] = {}
        self._buffer: list[ClipRow] = []
        self.num_rows = 0
        self.num_without_captions = 0

    def add(self, row: ClipRow) -> None:
        """Add a row."""
        self._buffer.append(row)
        self.num_without_captions += not row.captions
        self.num_rows += 1
        if len(self._buffer) >= BUFFER_ROWS:
            self._flush()

    def _flush(self) -> None:
        hashes = np.array([clip_hash(row.clip_id) for row in self._buffer], dtype=np.uint64)
        first = self.num_rows - len(self._buffer)
        columns: dict[str, Any] = {
            field.name: [getattr(row, field.name) for row in self._buffer]
            for field in SCHEMA
            if field.name not in ("clip_hash", "extras")
        }
        extras = [json.dumps(row.extras, sort_keys=True, default=str) for row in self._buffer]
        table = pa.table(
            {**columns, "clip_hash": hashes, "extras": extras, "sequence": _counted(first, hashes)},
            schema=SCHEMA.append(pa.field("sequence", pa.int64(), nullable=False)),
        )
        bucket_of = hashes >> np.uint64(64 - BUCKET_BITS)
        for bucket in np.unique(bucket_of):
            part = table.take(np.flatnonzero(bucket_of == bucket))
            writer = self._writers.get(int(bucket))
            if writer is None:
                writer = pq.ParquetWriter(self._paths[int(bucket)], part.schema)
                self._writers[int(bucket)] = writer
            writer.write_table(part)
        self._buffer.clear()

    def sorted_tables(self) -> Iterator[pa.Table]:
        """Iterate over all rows, sorted by hash, id and arrival, one partition at a time."""
        self._flush()
        for writer in self._writers.values():
            writer.close()
        for bucket in sorted(self._writers):
            table = pq.read_table(self._paths[bucket])
            yield table.sort_by(
                [("clip_hash", "ascending"), ("clip_id", "ascending"), ("sequence", "ascending")]
            )


def _counted(first: int, rows: np.ndarray) -> np.ndarray:
    return np.arange(first, first + len(rows), dtype=np.int64)


class _Rejects:
    """Writes rejected rows to a file, which is created only if there are any."""

    SCHEMA = pa.schema([("file", pa.string()), ("row", pa.int64()), ("reason", pa.string())])

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.first: BadRow | None = None
        self._buffer: list[BadRow] = []
        self._writer: pq.ParquetWriter | None = None

    def add(self, row: BadRow) -> None:
        """Add a row."""
        self.first = self.first or row
        self.count += 1
        self._buffer.append(row)
        if len(self._buffer) >= BUFFER_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, self.SCHEMA)
        columns = {name: [getattr(row, name) for row in self._buffer] for name in self.SCHEMA.names}
        self._writer.write_table(pa.table(columns, schema=self.SCHEMA))
        self._buffer.clear()

    def close(self) -> None:
        """Write the remaining rows and close the file."""
        if self._buffer:
            self._flush()
        if self._writer is not None:
            self._writer.close()


def _repeated(table: pa.Table) -> np.ndarray:
    """Return [rows] bool: whether a row belongs to the same clip as the previous row."""
    ids = table["clip_id"].combine_chunks()
    same = np.zeros(len(ids), dtype=bool)
    if len(ids) > 1:
        same[1:] = pc.call_function("equal", [ids.slice(1), ids.slice(0, len(ids) - 1)]).to_numpy(
            zero_copy_only=False
        )
    return same


def _merged(table: pa.Table, repeated: np.ndarray, annotations: str) -> pa.Table:
    """Merge rows of the same clip: join captions and lists of extras in order of arrival."""
    if not repeated.any():
        return table
    result: list[dict[str, Any]] = []
    for row, again in zip(table.to_pylist(), repeated, strict=True):
        if not again:
            result.append(row)
            continue
        before = result[-1]
        for name in ("video_uri", "split", "start_s", "end_s"):
            if before[name] != row[name] and not (
                name == "start_s" and _is_same_start(before, row)
            ):
                raise ManifestError(
                    f"{annotations}: clip {row['clip_id']} has both {name} {before[name]!r} and "
                    f"{row[name]!r}; give the two clips different ids"
                )
        before["captions"] += row["captions"]
        extras, more = json.loads(before["extras"]), json.loads(row["extras"])
        for name, value in more.items():
            known = extras.setdefault(name, value)
            if known is not value and isinstance(known, list) and isinstance(value, list):
                known += value
        before["extras"] = json.dumps(extras, sort_keys=True)
    return pa.Table.from_pylist(result, schema=table.schema)


def _is_same_start(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two clips begin at the same time; without a start, that is at 0 s."""
    return (one["start_s"] or 0.0) == (other["start_s"] or 0.0)


def _without_repeated(
    table: pa.Table, repeated: np.ndarray
) -> tuple[pa.Table, int, list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Keep the first row of each clip.

    Returns:
        The table, the number of dropped rows that are equal to the first one of their clip, and
        the first and the other row where they differ.
    """
    if not repeated.any():
        return table, 0, []
    kept: list[int] = []
    conflicts: list[tuple[dict[str, Any], dict[str, Any]]] = []
    rows = table.drop_columns(["clip_hash"]).to_pylist()
    for place, (row, again) in enumerate(zip(rows, repeated, strict=True)):
        if not again:
            kept.append(place)
        elif _differing(row, first := rows[kept[-1]]):
            conflicts.append((first, row))
    return table.take(kept), len(table) - len(kept) - len(conflicts), conflicts


def _differing(row: dict[str, Any], first: dict[str, Any]) -> set[str]:
    """Return the names of the columns in which two rows of a clip differ."""
    return {name for name in row if name != "sequence" and row[name] != first[name]}


def run_manifest(
    config: ManifestConfig, connect: Callable[[ManifestConfig], None] | None = None
) -> ManifestSummary:
    """Read annotations in a dataset's format; write the manifest and a file of rejected rows.

    Args:
        config: What to read and write.
        connect: Called once before Ray is needed, which is only to cut videos into clips.

    Raises:
        ManifestError: The annotations cannot be read, a local videos folder is missing or empty,
            the local folders contain none of the videos, two different clips have the same id, or
            no row is usable.
    """
    videos = tuple(storage.resolve(uri) for uri in config.videos)
    finds_videos = getattr(READERS[config.format], "FINDS_VIDEOS", False)
    for uri in videos:
        if storage.is_local(uri) and storage.is_empty(uri) and not finds_videos:
            raise ManifestError(
                f"videos folder {uri} is missing or empty; give the folder that contains the videos"
            )
    output = storage.resolve(config.output)
    storage.check_output_file(output)
    name = output.removesuffix(".parquet")
    with TemporaryDirectory() as scratch, ExitStack() as stack:
        (Path(scratch) / "annotations").mkdir()
        annotations = tuple(storage.resolve(uri) for uri in config.annotations)
        source = AnnotationSource(
            annotations=annotations
            if finds_videos
            else opening.prepare(annotations, Path(scratch) / "annotations"),
            videos=videos,
            split=config.split,
            caption=config.caption,
            columns=_columns(config.columns),
            media=f"{name}.videos",
        )
        buckets = _Buckets(Path(scratch))
        rejects = _Rejects(Path(scratch) / "rejected.parquet")
        _read(config, source, buckets, rejects)
        path = Path(scratch) / "manifest.parquet"
        num_rows = rejects.count + buckets.num_rows
        merges = READERS[config.format].MERGES
        clips, captions, dropped = _write(config, buckets, rejects, path, merges)
        if config.cutting.changes_clips:
            # What was found out about videos is kept until the new manifest is written.
            cut = _cut(config, path, name, connect, stack)
            clips, captions = _write_cut(config, cut, rejects, path)
        elif finds_videos and buckets.num_without_captions:
            logger.info(
                "manifest: %s of %s clips have no caption; python -m jobs.caption writes captions",
                f"{buckets.num_without_captions:,}",
                f"{clips:,}",
            )
        rejects.close()
        if dropped:
            logger.warning("%d rows that equal an earlier row were dropped", dropped)
        listed, rejected_uri = f"{name}.rejected.parquet", None
        if not rejects.count:
            storage.remove(listed)  # the list of an earlier run
        else:
            rejected_uri = listed
            storage.put_file(rejects.path, rejected_uri)
            logger.warning(
                "%d of %d rows were rejected; they are listed in %s",
                rejects.count,
                num_rows,
                rejected_uri,
            )
        storage.put_file(path, output)
        write_config_beside(output, "manifest", config)
    summary = ManifestSummary(
        manifest=output,
        clips=clips,
        captions=captions,
        rejected=rejects.count,
        rejected_rows=rejected_uri,
        equal_rows_dropped=dropped,
    )
    if config.check is not None:
        found = published.FoundCounts(clips, captions, rejects.count, dropped)
        published.compare(config.check, output, found)
    return summary


def _cut(
    config: ManifestConfig,
    path: Path,
    name: str,
    connect: Callable[[ManifestConfig], None] | None,
    stack: ExitStack,
) -> Rows:
    """Return the rows that those of a manifest are cut into."""
    from pipelines.manifest.cutting.run import run_cutting

    scratch = path.parent / "cutting"
    scratch.mkdir()
    connected = functools.partial(connect, config) if connect is not None else lambda: None
    return stack.enter_context(run_cutting(config.cutting, path, name, scratch, connected))


def _write_cut(
    config: ManifestConfig, rows: Rows, rejects: _Rejects, path: Path
) -> tuple[int, int]:
    """Write the manifest of clips that were cut; return the numbers of clips and captions.

    Raises:
        ManifestError: There is none.
    """
    scratch = path.parent / "cut"
    scratch.mkdir()
    buckets = _Buckets(scratch)
    first: BadRow | None = None
    for row in rows:
        if isinstance(row, BadRow):
            first = first or row
            rejects.add(row)
        else:
            buckets.add(row)
    if buckets.num_rows == 0:
        raise ManifestError(f"none of the videos could be cut into clips; the first: {first}")
    clips, captions, _ = _write(config, buckets, rejects, path, merges=False)
    without = buckets.num_without_captions
    if config.cutting.subtitles and without:
        logger.warning("%s of %s clips have no caption", f"{without:,}", f"{clips:,}")
    return clips, captions


def _columns(pairs: tuple[str, ...]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise ManifestError(f"columns = {pair!r}: write NAME=COLUMN, such as caption=text")
    return dict(pair.split("=", 1) for pair in pairs)  # type: ignore[misc]


def _read(
    config: ManifestConfig, source: AnnotationSource, buckets: _Buckets, rejects: _Rejects
) -> None:
    """Read all rows of the annotations and separate usable from rejected ones."""
    some_video_is_there = getattr(READERS[config.format], "FINDS_VIDEOS", False)
    first: ClipRow | None = None
    reported = time.monotonic()
    named = _named(source.annotations or source.videos)
    for row in READERS[config.format].read(source):
        if isinstance(row, ClipRow) and config.first_s is not None:
            row = _beginning(row, config.first_s)
        if isinstance(row, ClipRow) and (reason := _fault(row, config.format)):
            # Readers do not number the clips that they yield, so count all rows so far.
            number = buckets.num_rows + rejects.count + 1
            row = BadRow(file=named, row=number, reason=reason)
        if isinstance(row, BadRow):
            rejects.add(row)
        else:
            first = first or row
            if not some_video_is_there and _is_looked_at(buckets.num_rows):
                uri = str(row.video_uri)
                some_video_is_there = storage.is_remote(uri) or tars.is_there(uri)
            buckets.add(row)
        if time.monotonic() - reported > REPORT_EVERY_S:
            reported = time.monotonic()
            logger.info("manifest: %s rows read", f"{buckets.num_rows + rejects.count:,}")
    some_video_is_there |= any(finder.has_found for finder in source.finders)
    example = ""
    if rejects.first:
        example = f"; {_rows(rejects.count)} rejected, the first is {rejects.first}"
    if first is None:
        raise ManifestError(
            f"{named}: none of the rows is usable, {rejects.count} were rejected"
            + (f"; the first is {rejects.first}" if rejects.first else "")
        )
    if not some_video_is_there:
        folders = ", ".join(source.videos)
        raise ManifestError(
            f"videos folder {folders} contains none of the {buckets.num_rows} videos listed "
            f"in {named}, as far as they were checked (the first is {first.video_uri}); give the "
            f"folder that contains the videos{example}"
        )


def _beginning(row: ClipRow, first_s: float) -> ClipRow:
    """Return a clip cut to its first seconds. A video that ends earlier is decoded to its end."""
    end_s = (row.start_s or 0.0) + first_s
    return replace(row, end_s=end_s if row.end_s is None else min(row.end_s, end_s))


def _named(files: tuple[str, ...]) -> str:
    """Return the names of files for a message; of many files, only the first ones."""
    more = len(files) - SHOWN_FILES
    return ", ".join(files[:SHOWN_FILES]) + (f" and {more} more files" if more > 0 else "")


def _rows(count: int) -> str:
    return "1 row was" if count == 1 else f"{count} rows were"


def _fault(row: ClipRow, format_name: str) -> str | None:
    """Return why a clip cannot be stored or fetched, or None if it can."""
    if isinstance(row.video_uri, AmbiguousVideo):
        return f"{row.clip_id}: {row.video_uri.reason}"
    texts = [row.clip_id, row.video_id, row.video_uri, row.split, row.source, *row.captions]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return f"{texts!r} contains a character that cannot be encoded as UTF-8"
    if "\0" in row.video_uri:
        return f"{row.video_uri!r} is not a valid path"
    if storage.is_remote(row.video_uri) and not row.video_uri.startswith(SCHEME):
        if is_web_address(row.video_uri):
            if format_name == urls.__name__.rpartition(".")[2]:
                return None
            return (
                f"{without_credentials(row.video_uri)}: URLs are read by --format urls only, and "
                "fetched by python -m jobs.fetch"
            )
        return f"{row.video_uri}: only local files and s3:// are supported; copy the video there"
    return None


def _is_looked_at(number: int) -> bool:
    """Return whether to look for a row's video: for each of the first rows, then occasionally."""
    return number < LOOKED_AT or number % LOOKED_AT == 0


def _write(
    config: ManifestConfig, buckets: _Buckets, rejects: _Rejects, path: Path, merges: bool
) -> tuple[int, int, int]:
    """Write the sorted manifest; return the numbers of clips, captions and dropped equal rows."""
    named = _named(config.annotations or config.videos)
    rejects_repeated = getattr(READERS[config.format], "REJECTS_REPEATED", False)
    conflicts: dict[str, set[str]] = {}
    clips = captions = dropped = 0
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for table in buckets.sorted_tables():
            repeated = _repeated(table)
            if merges:
                table = _merged(table, repeated, named)
            else:
                table, equal, pairs = _without_repeated(table, repeated)
                dropped += equal
                for first, row in pairs:
                    if rejects_repeated:
                        rejects.add(_repeated_id(first, row))
                    else:
                        differing = _differing(row, first)
                        conflicts.setdefault(row["clip_id"], set()).update(differing)
            clips += len(table)
            captions += int(
                pc.call_function(
                    "sum", [pc.call_function("list_value_length", [table["captions"]])]
                ).as_py()
            )
            writer.write_table(table.select(SCHEMA.names), ROWS_PER_GROUP)
    if conflicts:
        names = sorted(set().union(*conflicts.values()))
        raise ManifestError(
            f"{named}: {len(conflicts)} clip ids occur more than once "
            f"({', '.join(list(conflicts)[:SHOWN_DUPLICATES])}) with different values of "
            f"{', '.join(names)}; remove all but one row of each"
        )
    return clips, captions, dropped


def _repeated_id(first: dict[str, Any], row: dict[str, Any]) -> BadRow:
    return BadRow(
        file=row["video_uri"],
        row=row["sequence"] + 1,
        reason=f"another clip has the id {row['clip_id']} as well: {first['video_uri']}",
    )
