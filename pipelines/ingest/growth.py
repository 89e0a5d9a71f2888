"""Compares the rows of a store with a changed manifest.

A row stays in its shard as long as its clip id, video and time span stay the same. All other rows
of the store leave, and all other rows of the manifest are added, as additional shards. Both
manifests are sorted by the same hash. They are compared piece by piece, without Python objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts.manifest import ManifestRows
from pipelines.ingest.shard_rows import ShardNumbers

COMPARED_ROWS = 20_000
"""Largest number of rows of each manifest that are compared at a time."""
SPAN = ("start_s", "end_s")
CAPTIONS = "captions"
DETAILS = ("video_id", "split", "source", "extras", CAPTIONS)
"""Columns whose values may change without decoding the clip again."""
COMPARED = ["clip_id", "video_uri", *SPAN, *DETAILS]
ADDED = -1

Mask = npt.NDArray[np.bool_]
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class StoredRows:
    """The rows of a store, as they were before its manifest changed."""

    manifest: ManifestRows
    shard_of: ShardNumbers
    """[rows] int32: shard of each row. Rows of the manifest beyond these are not in the store."""
    uncertain: Mask | None = None
    """[rows] bool, True for rows of which only id and video are known. None if there are none."""


@dataclass(frozen=True)
class Difference:
    """What becomes of the rows of a store when its manifest changes."""

    shard_of: ShardNumbers
    """[rows of the new manifest] int32: shard that contains the row already; -1 for added rows."""
    removed: int
    """Number of rows that leave the store."""
    moved: int
    """How many of them return as added rows, with another video or time span."""
    changed: int
    """Number of rows that stay and whose captions, split or other details differ."""
    recaptioned: int
    """How many of them have other captions."""
    revised: npt.NDArray[np.int64]
    """Shards with removed or changed rows, ascending."""

    @property
    def added(self) -> int:
        """Number of rows that the store does not contain yet."""
        return int((self.shard_of == ADDED).sum())


def compare(stored: StoredRows, manifest: ManifestRows, rows: int) -> Difference:
    """Compare the rows of a store with the first rows of a manifest."""
    before = stored.manifest.hashes()[: len(stored.shard_of)]
    now = manifest.hashes()[:rows]
    shard_of = np.full(rows, ADDED, dtype=np.int32)
    stays = np.zeros(len(before), dtype=bool)
    is_revised = np.zeros(int(stored.shard_of.max(initial=-1)) + 1, dtype=bool)
    moved = changed = recaptioned = 0
    for old, new in _pieces(before, now):
        # Rows of a piece with equal hashes, as numbers of rows within the piece.
        place = np.searchsorted(now[new], before[old])
        found = place < new.stop - new.start
        found[found] = now[new][place[found]] == before[old][found]
        left, right = np.flatnonzero(found), place[found]
        tables = [
            _read(source, part, picked)
            for source, part, picked in ((stored.manifest, old, left), (manifest, new, right))
        ]
        unknown = np.zeros(len(left), dtype=bool)
        if stored.uncertain is not None:
            unknown = stored.uncertain[old][left]
        same_id = _equal_texts(*tables, "clip_id")
        same = same_id & _equal_texts(*tables, "video_uri")
        for name in SPAN:
            same &= unknown | _equal_numbers(*tables, name)
        equal = {name: _equal_details(*tables, name) for name in DETAILS}
        differs = same & ~unknown & ~np.logical_and.reduce(list(equal.values()))
        shards = stored.shard_of[old][left]
        stays[old.start + left[same]] = True
        shard_of[new.start + right[same]] = shards[same]
        is_revised[shards[differs]] = True
        moved += int((same_id & ~same).sum())
        changed += int(differs.sum())
        recaptioned += int((differs & ~equal[CAPTIONS]).sum())
    is_revised[stored.shard_of[~stays]] = True
    pa.default_memory_pool().release_unused()  # the driver needs the memory for other things now
    return Difference(
        shard_of=shard_of,
        removed=int((~stays).sum()),
        moved=moved,
        changed=changed,
        recaptioned=recaptioned,
        revised=np.flatnonzero(is_revised),
    )


def _pieces(before: Hashes, now: Hashes) -> Iterator[tuple[slice, slice]]:
    """Yield pieces of two sorted arrays that contain all equal values, of bounded size."""
    i = j = 0
    while i < len(before) and j < len(now):
        last = min(
            before[min(i + COMPARED_ROWS, len(before)) - 1],
            now[min(j + COMPARED_ROWS, len(now)) - 1],
        )
        old = slice(i, int(np.searchsorted(before, last, side="right")))
        new = slice(j, int(np.searchsorted(now, last, side="right")))
        if old.stop > i and new.stop > j:
            yield old, new
        i, j = old.stop, new.stop


def _read(manifest: ManifestRows, piece: slice, picked: npt.NDArray[np.int64]) -> pa.Table:
    """Read the compared columns of some rows of a piece, which are mostly all of them."""
    table = manifest.table(piece.start, piece.stop, COMPARED)
    return table if len(picked) == len(table) else table.take(picked)


def _equal_texts(left: pa.Table, right: pa.Table, name: str) -> Mask:
    same = pc.call_function("equal", [left[name], right[name]])
    return same.fill_null(False).to_numpy().astype(bool)


def _equal_numbers(left: pa.Table, right: pa.Table, name: str) -> Mask:
    a, b = left[name].to_numpy(), right[name].to_numpy()  # null becomes NaN
    return (a == b) | (np.isnan(a) & np.isnan(b))


def _equal_details(left: pa.Table, right: pa.Table, name: str) -> Mask:
    if left[name].equals(right[name]):
        return np.ones(len(left), dtype=bool)
    is_list = pa.types.is_list(left.schema.field(name).type)
    return (_equal_lists if is_list else _equal_texts)(left, right, name)


def _equal_lists(left: pa.Table, right: pa.Table, name: str) -> Mask:
    lengths = [
        pc.call_function("list_value_length", [table[name]]).fill_null(0).to_numpy()
        for table in (left, right)
    ]
    same = lengths[0] == lengths[1]
    texts = [
        pc.call_function("list_flatten", [table[name].filter(pa.array(same))])
        for table in (left, right)
    ]
    equal = pc.call_function("equal", texts).fill_null(False).to_numpy().astype(bool)
    row_of = np.repeat(np.flatnonzero(same), lengths[0][same])
    same[row_of[~equal]] = False
    return same
