"""Embeddings of a gallery in Parquet, so that scoring can be repeated without the model.

Layout of the folder:
    config.json               the model, data and settings behind the embeddings
    videos/00000.parquet      part of the videos: embeds [Q, E], visual tokens [M, D]
    texts/00000.parquet       part of the captions: embeds [E]

Legend: V videos, N texts, Q query tokens, E shared embedding, M visual tokens, D vision width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.common import storage

VIDEOS, TEXTS = "videos", "texts"

FloatArray = npt.NDArray[np.float32]


def part_uri(folder: str, kind: str, part: int) -> str:
    """Return the URI of a part."""
    return storage.join(folder, kind, f"{part:05d}.parquet")


def table_of(columns: dict[str, pa.Array], tensors: dict[str, FloatArray]) -> pa.Table:
    """Build a table of plain columns and [rows, ...] float32 tensors, with shapes as metadata."""
    arrays = dict(columns)
    shapes = {}
    for name, tensor in tensors.items():
        width = int(np.prod(tensor.shape[1:]))
        flat = pa.array(np.ascontiguousarray(tensor, np.float32).reshape(-1))
        arrays[name] = pa.FixedSizeListArray.from_arrays(flat, width)
        shapes[f"{name}_shape"] = ",".join(map(str, tensor.shape[1:]))
    return pa.table(arrays).replace_schema_metadata(shapes)


def tensors_of(table: pa.Table, name: str) -> FloatArray:
    """Return a tensor column of a table made by `table_of`, [rows, ...] float32."""
    shape = [int(size) for size in table.schema.metadata[f"{name}_shape".encode()].split(b",")]
    flat = table[name].combine_chunks().flatten()
    return flat.to_numpy(zero_copy_only=False).reshape(-1, *shape)


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of a whole gallery."""

    videos: FloatArray
    """[V, Q, E] of unit length; zeros for a missing video."""
    texts: FloatArray
    """[N, E] of unit length."""
    missing: dict[int, str]
    """Reason for each video that could not be decoded, by video index."""
    rows: npt.NDArray[np.int64]
    """[V, 2] part and row of each video; -1 for a missing video."""


def read_all(folder: str, num_videos: int, num_texts: int, parts: tuple[int, int]) -> Embeddings:
    """Read the embeddings of a gallery, but not its visual tokens.

    Args:
        folder: folder of the embeddings.
        num_videos: V.
        num_texts: N.
        parts: number of video parts and of text parts.
    """
    videos: FloatArray | None = None
    missing: dict[int, str] = {}
    rows = np.full((num_videos, 2), -1, dtype=np.int64)
    for part in range(parts[0]):
        table = storage.read_table(part_uri(folder, VIDEOS, part), ["video", "embeds", "reason"])
        embeds = tensors_of(table, "embeds")
        if videos is None:
            videos = np.zeros((num_videos, *embeds.shape[1:]), dtype=np.float32)
        reasons = table["reason"].to_pylist()
        for row, video in enumerate(table["video"].to_pylist()):
            if reasons[row] is not None:
                missing[video] = reasons[row]
                continue
            videos[video] = embeds[row]
            rows[video] = part, row
    texts = np.concatenate(
        [
            tensors_of(storage.read_table(part_uri(folder, TEXTS, part)), "embeds")
            for part in range(parts[1])
        ]
    )
    assert videos is not None, "a gallery has at least one usable video"
    assert len(texts) == num_texts, (len(texts), num_texts)
    return Embeddings(videos, texts, missing, rows)
