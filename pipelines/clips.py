"""The clip store: Parquet shards of sampled frames and captions, and a catalogue written last.

Layout below the store's folder:
    store.json                the sampling config and the manifest it was made for
    shards/00003.parquet      clips of shard 3
    shards/00003.json         its counts and checksum; a shard without it is unfinished
    quarantine/00003.parquet  clips of shard 3 that could not be used, with reasons
    catalogue.json            counts and checksums of all shards; a store without it is unfinished

Legend: F frames, H and W pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import simplejpeg

from pipelines import storage
from pipelines.config import SamplingConfig
from stgt.errors import ClipStoreError

CATALOGUE = "catalogue.json"
STORE = "store.json"

CLIP_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("video_id", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("frames", pa.list_(pa.large_binary())),
        ("frame_indices", pa.list_(pa.int64())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("fps", pa.float64()),
        ("duration_s", pa.float64()),
        ("num_source_frames", pa.int64()),
        ("codec", pa.string()),
        ("decoder", pa.string()),
        ("salvaged", pa.bool_()),
    ]
)

QUARANTINE_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("video_uri", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("attempts", pa.int32()),
    ]
)


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"{index:05d}.parquet"


def encode_frames(frames: npt.NDArray[np.uint8], sampling: SamplingConfig) -> list[bytes]:
    """[F, H, W, 3] uint8 -> F coded images, as the sampling config says."""
    if sampling.codec == "raw":
        return [frame.tobytes() for frame in frames]
    return [
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(frame), quality=sampling.jpeg_quality, colorsubsampling="444"
        )
        for frame in frames
    ]


def decode_frames(coded: list[bytes], sampling: SamplingConfig) -> npt.NDArray[np.uint8]:
    """F coded images -> [F, H, W, 3] uint8."""
    size = sampling.size
    if sampling.codec == "raw":
        return np.stack([np.frombuffer(c, dtype=np.uint8).reshape(size, size, 3) for c in coded])
    return np.stack([simplejpeg.decode_jpeg(image) for image in coded])


class ClipStore:
    """A finished clip store, for reading."""

    def __init__(self, uri: str) -> None:
        """Open a store.

        Raises:
            ClipStoreError: there is none, or its ingest has not finished.
        """
        self.uri = storage.resolve(uri)
        catalogue_uri = storage.join(self.uri, CATALOGUE)
        if not storage.exists(catalogue_uri):
            raise ClipStoreError(
                f"clip store {self.uri} has no {CATALOGUE}: give the folder that ingest printed, "
                "or run the ingest again to finish it"
            )
        self.catalogue: dict[str, Any] = storage.read_json(catalogue_uri)
        self.sampling = SamplingConfig(**self.catalogue["sampling"])
        self.shard_sizes = [int(shard["clips"]) for shard in self.catalogue["shards"]]

    @property
    def num_clips(self) -> int:
        """Usable clips in all shards."""
        return int(self.catalogue["clips"])

    @property
    def num_quarantined(self) -> int:
        """Clips that were put into quarantine."""
        return int(self.catalogue["quarantined"])

    def read_shard(self, index: int, columns: list[str] | None = None) -> pa.Table:
        """The clips of a shard, in a fixed order."""
        return storage.read_table(
            storage.join(self.uri, "shards", shard_name(index)), columns=columns
        )
