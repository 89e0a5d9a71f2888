"""Writes the manifest of the fetched videos, and the quarantine of the clips without one."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifacts.clip_store import QUARANTINE_SCHEMA
from pipelines.artifacts.manifest import ROWS_PER_GROUP, SCHEMA, ManifestRows, url_key
from pipelines.common import storage
from pipelines.common.config import without_credentials
from pipelines.common.digest_set import digests_of_hex
from pipelines.fetch.records import CHECKSUMS, digests_of

MANIFEST = "manifest.parquet"
QUARANTINE = "quarantine.parquet"
ROWS_AT_A_TIME = 20_000
EXTRA = "download"
"""Name in a clip's extras of what was fetched: `url` without credentials, `bytes`, and the checksum
under the name of its algorithm."""


@dataclass
class Counts:
    """Numbers of clips."""

    clips: int = 0
    quarantined: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


def write_results(output: str, source: str, downloads: pa.Table) -> Counts:
    """Write manifest and quarantine from the rows of a manifest of URLs.

    Clips keep their ids, captions, spans and extras, and their order. No manifest is written if no
    clip has a video.

    Args:
        output: Folder of the videos.
        source: Manifest whose videos are URLs.
        downloads: What became of all URLs, as `records.read_downloads` returns it.
    """
    rows, keys, counts = ManifestRows(source), digests_of(downloads), Counts()
    manifest, quarantine = (storage.join(output, name) for name in (MANIFEST, QUARANTINE))
    with (
        storage.writing(quarantine) as bad_path,
        storage.writing(manifest) as path,
        pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer,
        pq.ParquetWriter(bad_path, QUARANTINE_SCHEMA, compression="zstd") as bad_writer,
    ):
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            found = rows.read(start, start + ROWS_AT_A_TIME)
            wanted = digests_of_hex(url_key(row["video_uri"]) for row in found)
            places = np.searchsorted(keys, wanted)
            assert (keys[places] == wanted).all(), "a URL has no result"
            results = downloads.take(places).to_pylist()
            good, bad = [], []
            for row, result in zip(found, results, strict=True):
                if result["reason"] is None:
                    good.append(_fetched(row, result, output))
                else:
                    bad.append(_quarantined(row, result))
                    counts.reasons[result["reason"]] += 1
            counts.clips += len(good)
            counts.quarantined += len(bad)
            writer.write_table(pa.Table.from_pylist(good, schema=SCHEMA), ROWS_PER_GROUP)
            bad_writer.write_table(pa.Table.from_pylist(bad, schema=QUARANTINE_SCHEMA))
    if not counts.clips:
        storage.remove(manifest)
    if not counts.quarantined:
        storage.remove(quarantine)
    return counts


def _fetched(row: dict[str, Any], result: dict[str, Any], output: str) -> dict[str, Any]:
    extras = json.loads(row["extras"] or "{}")
    extras[EXTRA] = {
        "url": without_credentials(row["video_uri"]),
        "bytes": result["bytes"],
        **{name: result[name] for name in CHECKSUMS if result[name] is not None},
    }
    return {
        **row,
        "video_uri": storage.join(output, result["file"]),
        "extras": json.dumps(extras, sort_keys=True),
    }


def _quarantined(row: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    return {
        "clip_id": row["clip_id"],
        "video_uri": without_credentials(row["video_uri"]),
        "reason": result["reason"],
        "message": result["message"],
        "attempts": result["attempts"],
    }
