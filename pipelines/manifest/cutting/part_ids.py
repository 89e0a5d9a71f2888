"""Ids of the parts of clips, and clips of a manifest whose own id a part of another one may get."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from pipelines.artifacts.manifest import BUFFER_ROWS, clip_hash

DIGITS = 6
_PART = re.compile(rf"(.*)_\d{{{DIGITS},}}", re.DOTALL)


def part_id(clip_id: str, number: int) -> str:
    """Return the id of a part of a clip."""
    return f"{clip_id}_{number:0{DIGITS}d}"


def whole_of(clip_id: str) -> str | None:
    """Return the id of the clip whose part would have this id; None if none would."""
    found = _PART.fullmatch(clip_id)
    return None if found is None else found.group(1)


def ids_like_parts(manifest: Path) -> frozenset[str]:
    """Return the ids in a manifest that a part of another clip in it may get.

    Of clips whose ids have the form of a part's, only hashes are kept in memory.
    """
    wholes = np.unique(
        np.fromiter((clip_hash(whole) for _, whole in _with_wholes(manifest)), dtype=np.uint64)
    )
    if not len(wholes):
        return frozenset()
    there = _present(manifest, wholes)
    return frozenset(
        clip_id for clip_id, whole in _with_wholes(manifest) if clip_hash(whole) in there
    )


def _with_wholes(manifest: Path) -> Iterator[tuple[str, str]]:
    """Iterate over the ids that have the form of a part's, each with the id of the whole."""
    with pq.ParquetFile(manifest) as file:
        for batch in file.iter_batches(BUFFER_ROWS, columns=["clip_id"]):
            for clip_id in batch["clip_id"].to_pylist():
                whole = whole_of(clip_id)
                if whole is not None:
                    yield clip_id, whole


def _present(manifest: Path, hashes: npt.NDArray[np.uint64]) -> set[int]:
    """Return those of some hashes that clips of a manifest have."""
    found: set[int] = set()
    with pq.ParquetFile(manifest) as file:
        for batch in file.iter_batches(BUFFER_ROWS, columns=["clip_hash"]):
            found.update(np.intersect1d(batch["clip_hash"].to_numpy(), hashes).tolist())
    return found
