"""Chooses the clips of a dataset that are held out of training for validation.

Whole videos are held out, in the order of a hash of the video id, until at least the requested
number of clips is out. The choice depends only on the clips, so it is the same on every machine.
Runs that began before held out single clips instead: the last ones of the dataset.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipelines.artifacts.manifest import clip_hash
from pipelines.common import storage
from pipelines.feed.plan import IntArray


class HasVideos(Protocol):
    """A dataset in shards whose clips belong to videos."""

    shard_sizes: list[int]

    def videos(self, shard: int) -> list[tuple[str, str]]:
        """Return the id and the URI of the video of each clip of a shard."""
        ...


@dataclass(frozen=True)
class HeldOut:
    """The clips of a dataset that are held out."""

    rows: dict[int, IntArray] = field(default_factory=dict)
    """Rows of each shard with held-out clips, ascending."""
    videos: tuple[str, ...] = ()
    """Ids of the held-out videos; empty if single clips are held out."""

    @property
    def num_clips(self) -> int:
        """Number of held-out clips."""
        return sum(len(rows) for rows in self.rows.values())

    def places(self) -> list[tuple[int, int]]:
        """Return shard and row of each held-out clip, in ascending order."""
        return [(shard, row) for shard in sorted(self.rows) for row in self.rows[shard].tolist()]

    def write(self, uri: str, digest: str, clips: int) -> None:
        """Write the choice to a JSON file.

        Args:
            uri: The file.
            digest: Digest of the dataset's contents.
            clips: Requested number of clips.
        """
        record = {
            "dataset_digest": digest,
            "requested_clips": clips,
            "clips": self.num_clips,
            "videos": list(self.videos),
            "rows": {str(shard): rows.tolist() for shard, rows in sorted(self.rows.items())},
        }
        storage.write_json(uri, record)


def read_held_out(uri: str, digest: str, clips: int) -> HeldOut | None:
    """Read a choice; return None if it does not exist or was made for other contents or numbers."""
    if not storage.exists(uri):
        return None
    record: dict[str, Any] = storage.read_json(uri)
    if (record["dataset_digest"], record["requested_clips"]) != (digest, clips):
        return None
    rows = {int(shard): np.array(rows, np.int64) for shard, rows in record["rows"].items()}
    return HeldOut(rows, tuple(record["videos"]))


def hold_out_videos(dataset: HasVideos, clips: int) -> HeldOut:
    """Hold out whole videos, until at least `clips` clips are out.

    Args:
        dataset: The dataset.
        clips: Number of clips; 0 holds out none.
    """
    if clips == 0:
        return HeldOut()
    ids, shards, rows = [], [], []
    for shard, hashes in enumerate(_hashed_videos(dataset)):
        ids.append(hashes)
        shards.append(np.full(len(hashes), shard, dtype=np.int64))
        rows.append(np.arange(len(hashes), dtype=np.int64))
    hashes, shard, row = np.concatenate(ids), np.concatenate(shards), np.concatenate(rows)
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    videos = min(int(np.searchsorted(counts.cumsum(), clips)) + 1, len(counts))
    chosen = np.flatnonzero(hashes <= hashes[first[videos - 1]])
    shard, row = shard[chosen], row[chosen]
    held = {number: row[shard == number] for number in np.unique(shard).tolist()}
    names: set[str] = set()
    for number, inside in held.items():
        of_shard = dataset.videos(number)
        names.update(of_shard[place][0] for place in inside.tolist())
    return HeldOut(held, tuple(sorted(names, key=clip_hash)))


def hold_out_last(shard_sizes: Sequence[int], clips: int) -> HeldOut:
    """Hold out the last clips of a dataset, as runs of earlier versions did."""
    held: dict[int, IntArray] = {}
    for shard in reversed(range(len(shard_sizes))):
        taken = min(shard_sizes[shard], clips)
        clips -= taken
        if taken:
            held[shard] = np.arange(shard_sizes[shard] - taken, shard_sizes[shard], dtype=np.int64)
    return HeldOut(held)


def _hashed_videos(dataset: HasVideos) -> Iterator[npt.NDArray[np.uint64]]:
    """Yield the hashes of the video ids of each shard."""

    def read(shard: int) -> npt.NDArray[np.uint64]:
        names = [video_id for video_id, _ in dataset.videos(shard)]
        return np.array([clip_hash(name) for name in names], dtype=np.uint64)

    with ThreadPoolExecutor(storage.READERS) as pool:
        yield from pool.map(read, range(len(dataset.shard_sizes)))
