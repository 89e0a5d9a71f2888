"""Reads stored frame tokens from files that are mapped into memory.

Only the places of frames travel from data workers to training workers. Those map the files, from a
local folder where they lie and from S3 out of the node's shard cache, and copy the tokens of the
frames that a step uses once, into the batch.

Legend: B clips, T frames, L tokens of a frame, D token width.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.artifacts.frame_features import (
    SCALES,
    TOKENS,
    FeatureFormat,
    FrameFeatures,
    TokenLayout,
    shard_uri,
)
from pipelines.common import storage
from pipelines.feed.shard_cache import ShardCache
from stgt.errors import STGTError

if TYPE_CHECKING:
    import torch

    from stgt.interface.model import FrameTokens

MAPPED_FILES = 8
"""Files that stay mapped: a batch lies in one or two shards of each data set, and with
`similar_captions` in the three or four shards of a window."""
PLACE_COLUMNS = ("data set", "shard", "row", "view")
"""What comes before the numbers of the frames in a place."""
Places = npt.NDArray[np.int64]
"""[B, 4 + T]: data set, shard, row, view, and the numbers of the frames among the stored ones."""
Bytes = npt.NDArray[np.uint8]


def place_of(
    source: int, shard: int, row: int, view: int, frames: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return where the tokens of a clip's frames are: [4 + T] int64, see `Places`."""
    return np.concatenate([np.array([source, shard, row, view], dtype=np.int64), frames])


@dataclass(frozen=True)
class StoredTokens:
    """The stored tokens of B clips, in host memory."""

    format: FeatureFormat
    tokens: torch.Tensor
    """[B, T, L, D] float16, float32, or float8_e4m3fn."""
    scales: torch.Tensor | None
    """[B, T, L] float32, factors of the tokens in fp8; None otherwise."""

    def to(self, device: torch.device) -> FrameTokens:
        """Return the tokens [B, T, L, D] float32 on a device. The conversion takes place there."""
        from stgt.interface.model import FrameTokens

        tokens = self.tokens.to(device, non_blocking=True).float()
        if self.scales is not None:
            tokens *= self.scales.to(device, non_blocking=True)[..., None]
        return FrameTokens(tokens)


