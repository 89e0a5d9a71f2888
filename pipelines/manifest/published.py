"""Compares a manifest with the published size of its split.

The rows of a manifest are those of the annotations, whether their videos were downloaded or not.
So another number of rows means other annotations. Missing videos are counted apart and are no error
here: an ingest lists them in its quarantine.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.artifacts.manifest import BUFFER_ROWS, ManifestRows
from pipelines.artifacts.published_counts import PUBLISHED_COUNTS, PublishedCounts, PublishedSplit
from pipelines.artifacts.questions import EXTRA
from pipelines.common import storage, tars
from stgt.errors import ManifestError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundCounts:
    """Size of a manifest."""

    clips: int
    captions: int
    rejected: int
    """Number of rows of the annotations that could not be used."""
    dropped: int = 0
    """Number of rows that equal an earlier row."""


def compare(split: PublishedSplit, manifest: str, found: FoundCounts) -> None:
    """Compare a manifest with the published size of a split, and count missing local videos.

    Args:
        split: The split that the manifest should be.
        manifest: URI of the manifest.
        found: Its size.

    Raises:
        ManifestError: The sizes differ.
    """
    published = PUBLISHED_COUNTS[split]
    if differing := list(_differing(published, manifest, found)):
        rejected = f", and {found.rejected:,} rows were rejected" if found.rejected else ""
        raise ManifestError(
            f"{manifest} is not {published.title}: it has {' and '.join(differing)}{rejected} "
            f"({published.origin}); it was written, but the annotations differ from the published "
            "ones, which missing videos do not explain: check the annotation files, or leave out "
            "--check"
        )
    logger.info("%s has the size of %s (%s)", manifest, published.title, published.origin)
    _count_missing(manifest, found.clips)


def _differing(published: PublishedCounts, manifest: str, found: FoundCounts) -> Iterator[str]:
    """Yield each number that is not the published one, beside the published one."""
    numbers: list[tuple[str, int, int | None]] = [
        ("clips", found.clips, published.clips),
        ("captions", found.captions, published.captions),
        # Rows of one clip are merged, and their captions joined.
        ("rows", found.captions + found.rejected + found.dropped, published.rows),
    ]
    if published.questions is not None:
        numbers.append(("questions", _num_questions(manifest), published.questions))
    for what, number, expected in numbers:
        if expected is None or 2 * abs(number - expected) <= published.rounded_to - 1:
            continue
        if what == "clips" and number == published.clips_of_lists:
            continue
        about = "about " if published.rounded_to > 1 else ""
        yield f"{number:,} {what} instead of {about}{expected:,}"


def _num_questions(manifest: str) -> int:
    rows = ManifestRows(manifest)
    count = 0
    for start in range(0, len(rows), BUFFER_ROWS):
        for extras in rows.table(start, start + BUFFER_ROWS, ["extras"])["extras"].to_pylist():
            count += len(json.loads(extras).get(EXTRA, ()))
    return count


def _count_missing(manifest: str, clips: int) -> None:
    """Say how many videos are not there. Those on S3 are left to the ingest, which fetches them."""
    rows = ManifestRows(manifest)
    missing = remote = 0
    for start in range(0, len(rows), BUFFER_ROWS):
        table = rows.table(start, start + BUFFER_ROWS, ["video_uri"])
        for uri in table["video_uri"].to_pylist():
            if storage.is_remote(uri):
                remote += 1
            else:
                missing += not tars.is_there(uri)
    if missing:
        logger.warning(
            "the videos of %s of %s clips are not there; the ingest will list them as `missing`",
            f"{missing:,}",
            f"{clips:,}",
        )
    if remote:
        logger.info("%s videos are not local and were not looked up", f"{remote:,}")
