"""Checks that datasets suit a model, and computes digests of their contents."""

from __future__ import annotations

import functools

from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.locations import is_manifest
from pipelines.artifacts.manifest import ManifestRows, check_manifest, refuse_web_addresses
from pipelines.common import storage
from pipelines.common.config import fingerprint
from pipelines.feed.config import Resize
from stgt.errors import ClipStoreError


def check_source(
    uri: str, size: int, num_frames: int, resize: Resize, needs_captions: bool = True
) -> str:
    """Check that a dataset is suitable for training, and return a digest of its contents.

    Args:
        uri: The dataset.
        size: Edge length of the model's frames, in pixels.
        num_frames: Number of frames per sample.
        resize: How the model's frames are made square.
        needs_captions: False if the clips are used with other texts than their own captions.

    Raises:
        ManifestError: The manifest cannot be used.
        ClipStoreError: The store is missing or unfinished, has clips without captions, or its
            frames do not suit the model.
    """
    if is_manifest(uri):
        check_manifest(storage.resolve(uri))
        refuse_web_addresses(storage.resolve(uri))
        return digest_of(uri)
    store = ClipStore(uri)
    without = store.num_clips - sum(store.catalogue["histograms"]["captions_per_clip"])
    if without > 0 and needs_captions:
        raise ClipStoreError(
            f"{uri} contains {without} clips without a caption; train on a store that was ingested "
            "from annotations with captions, or write captions with python -m jobs.caption, ingest "
            "its manifest, and pass --captions both"
        )
    check_frames(store, size, num_frames, resize)
    return digest_of(uri)


def check_frames(store: ClipStore, size: int, num_frames: int, resize: Resize) -> None:
    """Check that the frames in a store suit a model.

    Raises:
        ClipStoreError: The frames have another size or were resized differently, or are too few.
    """
    stored = store.sampling
    needed = {"sampling.size": size, "sampling.resize": resize}
    found = {"sampling.size": stored.size, "sampling.resize": stored.resize}
    if differing := [name for name in needed if needed[name] != found[name]]:
        raise ClipStoreError(
            f"{store.uri} was ingested with "
            + ", ".join(f"{name} = {found[name]}" for name in differing)
            + ", but the model needs "
            + ", ".join(f"{name} = {needed[name]}" for name in differing)
            + "; ingest again with "
            + " ".join(f"--{name} {needed[name]}" for name in differing)
        )
    if stored.num_frames < num_frames:
        raise ClipStoreError(
            f"{store.uri} contains {stored.num_frames} frames per clip, but the model takes "
            f"{num_frames}; ingest more frames (--sampling.num-frames) or use fewer (--num-frames)"
        )


def digest_of(uri: str) -> str:
    """Return a digest of the contents of a dataset."""
    if is_manifest(uri):
        return _digest_of_manifest(uri, storage.version(storage.resolve(uri)))
    return str(ClipStore(uri).catalogue["digest"])


@functools.lru_cache(maxsize=16)
def _digest_of_manifest(uri: str, version: str) -> str:
    """Return the digest of one version of a manifest, which takes seconds for millions of rows."""
    return ManifestRows(uri).digest()


def digest_of_all(digests: list[str]) -> str:
    """Combine the digests of several datasets into one."""
    return digests[0] if len(digests) == 1 else fingerprint(digests)
