"""Divides the videos of a manifest among tars."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.artifacts.manifest import BUFFER_ROWS, ManifestRows, clip_hash


@dataclass(frozen=True)
class TarPlan:
    """Which rows of a manifest belong to each tar."""

    manifest: str
    rows: npt.NDArray[np.int64]
    """[clips] rows of the manifest: those of the first tar, of the second, and so on, each part
    ascending."""
    ends: npt.NDArray[np.int64]
    """[tars] number of rows up to the end of each tar."""
    num_videos: int

    @property
    def num_tars(self) -> int:
        """Number of tars."""
        return len(self.ends)

    def rows_of(self, tar: int) -> npt.NDArray[np.int64]:
        """Return the rows of the manifest that belong to a tar, ascending."""
        begin = int(self.ends[tar - 1]) if tar else 0
        return self.rows[begin : int(self.ends[tar])]


def plan_tars(manifest: str, videos_per_tar: int) -> TarPlan:
    """Assign all clips of a video to one tar, in the order in which the videos first appear.

    The memory is that of a few integers per row. Videos are told apart by a hash of their URI; if
    two have the same one, they are in the same tar, whose writer compares the URIs themselves.
    """
    rows = ManifestRows(manifest)
    keys = np.empty(len(rows), dtype=np.uint64)
    for start in range(0, len(rows), BUFFER_ROWS):
        uris = rows.table(start, start + BUFFER_ROWS, ["video_uri"])["video_uri"].to_pylist()
        keys[start : start + len(uris)] = [clip_hash(uri) for uri in uris]
    _, first, video_of = np.unique(keys, return_index=True, return_inverse=True)
    # Videos are numbered by their first row, so a manifest with one clip per video is read once,
    # from its beginning to its end.
    number_of = np.empty(len(first), dtype=np.int64)
    number_of[np.argsort(first)] = np.arange(len(first))
    tar_of = number_of[video_of.reshape(-1)] // videos_per_tar
    return TarPlan(
        manifest=manifest,
        rows=np.argsort(tar_of, kind="stable").astype(np.int64),
        ends=np.cumsum(np.bincount(tar_of)),
        num_videos=len(first),
    )