class TokenReader:
    """Reads the stored tokens of the clips of one or several data sets."""

    def __init__(
        self, features: Sequence[FrameFeatures], cache: ShardCache, pinned: bool = False
    ) -> None:
        """Set up reading; files are opened when they are needed.

        Args:
            features: The features of each data set, all of one layout.
            cache: Cache of this node for files of remote folders.
            pinned: Whether batches are in pinned memory, which is copied to a GPU faster.
        """
        self._features = features
        self._cache = cache
        self._pinned = pinned
        self._files: OrderedDict[tuple[int, int], pa.RecordBatchFileReader] = OrderedDict()
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="features_ahead")
        self._prepared: set[tuple[int, int]] = set()

    @property
    def layout(self) -> TokenLayout:
        """How the tokens are stored."""
        return self._features[0].layout

    def read(self, places: Places) -> StoredTokens:
        """Read the tokens of B clips.

        Raises:
            STGTError: A file is missing or damaged.
        """
        import torch

        layout = self.layout
        batch = (len(places), places.shape[1] - len(PLACE_COLUMNS))
        tokens = self._empty(*batch, layout.token_bytes)
        scales = None
        if layout.format == "fp8":
            scales = self._empty(*batch, layout.frame_bytes - layout.token_bytes)
        for number, place in enumerate(places):
            source, shard, row, view = place[: len(PLACE_COLUMNS)].tolist()
            frames = place[len(PLACE_COLUMNS) :]
            clip = self._clip(source, shard, row)
            stored = len(clip) // max(1, self._features[source].views)
            rows = view * stored + frames
            if rows.max() >= len(clip):
                raise self._damaged(source, shard, f"clip {row} has only {len(clip)} frames")
            # With its default mode, NumPy would copy the numbers twice.
            np.take(_bytes_of(clip, TOKENS), rows, 0, tokens[number].numpy(), "clip")
            if scales is not None:
                np.take(_bytes_of(clip, SCALES), rows, 0, scales[number].numpy(), "clip")
        dtype = {"fp16": torch.float16, "fp8": torch.float8_e4m3fn, "fp32": torch.float32}
        return StoredTokens(
            layout.format,
            tokens.view(dtype[layout.format]).unflatten(-1, (layout.tokens, layout.width)),
            None if scales is None else scales.view(torch.float32),
        )

    def _empty(self, *shape: int) -> torch.Tensor:
        import torch

        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)

    def _clip(self, source: int, shard: int, row: int) -> pa.RecordBatch:
        """Return the rows of a clip, which are not read yet."""
        file = self._file(source, shard)
        try:
            return file.get_batch(row)
        except (pa.ArrowInvalid, IndexError, OSError, ValueError) as error:
            raise self._damaged(source, shard, str(error)) from error

    def _file(self, source: int, shard: int) -> pa.RecordBatchFileReader:
        key = (source, shard)
        if key not in self._files:
            self._files[key] = self._opened(source, shard)
            while len(self._files) > MAPPED_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(key)
        return self._files[key]

    def _opened(self, source: int, shard: int) -> pa.RecordBatchFileReader:
        features = self._features[source]
        self._prepared.discard((source, shard))
        uri, record = shard_uri(features.uri, shard), features.records[shard]
        try:
            if storage.is_local(uri):
                file = pa.memory_map(uri)
            else:
                fetch = functools.partial(_fetch, uri, record["bytes"])
                file = self._cache.file(record["sha256"], fetch, record["bytes"])
            found = pa.ipc.open_file(file)
        except FileNotFoundError as error:
            raise self._damaged(source, shard, "it is missing") from error
        except pa.ArrowInvalid as error:
            raise self._damaged(source, shard, str(error)) from error
        if file.size() != record["bytes"] or found.num_record_batches != record["clips"]:
            raise self._damaged(
                source, shard, f"it has {file.size()} bytes instead of {record['bytes']}"
            )
        return found

    def _damaged(self, source: int, shard: int, how: str) -> STGTError:
        uri = shard_uri(self._features[source].uri, shard)
        return STGTError(
            f"{uri} cannot be used: {how}; delete it and run the same python -m jobs.features "
            "again, which writes only this file"
        )

    def prepare(self, source: int, shards: Sequence[int], most_bytes: float) -> None:
        """Start fetching files of a remote folder that are needed soon, in a thread.

        If that fails, a file is fetched again when it is needed, which raises the error.

        Args:
            source: Number of the data set.
            shards: Shards in the order in which they are needed.
            most_bytes: Maximum size of the files to fetch; later ones are left out.
        """
        features = self._features[source]
        if storage.is_local(features.uri):
            return
        for shard in shards:
            record = features.records[shard]
            most_bytes -= record["bytes"]
            if most_bytes < 0:
                return
            if (source, shard) not in self._prepared:
                self._prepared.add((source, shard))
                uri = shard_uri(features.uri, shard)
                fetch = functools.partial(_fetch, uri, record["bytes"])
                self._ahead.submit(
                    self._cache.prepare_file, record["sha256"], fetch, record["bytes"]
                )

    def close(self) -> None:
        """Unmap the files and cancel fetching."""
        self._ahead.shutdown(wait=False, cancel_futures=True)
        self._files.clear()


def _fetch(uri: str, size_bytes: int, path: Path) -> None:
    """Fetch a file into the cache, unless it has another size than recorded."""
    storage.fetch_file(uri, path)
    found = path.stat().st_size
    if found != size_bytes:
        raise STGTError(
            f"{uri} cannot be used: it has {found} bytes instead of {size_bytes}; delete it and "
            "run the same python -m jobs.features again, which writes only this file"
        )


def _bytes_of(clip: pa.RecordBatch, column: str) -> Bytes:
    """Return the bytes [rows, N] of a column, in the mapped file."""
    array = clip.column(column)
    width = array.type.byte_width
    data = np.frombuffer(array.buffers()[1], dtype=np.uint8)
    return data[array.offset * width :][: len(array) * width].reshape(len(array), width)


def open_reader(
    folders: Sequence[str], cache_dir: str | Path | None, cache_bytes: int, pinned: bool = False
) -> TokenReader:
    """Open the stored tokens of each data set; see `TokenReader`.

    Raises:
        STGTError: A folder is not finished, or the folders store tokens differently.
    """
    features = [FrameFeatures(folder) for folder in folders]
    check_same_layout(features)
    return TokenReader(features, ShardCache(cache_dir, cache_bytes), pinned)


def check_same_layout(features: Sequence[FrameFeatures]) -> None:
    """Check that the features of several data sets can be in one batch.

    Raises:
        STGTError: They are of different encoders, or stored differently.
    """
    first = features[0]
    for other in features[1:]:
        if (other.layout, other.encoder) != (first.layout, first.encoder):
            raise STGTError(
                f"{first.uri} has the format {first.layout.format} and the encoder "
                f"{first.encoder}, but {other.uri} has {other.layout.format} and {other.encoder}; "
                "write the features of all data sets with the same encoder and --format"
            )
