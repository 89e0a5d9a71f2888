"""Looks for the test clips of an evaluation in training data, by id and by their stored frames.

A test clip has leaked if a training clip has the same name, or if at least half of its frames look
like frames of one training clip: if their perceptual hashes differ in few bits. Frames that show
nothing, such as black ones, do not count. A clip that was cropped, mirrored or overlaid with text
is not found this way.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.frame_hashes import NO_HASH, add_hashes, read_hashes, shards_without_hashes
from pipelines.artifacts.locations import find_data, is_manifest
from pipelines.artifacts.manifest import ManifestRows, check_manifest
from pipelines.artifacts.training_run import TrainingData, training_data_of
from pipelines.common import ray_errors
from pipelines.common.progress import Progress
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.gallery import Gallery
from pipelines.evaluate.known_galleries import base_name
from stgt.errors import SettingError
from stgt.retrieval.near_duplicates import NearDuplicates

logger = logging.getLogger(__name__)

RECORDED = "recorded"
"""Stands for the training data that are recorded with the checkpoint."""
MOST_BITS = 6
"""Largest number of differing bits of the hashes of two frames that count as the same."""
LEAST_SHARE = 0.5
"""Fraction of the frames of a test clip that one training clip must have."""
SMALL_STORE_CLIPS = 4096
"""Up to this number of clips without hashes, they are computed without Ray."""
ROWS_AT_A_TIME = 100_000
NOT_CHECKED = "not checked"

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Leak:
    """A test clip that is in the training data."""

    clip_id: str
    by: str
    """`id`, `frames`, or `id and frames`."""
    train_clip_id: str
    """The training clip: that with most of the frames, otherwise one with the same name."""
    data: str
    """The training data that contain it."""
    frames: int
    """Number of frames of the test clip that the training clip has; 0 if only the names agree."""
    of: int
    """Number of frames of the test clip that show something; 0 if they were not compared."""


@dataclass(frozen=True)
class Leakage:
    """Result of a check."""

    against: tuple[str, ...]
    """The training data."""
    with_frames: tuple[str, ...]
    """Those of the training data whose frames were compared, beside names."""
    clips: int
    """Number of test clips."""
    ids_only: tuple[str, ...]
    """Test clips that were compared by id only: their frames are not stored, or show nothing."""
    leaked: tuple[Leak, ...]
    unknown: str | None
    """Where recorded training data end, if more is unknown."""
    why_ids: str = ""
    """Why no frames were compared at all, in words; empty if some were."""

    @property
    def by_frames(self) -> bool:
        """Whether frames were compared for all test clips and all training data."""
        return self.with_frames == self.against and not self.ids_only

    @property
    def is_clean(self) -> bool:
        """Whether everything was compared and nothing was found."""
        return not self.leaked and self.by_frames and self.unknown is None

    def __str__(self) -> str:
        count = len(self.leaked)
        found = f"none of the {self.clips:,} test clips is"
        if count:
            kinds = Counter(one.by for one in self.leaked)
            said = ", ".join(f"{number:,} by {kind}" for kind, number in sorted(kinds.items()))
            found = f"{count:,} of the {self.clips:,} test clips {'is' if count == 1 else 'are'}"
            said = f" ({said}); the metrics include {'it' if count == 1 else 'them'}"
        else:
            said = ""
        rest = "" if self.unknown is None else f"; {self.unknown}"
        return f"{found} in {', '.join(self.against)}, {self._compared()}{said}{rest}"

    def _compared(self) -> str:
        """Return how the test clips were compared with each of the training data."""
        by_id = [uri for uri in self.against if uri not in self.with_frames]
        frames = (
            f"by id and by 64-bit hashes of stored frames (at most {MOST_BITS} bits differ, in at "
            "least half of the frames)"
        )
        if not self.with_frames:
            return f"compared by id only, because {self.why_ids}"
        if by_id:
            how = (
                f"compared with {', '.join(self.with_frames)} {frames}, and with "
                f"{', '.join(by_id)} by id only, because no frames are stored there"
            )
        else:
            how = f"compared {frames}"
        if not self.ids_only:
            return how
        count = len(self.ids_only)
        return (
            f"{how}, except for {count:,} test {'clip' if count == 1 else 'clips'} compared by id "
            "only, because no frame that shows something is stored"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values for `metrics.json`."""
        return {
            "checked": True,
            "clean": self.is_clean,
            "against": list(self.against),
            "by_frames": self.by_frames,
            "compared": [
                {"data": uri, "by": "id and frames" if uri in self.with_frames else "id"}
                for uri in self.against
            ],
            "ids_only": list(self.ids_only),
            "unknown": self.unknown,
            "leaked": [asdict(one) for one in self.leaked],
        }


