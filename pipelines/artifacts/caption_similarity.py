"""Where a clip store keeps the similarities of its clips and their captions.

Only an ingest with `filters.min_similarity` writes them; see `pipelines.ingest.scores`.
"""

from __future__ import annotations

from pipelines.artifacts.clip_store import shard_name
from pipelines.common import storage

FOLDER = "similarity"
OF_SHARD = "shard_sha256"
"""Entry of the metadata with the checksum of the shard that the similarities belong to."""


def scores_uri(store: str, shard: int, revision: int) -> str:
    """Return the URI of the similarities of a shard."""
    return storage.join(store, FOLDER, shard_name(shard, revision))
