"""Clips that are left out on purpose: by size, duration, captions, or as duplicates.

What is seen in captions is decided before decoding, what is seen in the container by the decoder's
child, and duplicates once all clips are there. Of those the first usable one in the manifest's
order stays, whichever was decoded first, so the result does not depend on how work was divided.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.artifacts.clip_store import ShardRecord, shard_uri
from pipelines.common import storage
from pipelines.ingest.config import FilterConfig
from stgt.inputs.caption_text import clean_caption

REASONS = {
    "too_small": "the shorter side has fewer pixels than filters.min_short_side",
    "too_short": "the clip lasts less than filters.min_duration_s",
    "too_long": "the clip lasts longer than filters.max_duration_s",
    "caption_too_short": "no caption has filters.min_caption_words",
    "caption_too_long": "no caption has at most filters.max_caption_words",
    "duplicate_caption": "another clip has the same captions",
    "duplicate_video": "another clip is the same span of the same bytes",
}
"""Why a filter left a clip out."""

NO_LIMIT = 10**9
COMPARED = ["clip_id", "captions", "video_hash", "start_s", "end_s"]


def usable_captions(captions: list[str], filters: FilterConfig) -> list[str] | str:
    """The captions that are left, or the reason why none is."""
    least, most = filters.min_caption_words, filters.max_caption_words
    if not captions or (least is None and most is None):
        return captions  # clips with questions have none
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


def _repeated(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Whether a key has occurred before; 0 is no key."""
    _, first = np.unique(keys, return_index=True)
    again = np.ones(len(keys), dtype=bool)
    again[first] = False
    return again & (keys != 0)


def _caption_key(row: Mapping[str, Any]) -> int:
    texts = sorted({clean_caption(text, NO_LIMIT) for text in row["captions"]})
    return _key("\n".join(texts)) if texts else 0


def _video_key(row: Mapping[str, Any]) -> int:
    return _key(f"{row['video_hash']} {row['start_s']} {row['end_s']}")


def duplicates(
    store: str, records: Mapping[int, ShardRecord], filters: FilterConfig
) -> dict[int, dict[str, str]]:
    """Clips of a store that say or show what an earlier one does: by shard, id and reason.

    Only clips that are in the store count, so of a group one always stays.
    """
    asked = {
        "duplicate_caption": (_caption_key, filters.unique_captions),
        "duplicate_video": (_video_key, filters.unique_videos),
    }
    shards = sorted(records)
    uris = {shard: shard_uri(store, shard, records[shard]["revision"]) for shard in shards}
    ends = np.cumsum([records[shard]["clips"] for shard in shards])
    reason_of = np.zeros(int(ends[-1]), dtype=object)  # 0: it stays
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
            reason_of[_repeated(keys)] = reason
    found: dict[int, dict[str, str]] = {}
    for shard, reasons in zip(shards, np.split(reason_of, ends[:-1]), strict=True):
        rows = np.flatnonzero(reasons)
        if len(rows):
            ids = storage.read_table(uris[shard], ["clip_id"])["clip_id"].take(rows).to_pylist()
            found[shard] = dict(zip(ids, reasons[rows].tolist(), strict=True))
    return found
