"""Describes clip stores and manifests for MLflow."""

from __future__ import annotations

from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.locations import is_manifest
from pipelines.artifacts.manifest import ManifestRows
from pipelines.common.provenance import Context, DatasetInput
from pipelines.feed.dataset_checks import digest_of


def dataset_input(uri: str, context: Context, clips: int | None = None) -> DatasetInput:
    """Return what MLflow is told about a clip store or a manifest.

    Args:
        uri: The finished store, or the manifest.
        context: What it is used for.
        clips: Number of clips that are used; None means all.
    """
    if is_manifest(uri):
        number = len(ManifestRows(uri)) if clips is None else clips
        return DatasetInput(uri, "manifest", digest_of(uri), context, number)
    number = ClipStore(uri).num_clips if clips is None else clips
    return DatasetInput(uri, "clip store", digest_of(uri), context, number)
