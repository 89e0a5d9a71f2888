"""Exports a manifest as tars or a clip store as a data set, or makes a store of a data set."""

from __future__ import annotations

from collections.abc import Callable

from pipelines.export.config import ExportConfig
from pipelines.export.dataset import DatasetSummary, export_dataset
from pipelines.export.restore import StoreSummary, restore_store
from pipelines.export.tars import TarsSummary, export_tars


def run_export(
    config: ExportConfig, connect: Callable[[ExportConfig], None] | None = None
) -> TarsSummary | DatasetSummary | StoreSummary:
    """Write what a config asks for. A restart writes only what is missing.

    Args:
        config: What to export, and where to.
        connect: Called once before Ray is needed, after all checks that do not need Ray.

    Raises:
        ManifestError: The manifest cannot be used.
        ClipStoreError: The store or the data set is not finished, damaged or has changed.
        STGTError: The output holds something else, or too many videos cannot be read.
    """
    if config.manifest is not None:
        return export_tars(config, connect)
    if config.store is not None:
        return export_dataset(config, connect)
    return restore_store(config, connect)
