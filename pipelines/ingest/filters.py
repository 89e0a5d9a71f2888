"""Filters that exclude clips by size, duration or captions, or as duplicates.

Captions are checked before decoding, size and duration by the decoder process, and similarities and
duplicates after all clips are decoded. Among duplicates, the first usable clip in manifest order is
kept, so the result does not depend on how the work was divided.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.artifacts.clip_store import ShardRecord, shard_uri
from pipelines.artifacts.frame_hashes import NO_HASH, hashes_of, read_written
from pipelines.artifacts.manifest import clip_hash
from pipelines.common import storage
from pipelines.ingest.config import FilterConfig
from pipelines.ingest.near_duplicates import STAYS, near_duplicates_of
from pipelines.video.config import SamplingConfig
from stgt.inputs.caption_text import clean_caption

REASONS = {
    "too_small": "the shorter side has fewer pixels than filters.min_short_side",
    "too_short": "the clip is shorter than filters.min_duration_s",
    "too_long": "the clip is longer than filters.max_duration_s",
    "caption_too_short": "no caption has at least filters.min_caption_words words",
    "caption_too_long": "no caption has at most filters.max_caption_words words",
    "duplicate_caption": "another clip has the same captions",
    "duplicate_video": "another clip is the same time span of an identical file",
    "near_duplicate": "the frames look like those of an earlier clip",
    "low_similarity": "the similarity to the best caption is below filters.min_similarity",
}
"""Reason codes of the filters, with an explanation of each."""

OF_CAPTIONS = frozenset({"caption_too_short", "caption_too_long"})
"""Reasons that follow from the manifest alone."""
NO_LIMIT = 10**9
COMPARED = ["clip_id", "captions", "video_hash", "start_s", "end_s"]


class Rejection(NamedTuple):
    """Why a clip that could be decoded is put into quarantine."""

    reason: str
    """A key of `REASONS`."""
    detail: str = ""

    @property
    def message(self) -> str:
        """Message for the quarantine."""
        return REASONS[self.reason] + (f" ({self.detail})" if self.detail else "")


def usable_captions(captions: list[str], filters: FilterConfig) -> list[str] | str:
    """Return the captions that pass the filters, or a reason code if none does."""
    least, most = filters.min_caption_words, filters.max_caption_words
    if not captions or (least is None and most is None):
        return captions  # clips for question answering have no captions
    words = [len(clean_caption(caption, NO_LIMIT).split()) for caption in captions]
    kept = [
        caption
        for caption, count in zip(captions, words, strict=True)
        if (least or 0) <= count <= (most or NO_LIMIT)
    ]
    if kept:
        return kept
    return "caption_too_short" if max(words, default=0) < (least or 0) else "caption_too_long"


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _repeated(
    keys: npt.NDArray[np.uint64], order: npt.NDArray[np.int64] | None
) -> npt.NDArray[np.bool_]:
    """Return a mask of the keys that occur earlier in an order. 0 stands for no key.

    Args:
        keys: [clips] uint64.
        order: [clips] int64, the clips in this order. None: the order of `keys`.
    """
    _, first = np.unique(keys if order is None else keys[order], return_index=True)
    again = np.ones(len(keys), dtype=bool)
    again[first if order is None else order[first]] = False
    return again & (keys != 0)


def _hashes(uris: Iterable[str]) -> npt.NDArray[np.uint64]:
    """Return the hash of each clip's id, by which manifests are sorted."""
    ids = (storage.read_table(uri, ["clip_id"])["clip_id"].to_pylist() for uri in uris)
    return np.fromiter(map(clip_hash, chain.from_iterable(ids)), dtype=np.uint64)


def _caption_key(row: Mapping[str, Any]) -> int:
    texts = sorted({clean_caption(text, NO_LIMIT) for text in row["captions"]})
    return _key("\n".join(texts)) if texts else 0


def _video_key(row: Mapping[str, Any]) -> int:
    return _key(f"{row['video_hash']} {row['start_s']} {row['end_s']}")


