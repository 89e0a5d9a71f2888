"""Reads tables by the extension of the file: CSV, JSON, JSON lines, Parquet and Arrow."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.manifest.formats import csv_tables, json_files, opening
from stgt.errors import ManifestError

TEXT_TABLES = ("csv", "tsv")
JSON_LINES = ("jsonl", "ndjson")
ARROW_FILES = ("arrow", "feather")
EXTENSIONS = (*TEXT_TABLES, *JSON_LINES, "json", "parquet", *ARROW_FILES)
ROWS_PER_BATCH = 10_000
ROWS_WITH_VIDEOS_PER_BATCH = 8
"""Rows held in memory at a time if a column contains whole files."""
NO_HINT = ""


def rows(
    file: str,
    required: tuple[str, ...],
    what_to_do: str = NO_HINT,
    used: Collection[str] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yield the number and the values of each row of a table.

    Args:
        file: The file.
        required: Names of required columns; the first one identifies a row.
        what_to_do: End of the message if a column is missing.
        used: Names of the columns that the caller uses; None means all.

    Raises:
        ManifestError: A required column is missing, or the extension or content is unknown.
    """
    extension = opening.extension(file)
    if extension in TEXT_TABLES:
        yield from csv_tables.csv_rows(file, required, what_to_do, used)
    elif extension in JSON_LINES:
        yield from _with_columns(file, json_files.json_lines(file), required, what_to_do)
    elif extension == "json":
        yield from _with_columns(file, json_files.json_list(file), required, what_to_do)
    elif extension == "parquet":
        yield from parquet_rows(file, required, what_to_do)
    elif extension in ARROW_FILES:
        yield from _arrow_rows(file, required, what_to_do)
    else:
        raise ManifestError(
            f"{file}: unknown format; generic files must end in .csv, .tsv, .jsonl, .json, "
            ".parquet, .arrow or .feather, and may be compressed (.gz, .bz2, .xz, .zip)"
        )


def _with_columns(
    file: str, values: Iterator[tuple[int, Any]], required: tuple[str, ...], what_to_do: str
) -> Iterator[tuple[int, Any]]:
    """Yield the same rows after checking that the first one has the required columns."""
    is_checked = False
    for number, row in values:
        if not is_checked and isinstance(row, dict):
            is_checked = True
            csv_tables.require_columns(file, required, list(row), what_to_do)
        yield number, row


def parquet_rows(
    file: str, required: tuple[str, ...], what_to_do: str = NO_HINT
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the values of each row of a Parquet file.

    Raises:
        ManifestError: The file is not a Parquet file, or a required column is missing or repeated.
    """
    with opening.open_binary(file) as binary:
        seekable = binary if binary.seekable() else pa.BufferReader(binary.read())
        try:
            parquet = pq.ParquetFile(seekable)
        except pa.ArrowInvalid as error:
            raise ManifestError(f"{file} is not a Parquet file: {error}") from error
        schema = parquet.schema_arrow
        _check_columns(file, schema, required, what_to_do)
        size = ROWS_WITH_VIDEOS_PER_BATCH if _has_binary(schema) else ROWS_PER_BATCH
        yield from _numbered(parquet.iter_batches(size))


def _arrow_rows(
    file: str, required: tuple[str, ...], what_to_do: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield rows of an Arrow file, in the file or the stream format."""
    with opening.open_binary(file) as binary:
        data = binary if binary.seekable() else pa.BufferReader(binary.read())
        try:
            try:
                reader: Any = pa.ipc.open_file(data)
                batches = (reader.get_batch(place) for place in range(reader.num_record_batches))
            except pa.ArrowInvalid:
                data.seek(0)
                reader = batches = pa.ipc.open_stream(data)
            _check_columns(file, reader.schema, required, what_to_do)
            yield from _numbered(_smaller(batches, _has_binary(reader.schema)))
        except pa.ArrowInvalid as error:
            raise ManifestError(f"{file} is not a valid Arrow file: {error}") from error


def _smaller(batches: Any, has_videos: bool) -> Iterator[pa.RecordBatch]:
    size = ROWS_WITH_VIDEOS_PER_BATCH if has_videos else ROWS_PER_BATCH
    for batch in batches:
        for start in range(0, batch.num_rows, size):
            yield batch.slice(start, size)


def _numbered(batches: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _check_columns(
    file: str, schema: pa.Schema, required: tuple[str, ...], what_to_do: str
) -> None:
    csv_tables.require_columns(file, required, schema.names, what_to_do)
    if repeated := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise ManifestError(
            f"{file} has several columns named {', '.join(repeated)}; rename or remove all but one"
        )


def _has_binary(schema: pa.Schema) -> bool:
    """Return whether a column contains binary data, on its own or in a struct with a path."""
    return any(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        for field in schema
        for kind in [field.type, *_members(field.type)]
    )


def _members(kind: pa.DataType) -> list[pa.DataType]:
    if not pa.types.is_struct(kind):
        return []
    return [kind.field(place).type for place in range(kind.num_fields)]
