"""The form of a clip store as a Parquet data set of the Hugging Face Hub.

Layout of the folder:
    README.md                         data set card: lists the files of each split, and the columns
    data/train-00000-of-00003.parquet clips of the split `train`, those of one shard of the store
    store/                            everything of the store except the clips: settings, manifest,
                                      records of shards, quarantine, hashes, similarities, report,
                                      catalogue
    store/exported/00003.json         which files hold the clips of shard 3, in which order, and a
                                      checksum of its rows
    export.json                       what the folder was exported from

The columns are those of a shard. A frame is a struct of `bytes` (a JPEG; a PNG if the store holds
raw frames) and `path` (null), which the library `datasets` shows as a picture.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.artifacts.clip_store import CLIP_SCHEMA, ROWS_PER_GROUP
from pipelines.common import storage
from pipelines.video.config import SamplingConfig

CARD = "README.md"
DATA = "data"
STORE_PART = "store"
"""Folder with what the store holds besides clips."""
EXPORTED = "exported"
DATA_FILE = re.compile(r"data/[A-Za-z0-9_]+-\d{5,}-of-\d{5,}\.parquet")
FRAME = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MOST_GROUP_BYTES = 256 * 1024**2
"""Frames of a row group, in bytes. Arrow's binary columns hold at most 2 GiB."""
RESERVED_SPLITS = frozenset({"all"})
"""Names that the library `datasets` gives a meaning of its own."""


class ExportedShard(TypedDict):
    """Where the clips of a shard are in a data set."""

    shard: int
    files: list[str]
    """Paths of the files within the data set."""
    file_of_clip: list[int] | None
    """For each clip of the shard, in its order, which of the files holds it; None if there are not
    several files."""
    clips: int
    bytes: int
    """Size of the files."""
    rows_sha256: str
    """Checksum of the rows, from `RowsDigest`."""


def _dataset_schema() -> pa.Schema:
    fields = [
        pa.field("frames", pa.list_(FRAME)) if field.name == "frames" else field
        for field in CLIP_SCHEMA
    ]
    features = {field.name: _feature(field) for field in fields}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema(fields, metadata=metadata)


def _feature(field: pa.Field) -> dict[str, Any]:
    """Return a column as the library `datasets` describes it in the metadata of a schema."""
    if field.name == "frames":
        return {"feature": {"_type": "Image"}, "_type": "Sequence"}
    if pa.types.is_list(field.type):
        return {"feature": _value(field.type.value_type), "_type": "Sequence"}
    return _value(field.type)


def _value(kind: pa.DataType) -> dict[str, Any]:
    return {"dtype": _NAMES.get(str(kind), str(kind)), "_type": "Value"}


_NAMES = {"double": "float64"}
"""Names of types that differ between Arrow and `datasets`."""

DATASET_SCHEMA = _dataset_schema()


def card_features() -> list[dict[str, Any]]:
    """Return the columns as a data set card lists them."""
    listed = []
    for field in DATASET_SCHEMA:
        if field.name == "frames":
            listed.append({"name": field.name, "sequence": "image"})
        elif pa.types.is_list(field.type):
            listed.append({"name": field.name, "sequence": _value(field.type.value_type)["dtype"]})
        else:
            listed.append({"name": field.name, "dtype": _value(field.type)["dtype"]})
    return listed


def split_names(splits: Iterable[str]) -> dict[str, str]:
    """Map each value of the column `split` to a name that `datasets` accepts, all different."""
    names: dict[str, str] = {}
    for split in sorted(splits):
        plain = re.sub(r"[^A-Za-z0-9_]", "_", split) or "unnamed"
        name, number = f"{plain}_" if plain in RESERVED_SPLITS else plain, 1
        while name in names.values():
            number += 1
            name = f"{plain}_{number}"
        names[split] = name
    return names


def data_file(split_name: str, number: int, count: int) -> str:
    """Return the path of a data file within the data set."""
    return f"{DATA}/{split_name}-{number:05d}-of-{count:05d}.parquet"


def exported_uri(dataset: str, shard: int) -> str:
    """Return the URI of a shard's record in a data set."""
    return storage.join(dataset, STORE_PART, EXPORTED, f"{shard:05d}.json")


class RowsDigest:
    """Checksum of the rows of a shard, the same whichever library wrote their files."""

    def __init__(self) -> None:
        self._found = hashlib.sha256()

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row of a shard."""
        frames = row["frames"]
        told = [row[name] for name in CLIP_SCHEMA.names if name != "frames"]
        self._found.update(json.dumps([told, [len(frame) for frame in frames]]).encode())
        for frame in frames:
            self._found.update(frame)

    def hexdigest(self) -> str:
        """Return the checksum of the rows so far."""
        return self._found.hexdigest()


def to_dataset_row(row: Mapping[str, Any], sampling: SamplingConfig) -> dict[str, Any]:
    """Return a row of a shard as a row of a data set."""
    images = (
        row["frames"]
        if sampling.codec == "jpeg"
        else [_png_of_raw(frame, sampling.size) for frame in row["frames"]]
    )
    return {**row, "frames": [{"bytes": image, "path": None} for image in images]}


def to_store_row(row: Mapping[str, Any], sampling: SamplingConfig) -> dict[str, Any]:
    """Return a row of a data set as a row of a shard.

    Raises:
        ValueError: A frame is missing or damaged, or a raw one has another size than the store's.
    """
    frames = row["frames"]
    if frames is None or any(frame is None or frame["bytes"] is None for frame in frames):
        raise ValueError(f"clip {row['clip_id']}: a frame has no bytes")
    images = [frame["bytes"] for frame in frames]
    if sampling.codec == "raw":
        images = [_raw_of_png(image, sampling.size) for image in images]
    return {**row, "frames": images}


def _png_of_raw(frame: bytes, size: int) -> bytes:
    pixels = np.frombuffer(frame, dtype=np.uint8).reshape(size, size, 3)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, format="PNG")
    return sink.getvalue()


def _raw_of_png(image: bytes, size: int) -> bytes:
    try:
        with Image.open(io.BytesIO(image)) as opened:
            if opened.size != (size, size):  # known before any pixel is decoded
                width, height = opened.size
                raise ValueError(
                    f"a frame has {width} x {height} pixels instead of {size} x {size}"
                )
            return np.asarray(opened.convert("RGB")).tobytes()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"a frame is not a picture: {error}") from error


def row_groups(
    rows: Iterable[dict[str, Any]], most_bytes: int = MOST_GROUP_BYTES
) -> Iterator[list[dict[str, Any]]]:
    """Divide rows of a data set into row groups of limited size."""
    group: list[dict[str, Any]] = []
    group_bytes = 0
    for row in rows:
        row_bytes = sum(len(frame["bytes"]) for frame in row["frames"])
        if group and (len(group) == ROWS_PER_GROUP or group_bytes + row_bytes > most_bytes):
            yield group
            group, group_bytes = [], 0
        group.append(row)
        group_bytes += row_bytes
    if group:
        yield group


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of a local Parquet file in small pieces."""
    with pq.ParquetFile(path) as parquet:
        for batch in parquet.iter_batches(ROWS_PER_GROUP):
            yield from batch.to_pylist()


def split_of(row: Mapping[str, Any]) -> str:
    """Return the split of a row of a store."""
    return row["split"] or ""
