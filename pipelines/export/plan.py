"""Divides the videos of a manifest into parts, each of which becomes one tar or more."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.artifacts.manifest import BUFFER_ROWS, ManifestRows, clip_hash


@dataclass(frozen=True)
class TarPlan:
    """Which rows of a manifest belong to each part."""

    manifest: str
    rows: npt.NDArray[np.int64]
    """[clips] rows of the manifest: those of the first part, of the second, and so on, each
    ascending."""
    ends: npt.NDArray[np.int64]
    """[parts] number of rows up to the end of each part."""
    num_videos: int

    @property
    def num_parts(self) -> int:
        """Number of parts."""
        return len(self.ends)

    def rows_of(self, part: int) -> npt.NDArray[np.int64]:
        """Return the rows of the manifest that belong to a part, ascending."""
        begin = int(self.ends[part - 1]) if part else 0
        return self.rows[begin : int(self.ends[part])]


def plan_tars(manifest: str, videos_per_tar: int) -> TarPlan:
    """Assign all clips of a video to one part, in the order in which the videos first appear.

    The memory is that of a few integers per row. Videos are told apart by a hash of their URI; if
    two have the same one, they are in the same part, whose writer compares the URIs themselves.
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
    part_of = number_of[video_of.reshape(-1)] // videos_per_tar
    return TarPlan(
        manifest=manifest,
        rows=np.argsort(part_of, kind="stable").astype(np.int64),
        ends=np.cumsum(np.bincount(part_of)),
        num_videos=len(first),
    )
