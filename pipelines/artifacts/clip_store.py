"""The clip store: Parquet shards of sampled frames and captions, and a catalog written last.

Layout of the store's folder:
    store.json                settings of the store: sampling, filters, manifest
    manifest.parquet          copy of the manifest; .g1.parquet and so on after it has changed
    members.g1.parquet        shard of each row of a manifest that has changed
    shards/00003.parquet      clips of shard 3
    shards/00003.json         its counts and checksums; a shard without it is unfinished
    hashes/00003.parquet      perceptual hashes of its frames, see `frame_hashes`
    quarantine/00003.parquet  clips of shard 3 that could not be used, with reasons
    catalogue.json            counts and checksums of all shards; a store without it is unfinished
    report.html, report.json  report on the ingest

The clips of a shard are in manifest order. If clips leave quarantine or the store, a duplicate is
moved to quarantine, or captions change, the shard is rewritten as 00003.r1.parquet, which takes
effect once 00003.json is replaced. Readers use the revisions that the catalogue lists.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.common import storage
from pipelines.common.config import to_dict
from pipelines.video import frame_codec
from pipelines.video.config import SamplingConfig
from stgt.errors import ClipStoreError
from stgt.field_marks import earlier_values, with_earlier_values

CATALOGUE = "catalogue.json"
STORE = "store.json"
ROWS_PER_GROUP = 64

CLIP_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("video_id", pa.string()),
        ("video_uri", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("captions", pa.list_(pa.string())),
        ("split", pa.string()),
        ("source", pa.string()),
        ("extras", pa.string()),
        ("frames", pa.list_(pa.large_binary())),
        ("frame_indices", pa.list_(pa.int64())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("fps", pa.float64()),
        ("duration_s", pa.float64()),
        ("num_source_frames", pa.int64()),
        ("source_bytes", pa.int64()),
        ("codec", pa.string()),
        ("decoder", pa.string()),
        ("salvaged", pa.bool_()),
        ("video_hash", pa.string()),
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


class _LaterFields(TypedDict, total=False):
    """Fields of `ShardRecord` that records of earlier versions lack."""

    generation: int
    """How many times the manifest had changed when the shard was written; 0 where it is missing."""
    captions: list[int]
    """Number of clips with more than j captions, for j = 0, 1, ... up to the last such j.
    `captions_of_shards` computes it where it is missing."""


class ShardRecord(_LaterFields):
    """Record of a finished shard."""

    shard: int
    revision: int
    """How many times the shard has been rewritten."""
    clips: int
    quarantined: int
    """Clips in quarantine, including those rejected by filters."""
    salvaged: int
    reasons: dict[str, int]
    bytes: int
    sha256: str
    quarantine_sha256: str
    histograms: dict[str, list[int]]
    """Counts of usable clips per bin; bin edges are in `pipelines.ingest.histograms`."""


def recorded_sampling(sampling: SamplingConfig) -> dict[str, Any]:
    """Return the sampling settings as a store records them; `read_sampling` reads them back.

    Settings that continue the rules of an earlier version are left out, as that version did.
    """
    earlier = earlier_values(SamplingConfig)
    values = to_dict(sampling)
    return {
        name: value
        for name, value in values.items()
        if name not in earlier or value != earlier[name]
    }


def read_sampling(recorded: Mapping[str, Any]) -> SamplingConfig:
    """Return the sampling settings that a store records."""
    return with_earlier_values(SamplingConfig(**recorded), recorded.keys())


def shard_name(index: int, revision: int = 0) -> str:
    """Return the file name of a shard."""
    return f"{index:05d}.parquet" if revision == 0 else f"{index:05d}.r{revision}.parquet"


def shard_uri(store: str, index: int, revision: int = 0) -> str:
    """Return the URI of a shard's clips."""
    return storage.join(store, "shards", shard_name(index, revision))


def record_uri(store: str, index: int) -> str:
    """Return the URI of a shard's record."""
    return storage.join(store, "shards", f"{index:05d}.json")


def manifest_uri(store: str, generation: int) -> str:
    """Return the URI of a store's copy of its manifest."""
    return storage.join(store, _generation_name("manifest", generation))


def members_uri(store: str, generation: int) -> str:
    """Return the URI of the file with the shard of each row of a changed manifest."""
    return storage.join(store, _generation_name("members", generation))


def _generation_name(stem: str, generation: int) -> str:
    return f"{stem}.parquet" if generation == 0 else f"{stem}.g{generation}.parquet"


def default_quarantine(store: str) -> str:
    """Return the quarantine folder that a store uses by default."""
    return storage.join(store, "quarantine")


def shard_writer(path: Any) -> pq.ParquetWriter:
    """Create a writer for a shard's clips; equal clips give equal bytes."""
    # JPEG data does not compress, and a dictionary would not help since all frames are distinct.
    options: dict[str, Any] = {
        "compression": {
            name: "none" if name == "frames.list.element" else "zstd" for name in _leaf_names()
        },
        "use_dictionary": ["split", "source", "codec", "decoder"],
        "write_statistics": ["clip_id"],
    }
    return pq.ParquetWriter(path, CLIP_SCHEMA, **options)


def _leaf_names() -> list[str]:
    return [
        f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        for field in CLIP_SCHEMA
    ]