def resolve_training_data(config: EvaluateConfig) -> TrainingData | None:
    """Return the training data to compare with, with absolute URIs; None if none are named.

    Raises:
        SettingError: The checkpoint does not record its training data.
        ClipStoreError, ManifestError: The data do not exist.
    """
    if not config.leakage_against:
        return None
    found: list[str] = []
    unknown: str | None = None
    for one in config.leakage_against:
        if one != RECORDED:
            found.append(find_data(one))
            continue
        recorded = training_data_of(config.checkpoint_uri)
        if not recorded.uris:
            raise SettingError(
                f"leakage_against: no training data are recorded with {config.checkpoint}; name "
                "the clip stores or manifests that it was trained on"
            )
        found += [find_data(uri) for uri in recorded.uris]
        unknown = recorded.unknown
    for uri in found:
        if is_manifest(uri):
            check_manifest(uri)
        else:
            ClipStore(uri)
    return TrainingData(tuple(dict.fromkeys(found)), unknown)


def needs_ray(config: EvaluateConfig, training: TrainingData | None) -> bool:
    """Return whether so many clips lack hashes that they are computed on Ray."""
    if training is None or not _has_frames(config):
        return False
    stores = [ClipStore(uri) for uri in (*training.uris, config.data_uri) if not is_manifest(uri)]
    return any(_is_large(store, shards_without_hashes(store)) for store in stores)


def _has_frames(config: EvaluateConfig) -> bool:
    """Return whether the frames of test clips are stored."""
    return config.data is not None and not is_manifest(config.data)


def _is_large(store: ClipStore, shards: Sequence[int]) -> bool:
    return sum(store.shard_sizes[shard] for shard in shards) > SMALL_STORE_CLIPS


def check_leakage(config: EvaluateConfig, gallery: Gallery, training: TrainingData) -> Leakage:
    """Look for the clips of a gallery in training data.

    Args:
        config: Names the store of the test clips, if there is one.
        gallery: The test clips.
        training: Absolute URIs of clip stores and manifests.
    """
    wanted = _TestClips(gallery)
    stores = [uri for uri in training.uris if not is_manifest(uri)]
    if _has_frames(config) and stores:
        wanted.read_frames(_with_hashes(config.data_uri), gallery)
    # Frames that show nothing cannot be compared, so they do not count as frames.
    with_frames = wanted.has_frames
    for uri in training.uris:
        if is_manifest(uri):
            for ids in _ids_of_manifest(uri):
                wanted.look_for_ids(ids, uri)
            continue
        store = _with_hashes(uri) if with_frames else ClipStore(uri)
        for shard in range(len(store.shard_sizes)):
            wanted.look_in_shard(store, shard, with_frames)
    return Leakage(
        against=training.uris,
        with_frames=tuple(stores) if with_frames else (),
        clips=gallery.num_videos,
        ids_only=wanted.without_frames(),
        leaked=wanted.leaked(),
        unknown=training.unknown,
        why_ids=_why_ids(config, stores, with_frames),
    )


def _why_ids(config: EvaluateConfig, stores: Sequence[str], with_frames: bool) -> str:
    """Return why clips are compared by id only; empty if frames are compared as well."""
    if with_frames:
        return ""
    if not stores:
        return "no frames of the training data are stored"
    if not _has_frames(config):
        return "no frames of the test clips are stored"
    return "no stored frame of the test clips shows something"


def _with_hashes(uri: str) -> ClipStore:
    """Open a store, after hashing the frames of those of its shards that have no hashes yet."""
    store = ClipStore(uri)
    pending = shards_without_hashes(store)
    if not pending:
        return store
    count = sum(store.shard_sizes[shard] for shard in pending)
    logger.info("%s was made without hashes of its frames; %d clips get them now", uri, count)
    progress = Progress("hash stored frames", count, "clips")
    if not _is_large(store, pending):
        for shard in pending:
            progress.advance(add_hashes(store, shard))
        return store
    import ray.data

    # Each shard's file is written completely or not at all, so a restart hashes only the others.
    made = ray.data.from_items(
        [{"shard": shard} for shard in pending], override_num_blocks=len(pending)
    ).map_batches(
        _hash_shards,  # type: ignore[arg-type]
        fn_kwargs={"uri": uri},
        batch_size=1,
    )
    for row in ray_errors.rows(made):
        progress.advance(int(row["count"]))
    return store


@ray_errors.errors_as_rows
def _hash_shards(batch: dict[str, np.ndarray], uri: str) -> dict[str, np.ndarray]:
    """Hash the frames of shards (a Ray Data task)."""
    store = ClipStore(uri)
    return {"count": np.array([add_hashes(store, int(shard)) for shard in batch["shard"]])}


def _ids_of_manifest(uri: str) -> Iterator[list[tuple[str, str]]]:
    rows = ManifestRows(uri)
    for first in range(0, len(rows), ROWS_AT_A_TIME):
        table = rows.table(first, first + ROWS_AT_A_TIME, ["clip_id", "video_id"])
        yield list(zip(*(table[name].to_pylist() for name in ("clip_id", "video_id")), strict=True))


