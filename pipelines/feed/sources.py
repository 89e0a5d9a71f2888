"""Where training clips come from: a clip store, or the videos of a manifest decoded on the fly.

Both are divided into shards of which a sample is one row. A clip of a manifest that cannot be
decoded, or has no caption, is an error with a reason; nothing takes its place.

Legend: T frames, H and W pixels.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.manifest import ManifestRows, check_manifest
from pipelines.common import storage
from pipelines.common.config import fingerprint
from pipelines.feed.config import LoaderConfig, Resize
from pipelines.feed.plan import TrainPlan
from pipelines.feed.shard_cache import ShardCache
from pipelines.video.config import SamplingConfig
from stgt.errors import ClipStoreError, VideoDecodeError
from stgt.inputs.frame_choice import FrameChoice, choose_frames

MANIFEST_ENDING = ".parquet"
ROWS_PER_PART = 1024
"""Rows of a manifest that stand for a shard; its rows are a random sample, so these are too."""
SHARDS_IN_MEMORY = 2
"""A block of samples lies in one shard, or in two where one ends."""

Clip = Mapping[str, Any]


class ClipSource(Protocol):
    """A data set of clips in shards."""

    uri: str
    shard_sizes: list[int]

    def clip(self, shard: int, row: int) -> Clip:
        """A clip with at least `clip_id` and `captions`."""
        ...

    def frames(
        self, clip: Clip, num_frames: int, how: FrameChoice, generator: np.random.Generator
    ) -> npt.NDArray[np.uint8]:
        """Frames [T, H, W, 3] uint8 of a clip.

        Raises:
            VideoDecodeError: the clip has none.
        """
        ...

    def prepare(self, shards: Sequence[int], most_bytes: float) -> None:
        """Have the first ones of the shards ready that are needed soon, without waiting for them.

        Args:
            shards: in the order in which they are needed.
            most_bytes: room for them.
        """
        ...

    def describe_work(self, clip: Clip) -> str:
        """What takes the time when a clip of this source is loaded, in words."""
        ...

    def close(self) -> None:
        """End whatever the source has begun."""
        ...


class StoreSource:
    """The clips of a clip store."""

    COLUMNS = ("clip_id", "captions", "frames")

    def __init__(self, uri: str, cache: ShardCache | None = None) -> None:
        """Open a store.

        Args:
            uri: the store.
            cache: shares its shards with the other processes of this node; None reads them into
                this process, for one that goes through whole shards by itself.

        Raises:
            ClipStoreError: there is none, or its ingest has not finished.
        """
        self._store = ClipStore(uri)
        self.uri = self._store.uri
        self.shard_sizes = self._store.shard_sizes
        self._shards: OrderedDict[int, pa.Table] = OrderedDict()
        self._cache = cache
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="shards_ahead")
        self._prepared: set[int] = set()

    def _read(self, shard: int) -> pa.Table:
        return self._store.read_shard(shard, list(self.COLUMNS))

    def clip(self, shard: int, row: int) -> Clip:
        """A row of the store."""
        if shard not in self._shards:
            self._prepared.discard(shard)
            if self._cache is None:
                self._shards[shard] = self._read(shard)
            else:
                key = self._store.shard_key(shard)
                self._shards[shard] = self._cache.table(key, lambda: self._read(shard))
            while len(self._shards) > SHARDS_IN_MEMORY:
                self._shards.popitem(last=False)
        self._shards.move_to_end(shard)
        return self._shards[shard].slice(row, 1).to_pylist()[0]

    def frames(
        self, clip: Clip, num_frames: int, how: FrameChoice, generator: np.random.Generator
    ) -> npt.NDArray[np.uint8]:
        """Some of the frames that are stored."""
        coded = clip["frames"]
        chosen = choose_frames(len(coded), num_frames, how, generator)
        return self._store.decode([coded[i] for i in chosen])

    def prepare(self, shards: Sequence[int], most_bytes: float) -> None:
        """Have the cache fetch shards, in a thread.

        One that cannot be fetched is tried again when its clips are asked for, which says why.
        """
        if self._cache is None:
            return
        for shard in shards:
            most_bytes -= self._store.shard_bytes(shard)
            if most_bytes < 0:
                return
            if shard not in self._prepared and shard not in self._shards:
                self._prepared.add(shard)
                key = self._store.shard_key(shard)
                self._ahead.submit(self._cache.prepare, key, functools.partial(self._read, shard))

    def describe_work(self, clip: Clip) -> str:
        """In words."""
        return f"reading {clip['clip_id']} from {self.uri}"

    def close(self) -> None:
        """Fetch nothing more ahead."""
        self._ahead.shutdown(wait=False, cancel_futures=True)


class ManifestSource:
    """The clips of a manifest, decoded when they are asked for."""

    COLUMNS = ("clip_id", "captions", "video_uri", "start_s", "end_s")

    def __init__(self, uri: str, size: int, resize: Resize) -> None:
        self.uri = storage.resolve(uri)
        self._rows = ManifestRows(self.uri)
        self._size = size
        self._resize: Resize = resize
        count = len(self._rows)
        self.shard_sizes = [
            min(ROWS_PER_PART, count - first) for first in range(0, count, ROWS_PER_PART)
        ]
        self._parts: OrderedDict[int, list[dict]] = OrderedDict()
        self._decoder: Any = None
        self._decodes: tuple[int, FrameChoice] | None = None

    def clip(self, shard: int, row: int) -> Clip:
        """A row of the manifest."""
        if shard not in self._parts:
            first = shard * ROWS_PER_PART
            self._parts[shard] = self._rows.read(first, first + ROWS_PER_PART, list(self.COLUMNS))
            while len(self._parts) > SHARDS_IN_MEMORY:
                self._parts.popitem(last=False)
        self._parts.move_to_end(shard)
        return self._parts[shard][row]

    def frames(
        self, clip: Clip, num_frames: int, how: FrameChoice, generator: np.random.Generator
    ) -> npt.NDArray[np.uint8]:
        """Frames of the video itself."""
        from pipelines.video.decoder import ClipDecoder, ClipSpan

        if self._decodes != (num_frames, how):
            self.close()
            sampling = SamplingConfig(
                num_frames=num_frames, size=self._size, resize=self._resize, frame_choice=how
            )
            self._decoder, self._decodes = ClipDecoder(sampling), (num_frames, how)
        if not clip["captions"]:
            raise VideoDecodeError(clip["clip_id"], "no_caption", "there is none")
        seed = tuple(generator.integers(2**32, size=2).tolist())
        source = ClipSpan(
            clip["clip_id"], clip["video_uri"], clip["start_s"], clip["end_s"], seed=seed
        )
        return self._decoder.decode(source).frames

    def prepare(self, shards: Sequence[int], most_bytes: float) -> None:
        """Rows of a manifest need no time."""

    def describe_work(self, clip: Clip) -> str:
        """In words."""
        return f"decoding {clip['clip_id']} from {clip['video_uri']}"

    def close(self) -> None:
        """End the decoding child."""
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = self._decodes = None


def open_source(uri: str, size: int, resize: Resize, cache: ShardCache | None = None) -> ClipSource:
    """A data set by its URI: a manifest ends in .parquet, anything else is a clip store.

    Args:
        uri: the data set.
        size: pixels along an edge of the frames that a manifest's videos are decoded to.
        resize: how they are fitted into that square.
        cache: shares the shards of a store with the other processes of this node.
    """
    return ManifestSource(uri, size, resize) if is_manifest(uri) else StoreSource(uri, cache)


def open_sources(config: LoaderConfig, cache: ShardCache | None = None) -> list[ClipSource]:
    """The data sets of a training."""
    return [open_source(uri, config.size, config.resize, cache) for uri in config.data]


def make_plan(sources: Sequence[ClipSource], config: LoaderConfig) -> TrainPlan:
    """The order in which their clips are used."""
    sizes = [source.shard_sizes for source in sources]
    return TrainPlan(sizes, config.seed, config.mix, config.hold_out)


def is_manifest(uri: str) -> bool:
    """Whether a data set is a manifest."""
    return uri.endswith(MANIFEST_ENDING)


def check_source(uri: str, size: int, num_frames: int, resize: Resize) -> str:
    """Check that a data set suits a training, and give a digest of what it holds.

    Raises:
        ManifestError: the manifest cannot be used.
        ClipStoreError: the store is missing or unfinished, or holds other frames than needed.
    """
    if is_manifest(uri):
        check_manifest(storage.resolve(uri))
        return digest_of(uri)
    store = ClipStore(uri)
    without = store.num_clips - sum(store.catalogue["histograms"]["captions_per_clip"])
    if without > 0:
        raise ClipStoreError(
            f"{uri} holds {without} clips without a caption; train on a store that was made from "
            "annotations with captions"
        )
    check_frames(store, size, num_frames, resize)
    return digest_of(uri)


def check_frames(store: ClipStore, size: int, num_frames: int, resize: Resize) -> None:
    """Check that a store holds the frames that a model takes.

    Raises:
        ClipStoreError: they are of another size or form, or too few.
    """
    stored = store.sampling
    needed = {"sampling.size": size, "sampling.resize": resize}
    found = {"sampling.size": stored.size, "sampling.resize": stored.resize}
    if differing := [name for name in needed if needed[name] != found[name]]:
        raise ClipStoreError(
            f"{store.uri} was ingested with "
            + ", ".join(f"{name} = {found[name]}" for name in differing)
            + ", the model needs "
            + ", ".join(f"{name} = {needed[name]}" for name in differing)
            + "; ingest again with "
            + " ".join(f"--{name} {needed[name]}" for name in differing)
        )
    if stored.num_frames < num_frames:
        raise ClipStoreError(
            f"{store.uri} holds {stored.num_frames} frames a clip, the model takes {num_frames}; "
            "ingest with more frames (--sampling.num-frames) or take fewer (--num-frames)"
        )


def digest_of(uri: str) -> str:
    """A digest of what a data set holds."""
    return (
        ManifestRows(uri).digest() if is_manifest(uri) else str(ClipStore(uri).catalogue["digest"])
    )


def digest_of_all(digests: list[str]) -> str:
    """One digest of several data sets."""
    return digests[0] if len(digests) == 1 else fingerprint(digests)