@storage.patient
def read_columns(uri: str, names: Sequence[str]) -> pa.Table:
    """Read some columns of a Parquet file; from S3, no more than these columns and the footer."""
    fs, path = storage.filesystem(uri)
    # By default, s3fs reads tens of megabytes ahead, which would be most of the other columns.
    with fs.open(path, "rb", cache_type="none") as file:
        return pq.read_table(file, columns=list(names), pre_buffer=False)


def caption_counts(captions: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Return the number of captions of each clip, [clips] int64, from the column `captions`."""
    lengths = pc.list_value_length(captions)  # type: ignore[attr-defined]
    return lengths.fill_null(0).to_numpy().astype(np.int64)


def more_than(counts: npt.NDArray[np.int64]) -> list[int]:
    """Return how many of [clips] counts exceed j, for j = 0, 1, ... up to the last such j."""
    return np.bincount(counts)[::-1].cumsum()[::-1][1:].tolist()


def captions_of_shards(store: str, records: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return `ShardRecord.captions` of each record.

    Where a record of an earlier version lacks it, the column `captions` of the shard is read.
    """
    found = [list(record.get("captions", ())) for record in records]
    lacking = [place for place, record in enumerate(records) if "captions" not in record]
    if lacking:

        def read(place: int) -> list[int]:
            shard, revision = int(records[place]["shard"]), int(records[place].get("revision", 0))
            table = read_columns(shard_uri(store, shard, revision), ["captions"])
            return more_than(caption_counts(table["captions"]))

        with ThreadPoolExecutor(storage.READERS) as pool:
            for place, counts in zip(lacking, pool.map(read, lacking), strict=True):
                found[place] = counts
    return found


def finished_shards(store: str) -> dict[int, ShardRecord]:
    """Read the records of a store's finished shards, by shard index."""
    folder = storage.join(store, "shards")
    names = [name for name in storage.list_names(folder) if name.endswith(".json")]
    return {record["shard"]: record for record in storage.read_jsons(folder, names)}


class ClipStore:
    """Reads a finished clip store."""

    def __init__(self, uri: str) -> None:
        """Open a store.

        Raises:
            ClipStoreError: The store does not exist, or its ingest has not finished.
        """
        self.uri = storage.resolve(uri)
        catalogue_uri = storage.join(self.uri, CATALOGUE)
        if not storage.exists(catalogue_uri):
            raise ClipStoreError(
                f"clip store {self.uri} has no {CATALOGUE}; give the folder that the ingest "
                "printed, or run the ingest again to finish it"
            )
        self.catalogue: dict[str, Any] = storage.read_json(catalogue_uri)
        self.sampling = read_sampling(self.catalogue["sampling"])
        self.shard_sizes = [int(shard["clips"]) for shard in self.catalogue["shards"]]

    @property
    def num_clips(self) -> int:
        """Number of usable clips in all shards."""
        return int(self.catalogue["clips"])

    @property
    def quarantine(self) -> str:
        """Folder that lists the clips that could not be used."""
        return storage.read_json(storage.join(self.uri, STORE))["quarantine"] or default_quarantine(
            self.uri
        )

    @property
    def num_quarantined(self) -> int:
        """Number of clips in quarantine."""
        return int(self.catalogue["quarantined"])

    @functools.cached_property
    def captions_per_shard(self) -> list[list[int]]:
        """Number of clips with more than j captions, for j = 0, 1, ..., of each shard.

        Catalogues of earlier versions lack it: then the column `captions` of each shard is read.
        """
        return captions_of_shards(self.uri, self.catalogue["shards"])

    def caption_counts(self, index: int) -> npt.NDArray[np.int64]:
        """Return the number of captions of each clip of a shard, [clips] int64.

        Only the column `captions` is read.
        """
        table = read_columns(self._shard_uri(index), ["captions"])
        return caption_counts(table["captions"])

    def _shard_uri(self, index: int) -> str:
        return shard_uri(self.uri, index, int(self.catalogue["shards"][index].get("revision", 0)))

    def shard_key(self, index: int) -> str:
        """Return a key that identifies a shard's contents: its checksum."""
        return str(self.catalogue["shards"][index]["sha256"])

    def shard_bytes(self, index: int) -> int:
        """Return the size of a shard's file in bytes."""
        return int(self.catalogue["shards"][index]["bytes"])

    def read_shard(self, index: int, columns: list[str] | None = None) -> pa.Table:
        """Read the clips of a shard, in manifest order."""
        return storage.read_table(self._shard_uri(index), columns=columns)

    def read_columns(self, index: int, columns: Sequence[str]) -> pa.Table:
        """Read small columns of a shard; from S3, no more than these columns."""
        return read_columns(self._shard_uri(index), columns)

    def read_rows(self, index: int, rows: list[int], columns: list[str]) -> list[dict[str, Any]]:
        """Read some clips of a shard, in ascending order, from only their row groups."""
        return storage.read_rows(self._shard_uri(index), rows, columns)

    def decode(self, coded: list[bytes]) -> npt.NDArray[np.uint8]:
        """Decode the stored frames of a clip to [F, size, size, 3] uint8."""
        return frame_codec.decode_frames(coded, self.sampling.codec, self.sampling.size)