class _TestClips:
    """The test clips, and what was found of them in the training data so far."""

    def __init__(self, gallery: Gallery) -> None:
        self._ids = gallery.clip_ids
        self._videos_of_name: dict[str, list[int]] = {}
        """Clips of different folders may have the same name."""
        for video, clip_id in enumerate(gallery.clip_ids):
            self._videos_of_name.setdefault(base_name(clip_id), []).append(video)
        self._informative = np.zeros(gallery.num_videos, dtype=np.int64)
        """[V] number of frames of each test clip that show something."""
        self._video_of_frame = np.empty(0, dtype=np.int64)
        self._search: NearDuplicates | None = None
        self._by_id: dict[int, tuple[str, str]] = {}
        """Training clip and data with the same name, by test clip."""
        self._by_frames: dict[int, tuple[int, str, str]] = {}
        """Number of frames, training clip and data with the most frames, by test clip."""

    @property
    def has_frames(self) -> bool:
        """Whether any test clip has a frame that can be compared."""
        return bool(self._informative.any())

    def without_frames(self) -> tuple[str, ...]:
        """Return the test clips without a frame that can be compared."""
        return tuple(self._ids[video] for video in np.flatnonzero(self._informative == 0))

    def read_frames(self, store: ClipStore, gallery: Gallery) -> None:
        """Read the hashes of the test clips' frames."""
        videos: list[npt.NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
        hashes: list[Hashes] = [np.empty(0, dtype=np.uint64)]
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for video, place in enumerate(gallery.places):
            if place is not None:
                by_shard.setdefault(place[0], []).append((place[1], video))
        for shard, places in sorted(by_shard.items()):
            table = read_hashes(store, shard)
            assert table is not None, "written by _with_hashes"
            lists = table["hashes"].to_pylist()
            for row, video in places:
                found = np.unique(np.array(lists[row], dtype=np.uint64))
                found = found[found != NO_HASH]
                self._informative[video] = len(found)
                videos.append(np.full(len(found), video, dtype=np.int64))
                hashes.append(found)
        self._video_of_frame = np.concatenate(videos)
        self._search = NearDuplicates(np.concatenate(hashes), MOST_BITS)

    def look_for_ids(self, ids: Sequence[tuple[str, str]], data: str) -> None:
        """Look for the names of test clips among the clip and video ids of training clips."""
        for clip_id, video_id in ids:
            for name in {base_name(clip_id), base_name(video_id)}:
                for video in self._videos_of_name.get(name, ()):
                    self._by_id.setdefault(video, (clip_id, data))

    def look_in_shard(self, store: ClipStore, shard: int, with_frames: bool) -> None:
        """Look for test clips in a shard of a training store."""
        if not with_frames:
            table = store.read_shard(shard, ["clip_id", "video_id"])
        else:
            table = read_hashes(store, shard)
            assert table is not None, "written by _with_hashes"
        ids = table["clip_id"].to_pylist()
        self.look_for_ids(list(zip(ids, table["video_id"].to_pylist(), strict=True)), store.uri)
        if self._search is None or not with_frames:
            return
        lists = table["hashes"].combine_chunks()
        counts = np.diff(np.asarray(lists.offsets, dtype=np.int64))
        hashes = np.asarray(lists.values, dtype=np.uint64)[: int(counts.sum())]
        frames, places = self._search.find(hashes)
        clips = np.repeat(np.arange(len(ids)), counts)[places]
        # Frames of a test clip that a training clip has, each counted once.
        triples = np.unique(np.stack([self._video_of_frame[frames], clips, frames], axis=1), axis=0)
        pairs, numbers = np.unique(triples[:, :2], axis=0, return_counts=True)
        for (video, clip), number in zip(pairs.tolist(), numbers.tolist(), strict=True):
            enough = number >= max(1.0, LEAST_SHARE * self._informative[video])
            if enough and number > self._by_frames.get(video, (0,))[0]:
                self._by_frames[video] = (number, ids[clip], store.uri)

    def leaked(self) -> tuple[Leak, ...]:
        """Return the test clips that were found, in the order of the gallery."""
        leaks = []
        for video in sorted(self._by_id.keys() | self._by_frames.keys()):
            leak = Leak(self._ids[video], "id", "", "", 0, int(self._informative[video]))
            if video in self._by_id:
                name, data = self._by_id[video]
                leak = replace(leak, train_clip_id=name, data=data)
            if video in self._by_frames:
                frames, name, data = self._by_frames[video]
                by = "id and frames" if video in self._by_id else "frames"
                leak = replace(leak, by=by, train_clip_id=name, data=data, frames=frames)
            leaks.append(leak)
        return tuple(leaks)