def duplicates(
    store: str,
    records: Mapping[int, ShardRecord],
    filters: FilterConfig,
    sampling: SamplingConfig,
    *,
    in_order: bool = True,
) -> dict[int, dict[str, Rejection]]:
    """Return why each duplicate clip in a store is one, by shard and clip id.

    Only clips in the store are compared, not those in quarantine, so one of each group is kept.
    Near duplicates are looked for last, among the clips that are no duplicates otherwise.

    Args:
        store: The store.
        records: Records of its shards.
        filters: Filters of the ingest.
        sampling: How the frames of the store are stored.
        in_order: Whether the clips of all shards together are in the order of the manifest. This
            is not the case for shards that were added later.
    """
    asked = {
        "duplicate_caption": (_caption_key, filters.unique_captions),
        "duplicate_video": (_video_key, filters.unique_videos),
    }
    shards = sorted(records)
    uris = {shard: shard_uri(store, shard, records[shard]["revision"]) for shard in shards}
    ends = np.cumsum([records[shard]["clips"] for shard in shards])
    reason_of = np.zeros(int(ends[-1]), dtype=object)  # 0: not a duplicate
    order = None if in_order else np.argsort(_hashes(uris.values()), kind="stable")
    for reason, (key_of, is_asked) in asked.items():
        if is_asked:
            keys = np.concatenate(
                [
                    np.fromiter(
                        map(key_of, storage.read_table(uri, COMPARED).to_pylist()), dtype=np.uint64
                    )
                    for uri in uris.values()
                ]
            )
            keys[reason_of != 0] = 0
            reason_of[_repeated(keys, order)] = reason
    owners = np.full(len(reason_of), STAYS, dtype=np.int64)
    if filters.near_duplicates is not None:
        hashes = _frame_hashes(store, [records[shard] for shard in shards], sampling)
        hashes[reason_of != 0] = NO_HASH
        owners = _in_order(hashes, order, filters.near_duplicates)
        reason_of[owners != STAYS] = "near_duplicate"
    named = _ids_of(uris.values(), ends, np.unique(owners[owners != STAYS]))
    found: dict[int, dict[str, Rejection]] = {}
    for shard, reasons, near in zip(
        shards, np.split(reason_of, ends[:-1]), np.split(owners, ends[:-1]), strict=True
    ):
        rows = np.flatnonzero(reasons)
        if len(rows):
            ids = storage.read_table(uris[shard], ["clip_id"])["clip_id"].take(rows).to_pylist()
            found[shard] = {
                clip_id: Rejection(reasons[row], named.get(int(near[row]), ""))
                for clip_id, row in zip(ids, rows, strict=True)
            }
    return found


def _in_order(
    hashes: npt.NDArray[np.uint64], order: npt.NDArray[np.int64] | None, most_bits: int
) -> npt.NDArray[np.int64]:
    """Return the near duplicate of each clip that stays, or -1, comparing clips in an order."""
    if order is None:
        return near_duplicates_of(hashes, most_bits)
    found = near_duplicates_of(hashes[order], most_bits)
    owners = np.full(len(hashes), STAYS, dtype=np.int64)
    gone = found != STAYS
    owners[order[gone]] = order[found[gone]]
    return owners


def _frame_hashes(
    store: str, records: Sequence[ShardRecord], sampling: SamplingConfig
) -> npt.NDArray[np.uint64]:
    """Return [clips, frames] uint64, the hashes of all stored frames, in the order of the shards.

    Clips with fewer frames, such as pictures, are filled up with `NO_HASH`.
    """
    clips = sum(record["clips"] for record in records)
    found = np.full((clips, sampling.num_frames), NO_HASH, dtype=np.uint64)
    start = 0
    for record in records:
        shard, revision = record["shard"], record["revision"]
        table = read_written(store, shard, revision, record["sha256"])
        if table is None:  # the file was deleted, or is of another version of the shard
            columns = ["clip_id", "video_id", "frames"]
            rows = storage.read_table(shard_uri(store, shard, revision), columns).to_pylist()
            lists = [row["hashes"] for row in hashes_of(rows, sampling)]
        else:
            lists = table["hashes"].to_pylist()
        for row, hashes in enumerate(lists):
            found[start + row, : len(hashes)] = hashes
        start += record["clips"]
    return found


def _ids_of(
    uris: Iterable[str], ends: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> dict[int, str]:
    """Return `clip ID` of some clips, which are numbered through all shards."""
    found: dict[int, str] = {}
    start = 0
    for uri, end in zip(uris, ends.tolist(), strict=True):
        own = rows[(rows >= start) & (rows < end)]
        if len(own):
            ids = storage.read_table(uri, ["clip_id"])["clip_id"].take(own - start).to_pylist()
            found |= {place: f"clip {name}" for place, name in zip(own.tolist(), ids, strict=True)}
        start = end
    return found
