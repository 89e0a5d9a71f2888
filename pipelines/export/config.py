"""Settings of the export stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pipelines.common.config import require
from stgt.errors import SettingError
from stgt.field_marks import Common, FieldMark

SOURCES = ("manifest", "store", "dataset")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export of a manifest as webdataset tars or of a clip store as a data set, or a data set back.

    Exactly one of `manifest`, `store` and `dataset` is given.
    """

    manifest: Annotated[str | None, Common("what to export"), FieldMark.LOCATION] = None
    """Manifest whose videos are written as webdataset tars."""
    store: Annotated[str | None, Common("what to export"), FieldMark.LOCATION] = None
    """Clip store to write as a Parquet data set for the Hugging Face Hub."""
    dataset: Annotated[str | None, Common("what to export"), FieldMark.LOCATION] = None
    """Data set that jobs.export wrote from a clip store, to make the store again."""
    output: Annotated[str, Common("run"), FieldMark.LOCATION]
    """Folder to write, local or s3://. A store is written to a subfolder that has the name of the
    original store."""
    videos_per_tar: Annotated[int, Common("tars")] = 1000
    """Largest number of videos per tar."""
    bytes_per_tar: Annotated[int, Common("tars")] = 4 * 1024**3
    """Size of a tar, in bytes, from which its videos continue in another one. Each worker needs so
    much free local disk, and more for a larger video."""
    max_bad_fraction: Annotated[float, Common("tars")] = 0.1
    """Fail if more than this fraction of the videos cannot be read."""
    retry_rejected: Annotated[bool, Common("tars")] = False
    """Also write tars again of which an earlier run could not read all videos."""
    num_workers: Annotated[int | None, Common("run")] = None
    """Number of workers, one CPU each. None uses one per CPU of the cluster."""

    def __post_init__(self) -> None:
        given = [f"--{name}" for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise SettingError(
                "give exactly one of --manifest, --store and --dataset, not "
                f"{' and '.join(given) or 'none of them'}"
            )
        require(self.videos_per_tar >= 1, "videos_per_tar", self.videos_per_tar, "must be >= 1")
        require(self.bytes_per_tar >= 1, "bytes_per_tar", self.bytes_per_tar, "must be >= 1")
        require(
            0 <= self.max_bad_fraction <= 1,
            "max_bad_fraction",
            self.max_bad_fraction,
            "must lie in [0, 1]",
        )
        require(
            self.num_workers is None or self.num_workers >= 1,
            "num_workers",
            self.num_workers,
            "must be >= 1",
        )
