"""Clips that are left out on purpose: by size, duration, captions, or as duplicates.

What is seen in captions is decided before decoding, what is seen in the container by the decoder's
child, and duplicate videos once all are read. Of duplicates the first in the manifest's order
stays, whichever was decoded first, so the result does not depend on how work was divided.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from pipelines import storage
from pipelines.clips import ShardRecord, shard_uri
from pipelines.config import FilterConfig
from stgt.captions import clean_caption

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


def usable_captions(captions: list[str], filters: FilterConfig) -> list[str] | str:
    """The captions that are left, or the reason why none is."""
    least, most = filters.min_caption_words, filters.max_caption_words
    if least is None and most is None:
        return captions
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


def caption_keys(captions: list[list[str]]) -> npt.NDArray[np.uint64]:
    """For each clip a number that tells its captions, once cleaned, from others."""
    return np.array(
        [
            _key("\n".join(sorted({clean_caption(text, NO_LIMIT) for text in texts})))
            for texts in captions
        ],
        dtype=np.uint64,
    )


def repeated(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Places whose key has occurred before, ascending."""
    _, first = np.unique(keys, return_index=True)
    again = np.ones(len(keys), dtype=bool)
    again[first] = False
    return np.flatnonzero(again)


def duplicate_videos(store: str, records: Mapping[int, ShardRecord]) -> dict[int, list[str]]:
    """Ids of clips whose bytes and span an earlier clip has too, by the shard they are in."""
    columns = ["clip_id", "video_hash", "start_s", "end_s"]
    tables = {
        shard: storage.read_table(shard_uri(store, shard, records[shard]["revision"]), columns)
        for shard in sorted(records)
    }
    keys = [
        np.array(
            [_key(f"{r['video_hash']} {r['start_s']} {r['end_s']}") for r in table.to_pylist()],
            dtype=np.uint64,
        )
        for table in tables.values()
    ]
    again = repeated(np.concatenate(keys)) if keys else np.empty(0, dtype=np.int64)
    first, found = 0, {}
    for shard, table in tables.items():
        rows = again[(again >= first) & (again < first + len(table))] - first
        if len(rows):
            found[shard] = table["clip_id"].take(rows).to_pylist()
        first += len(table)
    return found
