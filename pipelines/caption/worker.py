"""The worker of a captioning: a Ray Data actor that writes captions for the clips of a part.

Legend: V clips, T frames, H and W pixels.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.artifacts.loaded_model import LoadedModel
from pipelines.artifacts.manifest import clip_hash
from pipelines.caption.config import CaptionConfig
from pipelines.caption.parts import EMPTY_CAPTION, SCHEMA, is_bad, part_uri, read_part
from pipelines.common import ray_errors, storage
from pipelines.feed.opening import open_source
from pipelines.feed.sources import ClipSource
from stgt.errors import STGTError, VideoDecodeError
from stgt.inputs.caption_text import clean_caption

SEED_BITS = 63


class Captioner:
    """Writes captions for the clips of a part, into the part's file.

    Reads:
        part, shard, rows (of the clips in the shard, ascending).
    Adds:
        count: Number of clips that were captioned. Those that an earlier run captioned are kept.
    """

    def __init__(self, config: CaptionConfig, folder: str) -> None:
        self._config = config
        self._folder = folder
        self._loaded = LoadedModel(config.checkpoint, config.precision, config.use_gpu)

    @functools.cached_property
    def _source(self) -> ClipSource:
        config, size = self._config, self._loaded.model.config.inputs.image_size
        return open_source(config.store or config.manifest, size, config.resize)

    def close(self) -> None:
        """End the decoder, if there is one."""
        if "_source" in self.__dict__:
            self._source.close()

    @ray_errors.errors_as_rows
    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Caption the parts of a batch."""
        counts = []
        for part, shard, rows in zip(batch["part"], batch["shard"], batch["rows"], strict=True):
            table, count = self._part(int(part), int(shard), [int(row) for row in rows])
            storage.write_table(part_uri(self._folder, int(part)), table)
            counts.append(count)
        return {"count": np.array(counts)}

    def _part(self, part: int, shard: int, rows: list[int]) -> tuple[pa.Table, int]:
        """Return the captions of a part, and how many of its clips had to be captioned."""
        # Only clips whose videos could not be decoded are captioned again.
        known = read_part(self._folder, part) if self._config.store is None else []
        found: list[dict[str, Any] | None] = [
            None if is_bad(one["reason"]) else one for one in known
        ] or [None] * len(rows)
        missing = [place for place, one in enumerate(found) if one is None]
        for start in range(0, len(missing), self._config.batch_clips):
            places = missing[start : start + self._config.batch_clips]
            captioned = self._captioned(shard, [rows[place] for place in places])
            for place, one in zip(places, captioned, strict=True):
                found[place] = one
        return pa.Table.from_pylist(found, schema=SCHEMA), len(missing)

    def _captioned(self, shard: int, rows: list[int]) -> list[dict[str, Any]]:
        """Return a row for each of a few clips, which are encoded together."""
        count = self._config.num_frames or self._loaded.model.config.inputs.num_frames
        clip_ids: list[str] = []
        reasons: dict[str, str] = {}
        frames: dict[str, np.ndarray] = {}
        for clip in self._source.clips(shard, rows):
            clip_id = clip["clip_id"]
            clip_ids.append(clip_id)
            try:
                # Clips of one's own have no captions, which decoding asks for otherwise.
                clip = {**clip, "captions": ["to be written"]}
                frames[clip_id] = self._source.frames(
                    clip, count, "uniform", np.random.default_rng(0)
                )
            except VideoDecodeError as error:
                reasons[clip_id] = error.reason
        written = self._written(list(frames), np.stack(list(frames.values()))) if frames else {}
        for clip_id, captions in written.items():
            if not captions:
                reasons[clip_id] = EMPTY_CAPTION
        return [
            {
                "clip_hash": clip_hash(clip_id),
                "clip_id": clip_id,
                "captions": written.get(clip_id, []),
                "reason": reasons.get(clip_id),
            }
            for clip_id in clip_ids
        ]

    def _written(self, clip_ids: list[str], frames: np.ndarray) -> dict[str, list[str]]:
        """Return the different captions of clips with frames [V, T, H, W, 3] uint8, by id."""
        config, model = self._config, self._loaded.model
        caption: Any = model.caption  # type: ignore[attr-defined]
        with self._loaded.autocast():
            tokens = model.video_tokens(torch.from_numpy(frames).to(self._loaded.device))
            if not bool(tokens.isfinite().all()):
                raise STGTError(
                    f"checkpoint {config.checkpoint} yields visual tokens that are not finite; its "
                    "weights are damaged or have diverged"
                )
            texts = caption(
                tokens,
                num_beams=config.num_beams,
                max_tokens=config.max_tokens,
                min_tokens=config.min_tokens,
                top_p=config.top_p if config.method == "nucleus" else None,
                temperature=config.temperature,
                num_captions=config.captions_per_clip,
                seeds=[_seed(config.seed, clip_id) for clip_id in clip_ids],
            )
        each = config.captions_per_clip
        found = {}
        for number, clip_id in enumerate(clip_ids):
            some = texts[number * each : (number + 1) * each]
            found[clip_id] = list(dict.fromkeys(text for text in some if clean_caption(text)))
        return found


def _seed(seed: int, clip_id: str) -> int:
    """Return the seed of a clip's samples, which does not depend on other clips."""
    words = np.random.SeedSequence((seed, clip_hash(clip_id))).generate_state(1, np.uint64)
    return int(words[0]) % 2**SEED_BITS
