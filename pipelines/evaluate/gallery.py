"""The gallery of an evaluation: the clips that are searched, and the captions to search with.

A clip that cannot be used stays in the gallery and is marked as missing, with a reason, because the
protocol counts it as a miss. A caption whose clip was never ingested is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipelines.artifacts.clip_store import ClipStore, shard_name
from pipelines.artifacts.locations import is_manifest
from pipelines.artifacts.manifest import ManifestRows, check_manifest
from pipelines.common import storage
from pipelines.evaluate.benchmarks import Benchmark
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.embedding_file import EmbeddingFile
from pipelines.feed.sources import ROWS_PER_PART
from stgt.errors import ClipStoreError, ManifestError
from stgt.inputs.caption_text import clean_caption

CLIPS_PER_PART = 64
ROWS_AT_A_TIME = 10_000
EXAMPLES = 5
COLUMNS = ["clip_id", "captions", "start_s", "end_s"]

Span = tuple[float | None, float | None]
"""Start and end of a clip in its video, in seconds; None for the video's own."""


@dataclass(frozen=True)
class VideoPart:
    """Clips of one shard that are encoded together."""

    shard: int
    rows: list[int]
    """Positions of the clips in the shard."""
    videos: list[int]
    """Positions of the same clips in the gallery."""


@dataclass(frozen=True)
class Gallery:
    """V videos and N captions, in the order of the manifest."""

    clip_ids: list[str]
    captions: list[str]
    video_of_caption: npt.NDArray[np.int64]
    """[N] int64: position of the video that each caption belongs to."""
    places: list[tuple[int, int] | None]
    """[V] shard and row of each video in its source, or None if the video is missing, or if its
    embedding comes from a file and no frames of it are at hand."""
    missing: dict[int, str] = field(default_factory=dict)
    """Positions of videos that cannot be used, each with its reason."""
    first_s: float | None = None
    """Length in seconds, if every clip is the beginning of its video up to that time."""

    @property
    def num_videos(self) -> int:
        """Number of videos V, including missing ones."""
        return len(self.clip_ids)

    @property
    def repeated_captions(self) -> tuple[int, int]:
        """Number of captions shared between videos after cleaning, and number of repetitions."""
        owners: dict[str, set[int]] = {}
        cleaned = [clean_caption(caption) for caption in self.captions]
        for caption, video in zip(cleaned, self.video_of_caption.tolist(), strict=True):
            owners.setdefault(caption, set()).add(video)
        affected = sum(len(owners[caption]) > 1 for caption in cleaned)
        return affected, sum(len(videos) - 1 for videos in owners.values())

    def parts(self) -> list[VideoPart]:
        """Divide the available videos into parts. The division does not depend on the workers."""
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for video, place in enumerate(self.places):
            if place is not None:
                by_shard.setdefault(place[0], []).append((place[1], video))
        parts = []
        for shard in sorted(by_shard):
            clips = sorted(by_shard[shard])
            for start in range(0, len(clips), CLIPS_PER_PART):
                some = clips[start : start + CLIPS_PER_PART]
                parts.append(
                    VideoPart(shard, [row for row, _ in some], [video for _, video in some])
                )
        return parts

    def without(self, missing: dict[int, str]) -> Gallery:
        """Return the gallery without the missing videos and their captions."""
        kept = [video for video in range(self.num_videos) if video not in missing]
        number = np.full(self.num_videos, -1, dtype=np.int64)
        number[kept] = np.arange(len(kept))
        owner = number[self.video_of_caption]
        return Gallery(
            clip_ids=[self.clip_ids[video] for video in kept],
            captions=[
                caption for caption, video in zip(self.captions, owner, strict=True) if video >= 0
            ],
            video_of_caption=owner[owner >= 0],
            places=[self.places[video] for video in kept],
            first_s=self.first_s,
        )


def open_gallery(
    config: EvaluateConfig, benchmark: Benchmark, file: EmbeddingFile | None = None
) -> Gallery:
    """Open the gallery of an evaluation and check that it is the benchmark's split.

    Args:
        config: Names the data and the manifest.
        benchmark: What the gallery must be.
        file: Embeddings of the videos, which need no frames then. Without data and manifest, the
            gallery is that of the file.

    Raises:
        ManifestError: The manifest cannot be used, or has clips without captions.
        ClipStoreError: The store cannot be used, or lacks clips of the manifest.
        ValueError: The clips are not the split of the benchmark.
    """
    clip_ids: list[str] = []
    captions: list[str] = []
    owner: list[int] = []
    silent: list[str] = []
    where = config.manifest or config.data or (file.uri if file else "")
    decoded = config.data is not None and is_manifest(config.data)
    if file is not None and where == file.uri:
        rows = _from_file(file)
    elif config.manifest is None and not decoded:
        rows = _from_store(config.data_uri)
    else:
        rows = _from_manifest(where)
    spans: set[Span] = set()
    for clip_id, texts, span in rows:
        spans.add(span)
        if not texts:
            silent.append(clip_id)
        used = texts[:1] if benchmark.first_caption_only else texts
        captions += used
        owner += [len(clip_ids)] * len(used)
        clip_ids.append(clip_id)
    if silent:
        raise ManifestError(
            f"{where}: {len(silent)} clips have no caption ({', '.join(silent[:EXAMPLES])}); "
            "evaluate on annotations with captions"
        )
    benchmark.check(clip_ids, len(captions), where)
    missing: dict[int, str] = {}
    places: list[tuple[int, int] | None]
    if decoded:
        places = [divmod(number, ROWS_PER_PART) for number in range(len(clip_ids))]
    elif config.data is None:
        places = [None] * len(clip_ids)
    else:
        places, missing, spans = _places(config.data, clip_ids, where, file is not None)
    if file is not None:
        missing = {}
    return Gallery(
        clip_ids, captions, np.array(owner, dtype=np.int64), places, missing, _first_s(spans)
    )


