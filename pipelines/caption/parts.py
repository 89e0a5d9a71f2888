"""The parts of a captioning: their clips, the files that they leave, and the new manifest.

A part is a few clips of one shard of the data. The division does not depend on the workers. The new
manifest is put together from all parts, a piece at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifacts.manifest import ROWS_PER_GROUP, ManifestRows, clip_hash
from pipelines.artifacts.manifest import SCHEMA as MANIFEST_SCHEMA
from pipelines.common import storage
from pipelines.feed.sources import ClipSource
from stgt.errors import ManifestError

CLIPS_PER_PART = 128
"""Two row groups of a store."""
ROWS_AT_A_TIME = 50 * ROWS_PER_GROUP
SCHEMA = pa.schema(
    [
        ("clip_hash", pa.uint64()),
        ("clip_id", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("reason", pa.string()),
    ]
)
"""Columns of a part: the captions of each clip, or the reason why it has none."""
EMPTY_CAPTION = "empty_caption"
"""Reason of a clip for which the model wrote no word."""
NOT_IN_STORE = "not_in_store"
"""Reason of a clip of the manifest that the clip store does not contain."""

Extras = Callable[[str, list[str]], str]


def part_uri(folder: str, part: int) -> str:
    """Return the file with the captions of a part."""
    return storage.join(folder, f"{part:05d}.parquet")


def parts_of(source: ClipSource, wanted: npt.NDArray[np.uint64]) -> list[dict[str, Any]]:
    """Divide the clips that are in a data set and in the manifest into parts, as items of work.

    Args:
        source: The data set with the frames.
        wanted: [rows] uint64, hashes of the ids of the manifest, ascending.

    Returns:
        Items with `part`, `shard` and `rows`.
    """

    def rows_of(shard: int) -> npt.NDArray[np.int64]:
        ids = source.clip_ids(shard)
        hashes = np.fromiter(map(clip_hash, ids), dtype=np.uint64, count=len(ids))
        place = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        return np.flatnonzero(wanted[place] == hashes)

    items: list[dict[str, Any]] = []
    with ThreadPoolExecutor(storage.READERS) as pool:
        for shard, rows in enumerate(pool.map(rows_of, range(len(source.shard_sizes)))):
            for start in range(0, len(rows), CLIPS_PER_PART):
                some = rows[start : start + CLIPS_PER_PART]
                items.append({"part": len(items), "shard": shard, "rows": some.tolist()})
    return items


def is_bad(reason: str | None) -> bool:
    """Return whether a clip has no captions because it cannot be decoded."""
    return reason not in (None, EMPTY_CAPTION)


def read_part(folder: str, part: int) -> list[dict[str, Any]]:
    """Read the captions of a part, in the order of its clips; empty if it is not there yet."""
    uri = part_uri(folder, part)
    return storage.read_table(uri).to_pylist() if storage.exists(uri) else []


def count_left(folder: str, items: list[dict[str, Any]], decodes: bool) -> list[int]:
    """Return the number of clips of each part that are still to be captioned.

    Args:
        folder: Folder of the parts.
        items: The parts.
        decodes: Whether videos are decoded. Those that failed may have been repaired since, so
            their clips are tried again.
    """
    there = set(storage.list_names(folder))

    def left(item: dict[str, Any]) -> int:
        uri = part_uri(folder, item["part"])
        if storage.name_of(uri) not in there:
            return len(item["rows"])
        if not decodes:
            return 0
        return sum(map(is_bad, storage.read_table(uri, ["reason"])["reason"].to_pylist()))

    with ThreadPoolExecutor(storage.READERS) as pool:
        return list(pool.map(left, items))


@dataclass(frozen=True)
class Written:
    """What a new manifest contains."""

    clips: int
    """Rows of the manifest."""
    captioned: int
    """Rows with generated captions."""
    captions: int
    """Generated captions of all rows."""
    missing: dict[str, int]
    """Number of clips without generated captions, by reason."""


def read_parts(folder: str, count: int) -> pa.Table:
    """Read all parts, sorted by the hash of the clip's id."""
    uris = [part_uri(folder, part) for part in range(count)]
    with ThreadPoolExecutor(storage.READERS) as pool:
        tables = list(pool.map(storage.read_table, uris))
    return pa.concat_tables([SCHEMA.empty_table(), *tables]).sort_by("clip_hash")


def write_manifest(uri: str, manifest: str, captions: pa.Table, extras: Extras) -> Written:
    """Write the rows of a manifest with the captions of their clips.

    Args:
        uri: The new manifest.
        manifest: The manifest that was captioned.
        captions: Table of all parts, from `read_parts`.
        extras: Returns the new extras of a row, from the present ones and its captions.

    Raises:
        ManifestError: The extras of a row are not a JSON object.
    """
    rows = ManifestRows(manifest)
    hashes = captions["clip_hash"].to_numpy()
    captioned = total = 0
    missing: Counter[str] = Counter()
    schema = MANIFEST_SCHEMA
    with storage.writing(uri) as path, pq.ParquetWriter(path, schema, compression="zstd") as out:
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            table = rows.table(start, start + ROWS_AT_A_TIME).select(schema.names)
            own = table["clip_hash"].to_numpy()
            first, last = np.searchsorted(hashes, own[0]), np.searchsorted(hashes, own[-1], "right")
            found = {
                row["clip_id"]: row
                for row in captions.slice(int(first), int(last - first)).to_pylist()
            }
            texts = []
            ids, before = (table[name].to_pylist() for name in ("clip_id", "extras"))
            for clip_id, value in zip(ids, before, strict=True):
                row = found.get(clip_id, {"captions": [], "reason": NOT_IN_STORE})
                try:
                    texts.append(extras(value, row["captions"]))
                except ValueError as error:
                    raise ManifestError(
                        f"{manifest}: clip {clip_id}: {error}; make the manifest again with "
                        "python -m jobs.manifest"
                    ) from error
                captioned += bool(row["captions"])
                total += len(row["captions"])
                if not row["captions"]:
                    missing[row["reason"]] += 1
            place = schema.get_field_index("extras")
            changed = table.set_column(place, schema.field(place), pa.array(texts, pa.string()))
            out.write_table(changed.cast(schema), ROWS_PER_GROUP)
    return Written(len(rows), captioned, total, dict(sorted(missing.items())))
