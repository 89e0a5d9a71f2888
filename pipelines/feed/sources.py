"""Reads training clips from a clip store, or decodes the videos of a manifest on the fly.

Both are divided into shards, and a sample is one row of a shard. A manifest clip that cannot be
decoded or has no caption is reported with a reason and is not replaced by another clip.

Legend: T frames, H and W pixels.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.artifacts.clip_store import ClipStore, caption_counts, more_than
from pipelines.artifacts.manifest import ManifestRows
from pipelines.common import storage
from pipelines.common.config import fingerprint
from pipelines.feed.config import Resize
from pipelines.feed.plan import IntArray
from pipelines.feed.shard_cache import ShardCache
from pipelines.video.config import FrameRules, SamplingConfig
from stgt.errors import VideoDecodeError
from stgt.inputs.frame_choice import FrameChoice, choose_frames

ROWS_PER_PART = 1024
"""Number of manifest rows that form a shard. Any range of rows is a random sample of the clips."""
EXTRAS = "extras"
FRAMES, FRAME_INDICES = "frames", "frame_indices"
SHARDS_IN_MEMORY = 2
"""A block of samples lies in one shard, or in two at the end of a shard."""

Clip = Mapping[str, Any]


def shards_in_memory(shard_sizes: Sequence[int], window: int) -> int:
    """Return the number of shards of a dataset to keep open.

    Args:
        shard_sizes: Number of clips of each shard.
        window: Number of samples that are read in another order than that of the plan, as with
            `similar_captions`. A block then has samples of all of their shards.
    """
    return SHARDS_IN_MEMORY + math.ceil(window * len(shard_sizes) / max(1, sum(shard_sizes)))


class ClipSource(Protocol):
    """A dataset of clips in shards."""

    uri: str
    shard_sizes: list[int]

    def captions_per_shard(self) -> list[list[int]]:
        """Return for each shard the number of clips with more than j captions, j = 0, 1, ..."""
        ...

    def caption_counts(self, shard: int) -> IntArray:
        """Return [clips] int64, the number of captions of each clip of a shard."""
        ...

    def clip_ids(self, shard: int) -> list[str]:
        """Return the id of each clip of a shard."""
        ...

    def first_captions(self, shard: int) -> list[str]:
        """Return the first caption of each clip of a shard; empty for a clip without captions."""
        ...

    def videos(self, shard: int) -> list[tuple[str, str]]:
        """Return the id and the URI of the video of each clip of a shard."""
        ...

    def clip(self, shard: int, row: int) -> Clip:
        """Return a clip with at least `clip_id`, `captions`, `video_uri`, `start_s`, `end_s`."""
        ...

    def clips(self, shard: int, rows: Sequence[int]) -> list[Clip]:
        """Return some clips of a shard, given in ascending order."""
        ...

    def frames(
        self, clip: Clip, num_frames: int, how: FrameChoice, generator: np.random.Generator
    ) -> npt.NDArray[np.uint8]:
        """Return frames [T, H, W, 3] uint8 of a clip.

        Raises:
            VideoDecodeError: The clip cannot be decoded or has no caption.
        """
        ...

    def prepare(self, shards: Sequence[int], most_bytes: float) -> None:
        """Start prefetching shards that are needed soon, and return immediately.

        Args:
            shards: shards in the order in which they are needed.
            most_bytes: maximum size of the shards to prefetch; later shards are left out.
        """
        ...

    def describe_work(self, clip: Clip) -> str:
        """Describe the work of loading a clip, for status messages."""
        ...

    def close(self) -> None:
        """Stop the threads and processes of the source."""
        ...


def first_of_each(captions: Sequence[Sequence[str]]) -> list[str]:
    """Return the first of the captions of each clip; empty for a clip without captions."""
    return [one[0] if one else "" for one in captions]


class StoreSource:
    """The clips of a clip store."""

    COLUMNS = ("clip_id", "captions", "video_uri", "start_s", "end_s")

    def __init__(
        self,
        uri: str,
        cache: ShardCache | None = None,
        with_extras: bool = False,
        with_frames: bool = True,
        window: int = 0,
    ) -> None:
        """Open a store.

        Args:
            uri: the store.
            cache: cache that shares shards with other processes of this node. None reads shards
                into this process, which suits a process that uses whole shards.
            with_extras: whether clips have `extras` as well.
            with_frames: whether clips have `frames`. If not, they have `frame_indices`, which is as
                long.
            window: number of samples that are read in another order than that of the plan.

        Raises:
            ClipStoreError: The store does not exist, or its ingest has not finished.
        """
        self._store = ClipStore(uri)
        frames = FRAMES if with_frames else FRAME_INDICES
        self._columns = (*self.COLUMNS, frames, *([EXTRAS] if with_extras else []))
        self.uri = self._store.uri
        self.shard_sizes = self._store.shard_sizes
        self._shards: OrderedDict[int, pa.Table] = OrderedDict()
        self._shards_in_memory = shards_in_memory(self.shard_sizes, window)
        self._cache = cache
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="shards_ahead")
        self._prepared: set[int] = set()

    def captions_per_shard(self) -> list[list[int]]:
        """Return for each shard the number of clips with more than j captions, j = 0, 1, ..."""
        return self._store.captions_per_shard

    def caption_counts(self, shard: int) -> IntArray:
        """Return [clips] int64, the number of captions of each clip of a shard."""
        if self._cache is None and shard not in self._shards:
            return self._store.caption_counts(shard)
        return caption_counts(self._table(shard)["captions"])

    def clip_ids(self, shard: int) -> list[str]:
        """Return the id of each clip of a shard."""
        return self._store.read_shard(shard, ["clip_id"])["clip_id"].to_pylist()

    def videos(self, shard: int) -> list[tuple[str, str]]:
        """Return the id and the URI of the video of each clip of a shard."""
        table = self._store.read_shard(shard, ["video_id", "video_uri"])
        return list(zip(*(column.to_pylist() for column in table.columns), strict=True))

    def clips(self, shard: int, rows: Sequence[int]) -> list[Clip]:
        """Return some rows of a shard, in ascending order, without reading all of the shard."""
        return list(self._store.read_rows(shard, list(rows), list(self._columns)))

    def first_captions(self, shard: int) -> list[str]:
        """Return the first caption of each clip of a shard, without reading its frames."""
        return first_of_each(self._store.read_columns(shard, ["captions"])["captions"].to_pylist())

    def texts(self, shard: int) -> list[Clip]:
        """Return `captions` and `extras` of each clip of a shard, without reading its frames."""
        return self._store.read_columns(shard, ["captions", EXTRAS]).to_pylist()

    def _cache_key(self, shard: int) -> str:
        # The columns are part of the key, since the cache may hold shards of another version.
        return f"{self._store.shard_key(shard)}-{fingerprint(list(self._columns))}"

    def _read(self, shard: int) -> pa.Table:
        return self._store.read_shard(shard, list(self._columns))

    def clip(self, shard: int, row: int) -> Clip:
        """Return a row of the store."""
        return self._table(shard).slice(row, 1).to_pylist()[0]

    def _table(self, shard: int) -> pa.Table:
        if shard not in self._shards:
            self._prepared.discard(shard)
            if self._cache is None:
                self._shards[shard] = self._read(shard)
            else:
                key = self._cache_key(shard)
                self._shards[shard] = self._cache.table(key, lambda: self._read(shard))
            while len(self._shards) > self._shards_in_memory:
                self._shards.popitem(last=False)
        self._shards.move_to_end(shard)
        return self._shards[shard]

    def frames(
        self, clip: Clip, num_frames: int, how: FrameChoice, generator: np.random.Generator
    ) -> npt.NDArray[np.uint8]:
        """Decode some of the stored frames."""
        coded = clip[FRAMES]
        chosen = choose_frames(len(coded), num_frames, how, generator)
        return self._store.decode([coded[i] for i in chosen])

    def prepare(self, shards: Sequence[int], most_bytes: float) -> None:
        """Let the cache fetch shards in a background thread.

        If that fails, the shard is fetched again when a clip needs it, which raises the error.
        """
        if self._cache is None:
            return
        for shard in shards:
            most_bytes -= self._store.shard_bytes(shard)
            if most_bytes < 0:
                return
            if shard not in self._prepared and shard not in self._shards:
                self._prepared.add(shard)
                key = self._cache_key(shard)
                self._ahead.submit(self._cache.prepare, key, functools.partial(self._read, shard))

    def describe_work(self, clip: Clip) -> str:
        """Describe the work of loading a clip, for status messages."""
        return f"reading {clip['clip_id']} from {self.uri}"

    def close(self) -> None:
        """Cancel prefetching."""
        self._ahead.shutdown(wait=False, cancel_futures=True)


class ManifestSource:
    """The clips of a manifest, decoded on demand."""

    COLUMNS = ("clip_id", "captions", "video_uri", "start_s", "end_s")

    def __init__(
        self,
        uri: str,
        size: int,
        resize: Resize,
        frame_rules: FrameRules = 2,
        with_extras: bool = False,
        window: int = 0,
    ) -> None:
        self._columns = (*self.COLUMNS, EXTRAS) if with_extras else self.COLUMNS
        self.uri = storage.resolve(uri)
        self._rows = ManifestRows(self.uri)
        self._size = size
        self._resize: Resize = resize
        self._frame_rules: FrameRules = frame_rules
        count = len(self._rows)
        self.shard_sizes = [
            min(ROWS_PER_PART, count - first) for first in range(0, count, ROWS_PER_PART)
        ]
        self._parts: OrderedDict[int, list[dict]] = OrderedDict()
        self._shards_in_memory = shards_in_memory(self.shard_sizes, window)
        self._decoder: Any = None
        self._decodes: tuple[int, FrameChoice] | None = None

    def captions_per_shard(self) -> list[list[int]]:
        """Return for each shard the number of clips with more than j captions, j = 0, 1, ..."""
        if self._rows.has_one_caption_each:
            return [[size] for size in self.shard_sizes]
        counts = self._rows.caption_counts()
        return [
            more_than(counts[first : first + ROWS_PER_PART])
            for first in range(0, len(counts), ROWS_PER_PART)
        ]

    def caption_counts(self, shard: int) -> IntArray:
        """Return [clips] int64, the number of captions of each clip of a shard."""
        if self._rows.has_one_caption_each:
            return np.ones(self.shard_sizes[shard], dtype=np.int64)
        # Not the counts of all rows: a data worker would read the captions of the whole manifest.
        return np.array([len(row["captions"]) for row in self._part(shard)], dtype=np.int64)

    def clip_ids(self, shard: int) -> list[str]:
        """Return the id of each clip of a shard."""
        first = shard * ROWS_PER_PART
        rows = self._rows.read(first, first + ROWS_PER_PART, ["clip_id"])
        return [row["clip_id"] for row in rows]

    def videos(self, shard: int) -> list[tuple[str, str]]:
        """Return the id and the URI of the video of each clip of a shard."""
        first = shard * ROWS_PER_PART
        rows = self._rows.read(first, first + ROWS_PER_PART, ["video_id", "video_uri"])
        return [(row["video_id"], row["video_uri"]) for row in rows]

    def first_captions(self, shard: int) -> list[str]:
        """Return the first caption of each clip of a shard."""
        return first_of_each([row["captions"] for row in self._part(shard)])

    def texts(self, shard: int) -> list[Clip]:
        """Return `captions` and `extras` of each clip of a shard."""
        first = shard * ROWS_PER_PART
        return list(self._rows.read(first, first + ROWS_PER_PART, ["captions", EXTRAS]))

    def clip(self, shard: int, row: int) -> Clip:
        """Return a row of the manifest."""
        return self._part(shard)[row]

    def clips(self, shard: int, rows: Sequence[int]) -> list[Clip]:
        """Return some rows of the manifest."""
        return [self._part(shard)[row] for row in rows]

    def _part(self, shard: int) -> list[dict]:
        if shard not in self._parts:
            first = shard * ROWS_PER_PART
            self._parts[shard] = self._rows.read(first, first + ROWS_PER_PART, list(self._columns))
            while len(self._parts) > self._shards_in_memory:
                self._parts.popitem(last=False)
        self._parts.move_to_end(shard)
        return self._parts[shard]

    def frames(
        self, clip: Clip, num_frames: int, how: FrameChoice, generator: np.random.Generator
    ) -> npt.NDArray[np.uint8]:
        """Decode frames of the video."""
        from pipelines.video.decoder import ClipDecoder, ClipSpan

        if self._decodes != (num_frames, how):
            self.close()
            sampling = SamplingConfig(
                num_frames=num_frames,
                size=self._size,
                resize=self._resize,
                frame_choice=how,
                frame_rules=self._frame_rules,
            )
            self._decoder, self._decodes = ClipDecoder(sampling), (num_frames, how)
        if not clip["captions"]:
            raise VideoDecodeError(clip["clip_id"], "no_caption", "the clip has no caption")
        seed = tuple(generator.integers(2**32, size=2).tolist())
        source = ClipSpan(
            clip["clip_id"], clip["video_uri"], clip["start_s"], clip["end_s"], seed=seed
        )
        return self._decoder.decode(source).frames

    def prepare(self, shards: Sequence[int], most_bytes: float) -> None:
        """Do nothing, since rows of a manifest are read quickly."""

    def describe_work(self, clip: Clip) -> str:
        """Describe the work of loading a clip, for status messages."""
        return f"decoding {clip['clip_id']} from {clip['video_uri']}"

    def close(self) -> None:
        """Stop the decoder's child process."""
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = self._decodes = None
