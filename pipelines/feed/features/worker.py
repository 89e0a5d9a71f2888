"""The worker that stores frame features: a Ray Data actor that encodes the frames of shards.

Legend: N frames, F stored frames of a clip, V views, H and W pixels, L tokens of a frame, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.frame_features import (
    FeatureRecord,
    TokenLayout,
    record_uri,
    shard_uri,
)
from pipelines.artifacts.loaded_model import LoadedModel
from pipelines.artifacts.manifest import clip_hash
from pipelines.common import ray_errors, storage
from pipelines.feed.features.config import FeaturesConfig
from stgt.errors import ClipStoreError, STGTError
from stgt.inputs.transforms import augment_clip

Frames = npt.NDArray[np.uint8]


class _Clips(NamedTuple):
    """Some clips of a shard, one after another."""

    frames: Frames
    """[N, H, W, 3]: the views of each clip, one after another."""
    rows: list[int]
    """Number of these frames that belong to each clip."""
    stored: int
    """Number of stored frames of all of them, without views."""


class FeatureWriter:
    """Writes the features of shards (a Ray Data actor).

    Reads:
        shard: Number of the shard.
    Adds:
        count: Number of its clips. The tokens are written to the shard's file, and its record last.
    """

    def __init__(self, config: FeaturesConfig) -> None:
        self._config = config
        self._loaded = LoadedModel(
            config.checkpoint, config.precision, config.use_gpu, with_encoder=True
        )

    @functools.cached_property
    def _store(self) -> ClipStore:
        return ClipStore(self._config.store)

    def close(self) -> None:
        """End what the worker holds; there is nothing to end."""

    @ray_errors.errors_as_rows
    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Encode the shards of a batch."""
        return {"count": np.array([self._shard(int(shard)) for shard in batch["shard"]])}

    def _shard(self, shard: int) -> int:
        """Write the features of a shard and return the number of its clips."""
        config, uri = self._config, shard_uri(self._config.output, shard)
        shape = self._loaded.model.config.frame_token_shape
        assert shape is not None, "checked by the driver"
        layout = TokenLayout(config.format, *shape)
        clips = stored = 0
        with storage.writing(uri) as path:
            with _writer(path, layout) as out:
                for some in self._read_ahead(shard):
                    for part in self._encoded(some, layout):
                        out.write_batch(part)
                    clips, stored = clips + len(some.rows), stored + some.stored
            size, digest = path.stat().st_size, storage.digest(str(path))
        record = FeatureRecord(
            shard=shard,
            clips=clips,
            frames=stored,
            bytes=size,
            sha256=digest,
            store_sha256=self._store.shard_key(shard),
            encoder=self._loaded.encoder,
            shape=list(shape),
        )
        storage.write_json(record_uri(config.output, shard), record)
        return clips

    def _read_ahead(self, shard: int) -> Iterator[_Clips]:
        """Yield the clips of a shard; a thread reads the next ones while some are encoded."""
        clips = self._read(shard)
        with ThreadPoolExecutor(1, thread_name_prefix="frames_ahead") as thread:
            coming = thread.submit(next, clips, None)
            while (some := coming.result()) is not None:
                coming = thread.submit(next, clips, None)
                yield some

    def _read(self, shard: int) -> Iterator[_Clips]:
        """Yield the frames of a shard's clips, at least `batch_frames` at a time.

        The division depends on the shard alone, so the same shard gives the same bytes.
        """
        table = self._store.read_shard(shard, ["clip_id", "frames"])
        frames: list[Frames] = []
        stored = 0
        for row in range(len(table)):
            clip = table.slice(row, 1).to_pylist()[0]
            try:
                found = self._store.decode(clip["frames"])
            except ValueError as error:
                raise ClipStoreError(
                    f"{self._store.uri}: the stored frames of clip {clip['clip_id']} in shard "
                    f"{shard} are damaged ({error}); check the store with python -m jobs.ingest "
                    "--verify"
                ) from error
            stored += len(found)
            frames.append(self._views_of(clip["clip_id"], found))
            if sum(map(len, frames)) >= self._config.batch_frames or row == len(table) - 1:
                yield _Clips(np.concatenate(frames), [len(one) for one in frames], stored)
                frames, stored = [], 0

    def _views_of(self, clip_id: str, frames: Frames) -> Frames:
        """Return the frames [F, H, W, 3] of a clip, or its views [V * F, H, W, 3]."""
        config = self._config
        if config.views == 0:
            return frames
        keys = ((config.seed, clip_hash(clip_id), view) for view in range(config.views))
        return np.concatenate(
            [augment_clip(frames, config.augment, np.random.default_rng(key)) for key in keys]
        )

    def _encoded(self, clips: _Clips, layout: TokenLayout) -> Iterator[pa.RecordBatch]:
        """Yield the rows of each clip."""
        parts = [
            _packed(self._tokens(some), layout, self._config.checkpoint)
            for some in np.split(
                clips.frames,
                range(self._config.batch_frames, len(clips.frames), self._config.batch_frames),
            )
        ]
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        first = 0
        for count in clips.rows:
            arrays = [
                pa.Array.from_buffers(  # pyright: ignore[reportAttributeAccessIssue]
                    field.type, count, [None, pa.py_buffer(column[first : first + count])]
                )
                for field, column in zip(layout.schema, columns, strict=True)
            ]
            yield pa.RecordBatch.from_arrays(arrays, schema=layout.schema)
            first += count

    def _tokens(self, frames: Frames) -> torch.Tensor:
        """Return the tokens [N, L, D] float of frames, each of which is encoded on its own."""
        with self._loaded.autocast():
            each_a_clip = torch.from_numpy(frames)[:, None].to(self._loaded.device)
            return self._loaded.model.encode_frames(each_a_clip)[:, 0]


def _writer(path: Path, layout: TokenLayout) -> pa.RecordBatchFileWriter:
    return pa.ipc.new_file(str(path), layout.schema)


def _packed(tokens: torch.Tensor, layout: TokenLayout, checkpoint: str) -> list[np.ndarray]:
    """Return tokens [N, L, D] as the bytes [N, width] of each column of the files.

    Raises:
        STGTError: A number is not finite, or is too large for the format.
    """
    expected = (layout.tokens, layout.width)
    assert tokens.shape[1:] == expected, f"{list(tokens.shape[1:])} instead of {expected}"
    tokens = tokens.float()
    columns = []
    if layout.format == "fp8":
        numbers, scales = quantized(tokens)
        columns = [numbers, scales]
        finite = scales
    else:
        numbers = tokens.half() if layout.format == "fp16" else tokens
        columns, finite = [numbers], numbers
    if not bool(finite.isfinite().all()):
        if bool(tokens.isfinite().all()):
            raise STGTError(
                f"checkpoint {checkpoint} yields tokens beyond the range of {layout.format}; use "
                "--format fp32"
            )
        raise STGTError(
            f"checkpoint {checkpoint} yields frame tokens that are not finite; its weights are "
            "damaged or have diverged"
        )
    return [column.contiguous().cpu().flatten(1).view(torch.uint8).numpy() for column in columns]


def quantized(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens [N, L, D] float32 as float8_e4m3fn, and a factor [N, L] float32 per token."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    # A token of zeros has the factor 1.
    magnitude = tokens.abs().amax(dim=-1)
    scales = torch.where(magnitude > 0, magnitude / largest, torch.ones_like(magnitude))
    return (tokens / scales[..., None]).to(torch.float8_e4m3fn), scales
