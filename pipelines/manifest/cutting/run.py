"""Cuts the rows of a manifest: examines their videos on Ray, then applies the arithmetic of spans.

Videos are examined once, however many rows name them, and what was found out is written part by
part. A run that was killed goes on with the parts that are missing, and the result is the same.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import tenacity

from pipelines.artifacts.generated_captions import EXTRA, generated_captions
from pipelines.artifacts.manifest import is_web_address
from pipelines.common import ray_errors, storage
from pipelines.common.config import fingerprint, without_credentials
from pipelines.manifest.cutting import facts, spans
from pipelines.manifest.cutting.by_video import RowsByVideo
from pipelines.manifest.cutting.config import CuttingConfig
from pipelines.manifest.cutting.facts import VideoFacts
from pipelines.manifest.cutting.part_ids import ids_like_parts, part_id, whole_of
from pipelines.manifest.cutting.reading import SubtitleReader
from pipelines.manifest.cutting.spans import Cue, Span
from pipelines.manifest.formats.rows import BadRow, ClipRow, Rows
from stgt.errors import ManifestError

logger = logging.getLogger(__name__)

FOLDER = ".cuts"
"""Ending of the name of the folder beside the manifest that keeps what was found out."""
READ_AT_ONCE = 1000
"""Number of videos whose subtitles are held in memory without cutting."""
READERS = 16
"""Number of files of subtitles that are read at the same time without cutting."""
CLUSTER_ATTEMPTS = 4
CUT = "cut"
"""Name in the column `extras` under which a clip says what it was cut from, and how."""


@contextmanager
def run_cutting(
    config: CuttingConfig, manifest: Path, output: str, scratch: Path, connect: Callable[[], None]
) -> Iterator[Rows]:
    """Provide the rows that the rows of a manifest are cut into, in the order of their videos.

    What was found out about videos is kept beside the output until this context ends without an
    error, so that a run that ends early can be continued.

    Args:
        config: How to cut.
        manifest: The manifest to cut.
        output: URI of the manifest to be written, without its ending.
        scratch: An empty folder.
        connect: Called once before Ray is needed.

    Raises:
        ManifestError: A video is an address on the web.
    """
    rows = RowsByVideo(manifest, scratch)
    videos = scratch / facts.VIDEOS
    num_videos = rows.write_videos(videos)
    _refuse_addresses(videos)
    if config.cut is None:
        with ThreadPoolExecutor(READERS) as pool:
            found = _with_subtitles(videos, config, pool)
            yield _cut_rows(rows, found, config, ids_like_parts(manifest))
        return
    kept = f"{output}{FOLDER}"
    with storage.lock(kept):
        folder = storage.join(kept, _key(config, videos))
        listed = storage.join(folder, facts.VIDEOS)
        if not storage.exists(listed):
            storage.put_file(videos, listed)
        _examine(config, folder, num_videos, connect)
        found = facts.read_all(folder, facts.num_parts(num_videos, config.cut))
        yield _cut_rows(rows, found, config)
        storage.remove(kept)


def _with_subtitles(
    videos: Path, config: CuttingConfig, pool: ThreadPoolExecutor
) -> Iterator[VideoFacts]:
    """Iterate over what is known without opening a video: its subtitles."""
    reader, uris = SubtitleReader(config), _uris(videos)
    while some := list(islice(uris, READ_AT_ONCE)):
        yield from pool.map(reader.add_to, map(facts.unknown, some))


def _cut_rows(
    rows: RowsByVideo,
    found: Iterator[VideoFacts],
    config: CuttingConfig,
    like_parts: frozenset[str] = frozenset(),
) -> Rows:
    """Cut rows by the facts of their videos, both of which are in the order of videos.

    Args:
        rows: The rows.
        found: The facts.
        config: How to cut.
        like_parts: Ids of rows that a part of another row may get. Whether one does is known at
            the end, and then such a row that stays whole is rejected.
    """
    known: VideoFacts | None = None
    held: set[str] = set()
    taken: set[str] = set()
    num_videos = without_subtitles = broken_cues = 0
    for row in rows.rows():
        while known is None or known["video_uri"] != row["video_uri"]:
            known = next(found)
            num_videos += 1
            without_subtitles += known["reason"] is None and known["cues"] is None
            broken_cues += known["broken_cues"]
        for clip in _cut(row, known, config):
            if isinstance(clip, BadRow) or clip.clip_id not in like_parts:
                yield clip
            elif clip.clip_id == row["clip_id"]:
                held.add(clip.clip_id)
            else:
                taken.add(clip.clip_id)
                yield clip
    if held:
        yield from _whole_rows(rows, held, taken)
    if config.subtitles and without_subtitles:
        logger.warning(
            "%s of %s videos have no subtitles beside them; their clips keep the captions of the "
            "annotations, if there are any",
            f"{without_subtitles:,}",
            f"{num_videos:,}",
        )
    if broken_cues:
        logger.warning(
            "%s subtitles were left out, because their times cannot be read", f"{broken_cues:,}"
        )


def _whole_rows(rows: RowsByVideo, held: set[str], taken: set[str]) -> Rows:
    """Yield the rows with some ids as they are, and reject those whose id a part has taken."""
    for row in rows.rows():
        if row["clip_id"] not in held:
            continue
        if row["clip_id"] in taken:
            yield _rejected(
                row,
                f"a subtitle of the clip {whole_of(row['clip_id'])} becomes a clip with this id; "
                "give one of the two videos another name, or one of the two rows another id",
            )
        else:
            yield _unchanged(row)


def _cut(row: dict[str, Any], known: VideoFacts, config: CuttingConfig) -> Rows:
    """Yield the clips of a row, or why it has none."""
    if known["reason"] is not None:
        yield _rejected(row, f"{known['reason']}: {known['message']}")
        return
    cues = None if known["cues"] is None else [Cue(*cue) for cue in known["cues"]]
    start_s, end_s, duration_s = row["start_s"] or 0.0, row["end_s"], known["duration_s"]
    if config.cut is None:
        if cues is None:
            yield _unchanged(row)
            return
        whole = Span(start_s, math.inf if end_s is None else end_s)
        within = spans.cues_within(whole, cues)
        for number, (span, cue) in enumerate(within):
            how = {"by": "subtitles", "clip_id": row["clip_id"], "number": number}
            yield _clip(row, span, [cue.text], how, said=True)
        if not within:
            yield _rejected(row, "none of the subtitles of its video is in its span")
        return
    assert duration_s is not None
    whole = Span(start_s, duration_s if end_s is None else min(end_s, duration_s))
    if whole.length_s <= 0:
        yield _rejected(
            row,
            f"empty_span: the clip begins at {start_s:g} s, but its video ends at {duration_s:g} s",
        )
        return
    if config.cut == "windows":
        parts = spans.windows(whole, config.window_s, config.overlap_s)
    else:
        parts = spans.shots(whole, known["cuts_s"], config.min_shot_s, config.max_shot_s)
    for number, span in enumerate(parts):
        captions = row["captions"]
        if cues is not None:
            text = spans.caption_of(span, cues)
            captions = [text] if text else []
        how = {"by": config.cut, "clip_id": row["clip_id"], "number": number}
        yield _clip(row, span, captions, how, said=cues is not None)


def _unchanged(row: dict[str, Any]) -> ClipRow:
    """Return the clip of a row that is not cut."""
    return _clip(row, Span(row["start_s"], row["end_s"]), row["captions"], None)


def _clip(
    row: dict[str, Any],
    span: Span,
    captions: list[str],
    how: dict[str, Any] | None,
    said: bool = False,
) -> ClipRow:
    """Return a clip of a row.

    Args:
        row: The row.
        span: Span of the clip.
        captions: Captions of the clip.
        how: How the row was cut; None for the row itself.
        said: Whether subtitles gave the captions. Then those that a model wrote are left out as
            well, since they describe the whole row.
    """
    extras = json.loads(row["extras"])
    if said and generated_captions(row["extras"]):
        del extras[EXTRA]
    if how is not None and CUT in extras:
        how = {**how, "before": extras[CUT]}  # the clip was cut before, or has such a column
    return ClipRow(
        clip_id=row["clip_id"] if how is None else part_id(row["clip_id"], how["number"]),
        video_id=row["video_id"],
        video_uri=row["video_uri"],
        captions=captions,
        split=row["split"],
        source=row["source"],
        start_s=span.start_s,
        end_s=span.end_s,
        extras=extras if how is None else {**extras, CUT: how},
    )


def _rejected(row: dict[str, Any], reason: str) -> BadRow:
    return BadRow(file=row["video_uri"], row=None, reason=f"{row['clip_id']}: {reason}")


def _refuse_addresses(videos: Path) -> None:
    for uri in _uris(videos):
        if is_web_address(uri):
            raise ManifestError(
                f"{without_credentials(uri)} is an address on the web, and only videos in files "
                "can be cut; fetch the videos with jobs.fetch, and cut those of the manifest that "
                "it writes with --format generic"
            )


def _uris(videos: Path) -> Iterator[str]:
    with pq.ParquetFile(videos) as file:
        for batch in file.iter_batches():
            yield from batch["video_uri"].to_pylist()


def _key(config: CuttingConfig, videos: Path) -> str:
    """Return a hash of everything that the facts depend on, except the contents of videos."""
    shots = None
    if config.cut == "shots":
        shots = [config.shot_detector, config.shot_threshold, config.min_shot_s]
    subtitles = None
    if config.subtitles:
        subtitles = [config.subtitle_language, config.subtitle_encoding]
    return fingerprint([config.cut, shots, subtitles, storage.digest(str(videos))])


def _examine(
    config: CuttingConfig, folder: str, num_videos: int, connect: Callable[[], None]
) -> None:
    """Examine the videos whose facts are missing, or could not be found out by an earlier run.

    Videos that were rewritten since an earlier run are examined again.
    """
    assert config.cut is not None
    parts = facts.num_parts(num_videos, config.cut)
    earlier = set(range(parts)) - set(_pending(folder, parts))
    if earlier:
        logger.info(
            "cutting resumes: %d of %d parts are finished; videos that have changed since are "
            "examined again",
            len(earlier),
            parts,
        )
    connect()
    # Ray Data loads slowly, so it is imported only where it is needed.
    from pipelines.manifest.cutting.workers import examine_parts

    # Ray replaces lost workers by itself, but its data set may still fail when a node is lost.
    patience = tenacity.Retrying(
        retry=tenacity.retry_if_exception(ray_errors.is_of_the_cluster),
        stop=tenacity.stop_after_attempt(CLUSTER_ATTEMPTS),
        wait=tenacity.wait_random(1, 5),
        before_sleep=tenacity.before_sleep_log(logger, logging.WARNING),
        reraise=True,
    )

    def examine() -> None:
        pending = _pending(folder, parts)
        finished = sorted(earlier.difference(pending))
        examine_parts(config, folder, num_videos, pending, finished)

    patience(examine)


def _pending(folder: str, parts: int) -> list[int]:
    """Return the parts that are not there, or have videos that could not be examined."""
    pending = []
    for part in range(parts):
        known = facts.read_part(folder, part)
        if known is None or any(one["reason"] is not None for one in known):
            pending.append(part)
    return pending
