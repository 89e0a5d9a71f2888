"""The workers that compute similarities of clips and captions (Ray Data actors).

Legend: V clips, T frames, N captions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pipelines.artifacts.clip_store import (
    ROWS_PER_GROUP,
    ShardRecord,
    read_columns,
    record_uri,
    shard_uri,
)
from pipelines.artifacts.loaded_model import LoadedModel
from pipelines.common import ray_errors, storage
from pipelines.ingest.scores import read_scores, write_scores
from pipelines.video import frame_codec
from pipelines.video.config import SamplingConfig
from stgt.errors import STGTError
from stgt.inputs.frame_choice import choose_frames

CLIPS_AT_A_TIME = 16
CAPTIONS_AT_A_TIME = 256


class SimilarityScorer:
    """Computes the similarity of each clip of a shard and its best caption.

    Reads:
        shard: Number of the shard.
    Adds:
        count: Number of clips whose similarity was not known yet. The similarities are written
            beside the shard.
    """

    def __init__(
        self, store: str, sampling: SamplingConfig, checkpoint: str, use_gpu: bool
    ) -> None:
        self._store = store
        self._sampling = sampling
        self._checkpoint = checkpoint
        self._loaded = LoadedModel(checkpoint, use_gpu=use_gpu)

    def close(self) -> None:
        """End what the worker holds: nothing."""

    @ray_errors.errors_as_rows
    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Score the shards of a batch."""
        counts = [self._score(int(shard)) for shard in batch["shard"]]
        return {"shard": np.asarray(batch["shard"]), "count": np.array(counts)}

    def _score(self, shard: int) -> int:
        record: ShardRecord = storage.read_json(record_uri(self._store, shard))
        place = shard_uri(self._store, shard, record["revision"])
        known = read_scores(self._store, shard, record["revision"], record["sha256"])
        listed = read_columns(place, ["clip_id", "captions"]).to_pylist()
        missing = [
            number
            for number, row in enumerate(listed)
            if row["captions"] and row["clip_id"] not in known
        ]
        if not missing:
            return 0
        for start in range(0, len(missing), ROWS_PER_GROUP):
            some = missing[start : start + ROWS_PER_GROUP]
            rows = storage.read_rows(place, some, ["clip_id", "captions", "frames"])
            for first in range(0, len(rows), CLIPS_AT_A_TIME):
                known |= self._similarities(rows[first : first + CLIPS_AT_A_TIME])
        scores = {row["clip_id"]: known.get(row["clip_id"]) for row in listed}
        write_scores(self._store, shard, record["revision"], scores, record["sha256"])
        return len(missing)

    def _similarities(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Return the similarity of each of V clips and its best caption, by clip id."""
        model, inputs = self._loaded.model, self._loaded.model.config.inputs
        frames = np.stack([self._frames(row["frames"], inputs.num_frames) for row in rows])
        captions = [text for row in rows for text in row["captions"]]
        owners = np.repeat(np.arange(len(rows)), [len(row["captions"]) for row in rows])
        device = self._loaded.device
        with self._loaded.autocast():
            videos = model.encode_video(torch.from_numpy(frames).to(device))
            parts = []
            for start in range(0, len(captions), CAPTIONS_AT_A_TIME):
                some = captions[start : start + CAPTIONS_AT_A_TIME]
                tokens = self._loaded.tokenizer(some, inputs.max_text_tokens).to(device)
                parts.append(model.encode_text(tokens))
        found = videos.similarity(torch.cat(parts)).cpu().numpy()  # [V, N]
        if not np.isfinite(found).all():
            raise STGTError(
                f"checkpoint {self._checkpoint} yields embeddings that are not finite; its weights "
                "are damaged or have diverged"
            )
        return {
            row["clip_id"]: float(found[number, owners == number].max())
            for number, row in enumerate(rows)
        }

    def _frames(self, coded: list[bytes], count: int) -> np.ndarray:
        """Return evenly spaced frames [T, H, W, 3] uint8 of those that are stored."""
        chosen = choose_frames(len(coded), count, "uniform")
        sampling = self._sampling
        return frame_codec.decode_frames([coded[i] for i in chosen], sampling.codec, sampling.size)
