"""Tells manifests from clip stores, and finds stores and checkpoints in the folders around them.

Names of stores contain a hash and names of checkpoints a step. Jobs therefore also accept the
folder above a store, if it contains only one besides unfinished ones and samples made with
`--limit`, and the folder of a training run, which stands for its best checkpoint.
"""

from __future__ import annotations

import re

from pipelines.artifacts.checkpoints import BEST, CHECKPOINTS, COMPLETE, PREFIX, is_hub_name, pinned
from pipelines.artifacts.clip_store import CATALOGUE, STORE
from pipelines.common import storage
from stgt.errors import CheckpointError, ClipStoreError

MANIFEST_ENDING = ".parquet"
SAMPLE = re.compile(r"-first-\d+$")
"""End of the name of a store that holds only a sample."""
MOST_NAMES = 1000
"""Number of entries up to which a folder is searched for stores."""
NAMED = 5
"""Maximum number of stores to name in an error."""


def is_manifest(uri: str) -> bool:
    """Return whether a URI is that of a manifest, by its ending. Other datasets are stores."""
    return uri.endswith(MANIFEST_ENDING)


def find_data(uri: str) -> str:
    """Return the absolute URI of a manifest or clip store, given it or the folder above a store.

    Raises:
        ClipStoreError: The URI is a file of another kind, or the folder contains several stores.
    """
    uri = storage.resolve(uri)
    if is_manifest(uri) or _is_store(uri):
        return uri
    if storage.is_file(uri):
        raise ClipStoreError(
            f"{uri} is a file, but data must be a clip store, which is a folder, or a manifest "
            f"({MANIFEST_ENDING}); give the folder that the ingest printed, or the folder above it"
        )
    names = storage.list_names(uri)
    if len(names) > MOST_NAMES:
        return uri  # a folder of videos, for example
    stores = [
        place
        for name in names
        if not name.startswith(".") and _is_store(place := storage.join(uri, name))
    ]
    # Beside the store may lie samples made with `--limit`, and stores that are being made.
    stores = [place for place in stores if not SAMPLE.search(place)] or stores
    finished = [place for place in stores if storage.exists(storage.join(place, CATALOGUE))]
    stores = finished or stores
    if len(stores) > 1:
        more = f", and {len(stores) - NAMED} more" if len(stores) > NAMED else ""
        raise ClipStoreError(
            f"{uri} contains {len(stores)} clip stores; give one of them: "
            f"{', '.join(stores[:NAMED])}{more}"
        )
    return stores[0] if stores else uri


def find_checkpoint(uri: str) -> str:
    """Return the absolute URI of a checkpoint, given it or the folder of its training run.

    A run stands for its best checkpoint, or for its last one if none was chosen. The name of a
    model on the Hugging Face Hub, `hf:NAME`, gets its commit: `hf:NAME@COMMIT`.

    Raises:
        CheckpointError: The run has no complete checkpoint.
    """
    if is_hub_name(uri):
        return pinned(uri)
    uri = storage.resolve(uri)
    folder = storage.join(uri, CHECKPOINTS)
    if storage.exists(storage.join(uri, COMPLETE)) or not storage.exists(folder):
        return uri
    complete = [
        name
        for name in storage.list_names(folder)
        if name.startswith(PREFIX) and storage.exists(storage.join(folder, name, COMPLETE))
    ]
    if not complete:
        raise CheckpointError(
            f"the run {uri} has no complete checkpoint yet; run its training again to continue it"
        )
    best = storage.join(uri, BEST)
    chosen = f"{PREFIX}{storage.read_json(best)['step']:08d}" if storage.exists(best) else ""
    return storage.join(folder, chosen if chosen in complete else complete[-1])


def _is_store(uri: str) -> bool:
    return any(storage.exists(storage.join(uri, name)) for name in (CATALOGUE, STORE))
