"""What became of each URL, in small tables while the job runs, and in one table at the end.

Workers write a table every few seconds. A run that was killed is continued from these tables and
from the files themselves: a file gets its name only when it is complete.
"""

from __future__ import annotations

import binascii
import logging
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.artifacts.manifest import URL_KEY_CHARACTERS
from pipelines.common import storage
from pipelines.common.digest_set import DIGEST, Digests
from pipelines.fetch.config import ChecksumName, FetchReason
from pipelines.fetch.hosts import host_of

logger = logging.getLogger(__name__)

TABLE = "downloads.parquet"
"""The final table, below the output folder."""
PIECES = "downloads"
"""Folder of the tables of a run in progress, below the output folder."""
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("file", pa.string()),
        pa.field("bytes", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("blake3", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
        pa.field("attempts", pa.int32(), nullable=False),
    ]
)
"""One row per URL. `url` is without credentials, and `key` is a hash of the whole URL. `file` is
below the output folder, and null if there is a reason why it is missing. A file has one of the two
checksums. `attempts` counts runs."""
ROWS_AT_A_TIME = 100_000
Mask = npt.NDArray[np.bool_]
"""[rows], whether something is true of each row."""
CHECKSUMS: tuple[ChecksumName, ...] = get_args(ChecksumName)

MAYBE_UNANSWERED: tuple[FetchReason, ...] = (
    "unreachable",
    "timeout",
    "invalid_url",
    "not_https",
    "blocked_address",
)
"""Reasons of URLs whose host may not have answered."""


def write_piece(output: str, rows: list[dict[str, Any]]) -> None:
    """Write a table of some URLs."""
    uri = storage.join(output, PIECES, f"{uuid.uuid4().hex}.parquet")
    storage.write_table(uri, pa.Table.from_pylist(rows, schema=SCHEMA))


def read_downloads(
    output: str,
    columns: Sequence[str] = SCHEMA.names,
    is_wanted: Callable[[Digests], Mask] | None = None,
) -> pa.Table:
    """Read what became of all URLs so far: one row per URL, sorted by `key`.

    A URL that was fetched in any run counts as fetched. Otherwise, its last failure counts.

    Args:
        output: The output folder.
        columns: Columns to read, among them `key`, `reason` and `attempts`.
        is_wanted: Tells which URLs to read from the digests of their keys. None reads all of them.
    """
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    folder = storage.join(output, PIECES)
    uris = [
        storage.join(folder, name)
        for name in storage.list_names(folder)
        if name.endswith(".parquet") and not name.startswith(".")
    ]
    if storage.exists(storage.join(output, TABLE)):
        uris.append(storage.join(output, TABLE))
    with ThreadPoolExecutor(storage.READERS) as pool:
        tables = list(pool.map(lambda uri: _read(uri, schema, is_wanted), uris))
    table = pa.concat_tables([schema.empty_table(), *tables])
    failed = pc.call_function("is_valid", [table["reason"]])
    ordered = table.append_column("failed", failed).sort_by(
        [("key", "ascending"), ("failed", "ascending"), ("attempts", "descending")]
    )
    keys = digests_of(ordered)
    first = np.ones(len(keys), dtype=bool)
    first[1:] = keys[1:] != keys[:-1]
    return ordered.filter(pa.array(first)).select(schema.names).combine_chunks()


@storage.patient
def _read(uri: str, schema: pa.Schema, is_wanted: Callable[[Digests], Mask] | None) -> pa.Table:
    """Read the wanted rows of a table. Columns that earlier versions did not write are null."""
    fs, path = storage.filesystem(uri)
    parts = [schema.empty_table()]
    with fs.open(path, "rb") as file:
        parquet = pq.ParquetFile(file)
        there = frozenset(parquet.schema_arrow.names)
        columns = [name for name in schema.names if name in there]
        for batch in parquet.iter_batches(ROWS_AT_A_TIME, columns=columns):
            part = pa.Table.from_batches([batch])
            for field in schema:
                if field.name not in there:
                    part = part.append_column(field, pa.nulls(len(part), field.type))
            if is_wanted is not None:
                part = part.filter(pa.array(is_wanted(digests_of(part))))
            parts.append(part.select(schema.names).cast(schema))
    return pa.concat_tables(parts)


def answering_hosts(table: pa.Table) -> frozenset[str]:
    """Return the hosts that have answered, as `host_of` gives them."""
    options = pc.SetLookupOptions(pa.array(MAYBE_UNANSWERED, pa.string()))
    silent = pc.call_function("is_in", [table["reason"]], options)
    urls = table["url"].filter(pc.call_function("invert", [silent]))
    beginnings = pc.call_function(
        "replace_substring_regex",
        [urls],
        pc.ReplaceSubstringOptions(r"(?s)^([^/]*//[^/?#]*).*", r"\1"),
    )
    return frozenset(host_of(url) for url in beginnings.unique().to_pylist())


def forget_gone(output: str, table: pa.Table) -> pa.Table:
    """Return the rows of a table without those whose file is no longer in the output folder.

    If there are any, the tables are written anew without them, so that they are fetched again.
    """
    files = table["file"].drop_null()
    folders = pc.call_function("utf8_slice_codeunits", [files], pc.SliceOptions(0, 2)).unique()

    def list_folder(name: str) -> list[str]:
        return [f"{name}/{one}" for one in storage.list_names(storage.join(output, name))]

    with ThreadPoolExecutor(storage.READERS) as pool:
        parts = [pa.array(one, pa.string()) for one in pool.map(list_folder, folders.to_pylist())]
    there = pa.concat_arrays([pa.array([], pa.string()), *parts])
    options = pc.SetLookupOptions(there)
    is_there = pc.call_function("is_in", [table["file"]], options)
    failed = pc.call_function("is_null", [table["file"]])
    kept = table.filter(pc.call_function("or", [is_there, failed]))
    if len(kept) < len(table):
        logger.warning("%d files are gone and are fetched again", len(table) - len(kept))
        finish_downloads(output, kept)
    return kept


def finish_downloads(output: str, table: pa.Table) -> None:
    """Write the final table, and remove those of the run."""
    storage.write_table(storage.join(output, TABLE), table)
    storage.remove(storage.join(output, PIECES))


def digests_of(table: pa.Table) -> Digests:
    """Return [rows], the column `key` as digests, which can be sorted and compared."""
    kind = pa.binary(URL_KEY_CHARACTERS)
    parts = [np.empty(0, dtype=DIGEST)]
    for chunk in table["key"].chunks:
        # Python strings of millions of rows would take more memory than the whole table.
        fixed = chunk.cast(pa.binary()).cast(kind)
        start = fixed.offset * URL_KEY_CHARACTERS
        digits = fixed.buffers()[1][start : start + len(fixed) * URL_KEY_CHARACTERS]
        parts.append(np.frombuffer(binascii.unhexlify(digits), dtype=DIGEST))
    return np.concatenate(parts)


def is_due(table: pa.Table, reasons: Sequence[str] | None) -> npt.NDArray[np.bool_]:
    """Return [rows] bool: whether a URL failed for one of the reasons.

    Args:
        table: URLs, as `read_downloads` returns them.
        reasons: Reasons to try again. None means none, and an empty list means all.
    """
    if reasons is None:
        return np.zeros(len(table), dtype=bool)
    failed = pc.call_function("is_valid", [table["reason"]])
    if reasons:
        options = pc.SetLookupOptions(pa.array(reasons, pa.string()))
        failed = pc.call_function("is_in", [table["reason"]], options)
    return failed.to_numpy(zero_copy_only=False).astype(bool)