def _first_s(spans: set[Span]) -> float | None:
    """Return the end of all clips, if all of them start with their video and end at one time."""
    if len(spans) != 1:
        return None
    [(start, end)] = spans
    return None if start else end


def _from_manifest(uri: str) -> Iterator[tuple[str, list[str], Span]]:
    check_manifest(uri)
    rows = ManifestRows(uri)
    for first in range(0, len(rows), ROWS_AT_A_TIME):
        for row in rows.read(first, first + ROWS_AT_A_TIME, COLUMNS):
            yield row["clip_id"], row["captions"] or [], (row["start_s"], row["end_s"])


def _from_file(file: EmbeddingFile) -> Iterator[tuple[str, list[str], Span]]:
    """Yield the videos of a file of embeddings; captions without texts are numbered."""
    texts: dict[str, list[str]] = {video_id: [] for video_id in file.video_ids}
    for row, video_id in enumerate(file.caption_video_ids):
        number = len(texts[video_id]) + 1
        text = f"caption {number} of {video_id}" if file.captions is None else file.captions[row]
        texts[video_id].append(text)
    for video_id, captions in texts.items():
        yield video_id, captions, (None, None)


def _from_store(uri: str) -> Iterator[tuple[str, list[str], Span]]:
    store = ClipStore(uri)
    if store.num_quarantined:
        raise ClipStoreError(
            f"{store.num_quarantined} clips of {uri} are in quarantine and count as misses, but "
            "only the manifest contains their captions; pass the manifest with --manifest"
        )
    for shard in range(len(store.shard_sizes)):
        for row in store.read_shard(shard, COLUMNS).to_pylist():
            yield row["clip_id"], row["captions"] or [], (row["start_s"], row["end_s"])


def _places(
    uri: str, clip_ids: list[str], manifest: str, may_lack: bool = False
) -> tuple[list[tuple[int, int] | None], dict[int, str], set[Span]]:
    """Return each clip's shard and row, the reasons of clips in quarantine, and all spans.

    Clips that are in neither are an error unless `may_lack`.
    """
    store = ClipStore(uri)
    wanted = {clip_id: video for video, clip_id in enumerate(clip_ids)}
    places: list[tuple[int, int] | None] = [None] * len(clip_ids)
    spans: set[Span] = set()
    for shard in range(len(store.shard_sizes)):
        table = store.read_shard(shard, ["clip_id", "start_s", "end_s"])
        for row, clip in enumerate(table.to_pylist()):
            if clip["clip_id"] in wanted:
                places[wanted[clip["clip_id"]]] = (shard, row)
                spans.add((clip["start_s"], clip["end_s"]))
    missing = {
        wanted[row["clip_id"]]: f"{row['reason']}: {row['message']}"
        for row in _quarantined(store)
        if row["clip_id"] in wanted
    }
    unknown = [
        clip_ids[video]
        for video, place in enumerate(places)
        if place is None and video not in missing
    ]
    if unknown and not may_lack:
        raise ClipStoreError(
            f"{len(unknown)} clips of {manifest} have captions but no video in {uri} or in its "
            f"quarantine ({', '.join(unknown[:EXAMPLES])}), so they were never ingested; ingest "
            "this manifest, or pass the store that was made from it"
        )
    return places, missing, spans


def _quarantined(store: ClipStore) -> Iterator[dict[str, str]]:
    if not store.num_quarantined:
        return
    folder = store.quarantine
    for record in store.catalogue["shards"]:
        if record["quarantined"]:
            name = shard_name(record["shard"], record.get("revision", 0))
            table = storage.read_table(storage.join(folder, name), ["clip_id", "reason", "message"])
            yield from table.to_pylist()


def reasons_of(missing: Mapping[int, str]) -> str:
    """Summarize why videos are missing, most frequent first: `3 undecodable, 1 timeout`."""
    counted = Counter(reason.partition(":")[0] for reason in missing.values())
    return ", ".join(f"{count} {reason}" for reason, count in counted.most_common())


def spread(total: int, count: int) -> list[int]:
    """Return up to `count` positions spread evenly over range(total)."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()
