"""The workers of an evaluation: Ray Data actors that encode parts of a gallery and match pairs.

Legend: Q query tokens, E shared embedding, M visual tokens, D vision width.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipelines.artifacts import embeddings
from pipelines.artifacts.frame_features import FrameFeatures
from pipelines.artifacts.loaded_model import LoadedModel
from pipelines.common import ray_errors, storage
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.published_evaluators import keeps_captions_as_written
from pipelines.feed.config import DEFAULT_CACHE_BYTES
from pipelines.feed.opening import open_source
from pipelines.feed.sources import FRAME_INDICES, ClipSource
from pipelines.feed.stored_tokens import TokenReader, open_reader, place_of
from stgt.errors import STGTError, VideoDecodeError
from stgt.inputs.frame_choice import choose_frames
from stgt.inputs.tokenizer import TextTokens, Tokenizer
from stgt.retrieval.scoring_rules import RULES

if TYPE_CHECKING:
    pass

FloatArray = npt.NDArray[np.float32]
Item = dict[str, Any]

CLIPS_NAMED = 5


class _Worker(LoadedModel):
    """Holds the model of an evaluation, which is loaded with the first batch."""

    def __init__(self, config: EvaluateConfig) -> None:
        super().__init__(
            config.checkpoint_uri,
            config.precision,
            config.use_gpu,
            with_encoder=config.features.store is not None,
        )
        self.config = config

    @property
    def max_text_tokens(self) -> int:
        """Maximum tokens per caption. The driver has resolved None to a number."""
        assert self.config.max_text_tokens is not None
        return self.config.max_text_tokens

    def tokens_of(self, captions: list[str]) -> TextTokens:
        """Tokenize captions on the model's device, as the scoring rule's evaluator does."""
        tokenize = self.tokenizer
        if keeps_captions_as_written(self.config.scoring) and isinstance(tokenize, Tokenizer):
            tokenize = tokenize.as_written
        return tokenize(captions, self.max_text_tokens).to(self.device)

    def close(self) -> None:
        """End what the worker holds; actors end with their process."""

    def rows_of(self, batch: dict[str, np.ndarray]) -> list[Item]:
        """Return the rows of a batch."""
        count = len(batch["part"])
        return [{name: column[row] for name, column in batch.items()} for row in range(count)]


class Encoder(_Worker):
    """Encodes parts of the gallery (a Ray Data actor).

    Reads:
        kind ("videos" or "texts"), part; for videos: shard, rows, videos; for texts: captions.
    Adds:
        count: Number of items encoded. The embeddings themselves are written to their folder.
    """

    def __init__(self, config: EvaluateConfig, folder: str) -> None:
        super().__init__(config)
        self._folder = folder

    @functools.cached_property
    def _source(self) -> ClipSource:
        size = self.model.config.inputs.image_size
        return open_source(
            self.config.data_uri,
            size,
            self.config.resize,
            frame_rules=self.config.frame_rules,
            with_frames=self.config.features.store is None,
        )

    @functools.cached_property
    def _stored(self) -> TokenReader | None:
        """Stored tokens, which take the place of frames; None without them."""
        if (folder := self.config.features.store) is None:
            return None
        FrameFeatures(folder).check_encoder(self.encoder, self.config.checkpoint_uri)
        return open_reader((folder,), None, DEFAULT_CACHE_BYTES, self.config.use_gpu)

    def close(self) -> None:
        """End the decoder, if there is one."""
        if "_source" in self.__dict__:
            self._source.close()
        if (stored := self.__dict__.get("_stored")) is not None:
            stored.close()

    @ray_errors.errors_as_rows
    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Encode the parts of a batch."""
        items = self.rows_of(batch)
        for item in items:
            encode = self._videos if item["kind"] == embeddings.VIDEOS else self._texts
            uri = embeddings.part_uri(self._folder, item["kind"], int(item["part"]))
            storage.write_table(uri, encode(item))
        sizes = [len(i["videos"] if i["kind"] == "videos" else i["captions"]) for i in items]
        return {"count": np.array(sizes)}

    def _videos(self, item: Item) -> pa.Table:
        count = self.config.num_frames or self.model.config.inputs.num_frames
        clip_ids: list[str] = []
        reasons: list[str | None] = []
        frames: list[npt.NDArray[Any]] = []
        embeds: list[FloatArray] = []
        tokens: list[FloatArray] = []
        for row in item["rows"]:
            clip = self._source.clip(int(item["shard"]), int(row))
            clip_ids.append(clip["clip_id"])
            try:
                if self._stored is None:
                    even = self._source.frames(clip, count, "uniform", np.random.default_rng(0))
                else:
                    chosen = choose_frames(len(clip[FRAME_INDICES]), count, "uniform")
                    even = place_of(0, int(item["shard"]), int(row), 0, chosen)
                frames.append(even)
                reasons.append(None)
            except VideoDecodeError as error:
                reasons.append(f"{error.reason}: {error.message}")
            if len(frames) == self.config.batch_clips:
                self._encode(frames, embeds, tokens)
        self._encode(frames, embeds, tokens)
        there = np.array([reason is None for reason in reasons])
        size = (len(there), *self.model.embedding_shape)
        all_embeds = np.zeros(size, dtype=np.float32)
        # If no clip of the part could be decoded, its tokens are never read.
        shape = tokens[0].shape[1:] if tokens else (1, 1)
        all_tokens = np.zeros((len(there), *shape), dtype=np.float32)
        if embeds:
            all_embeds[there] = np.concatenate(embeds)
            all_tokens[there] = np.concatenate(tokens)
        _check_finite(all_embeds, clip_ids, self.config.checkpoint_uri, "clips")
        _check_finite(all_tokens, clip_ids, self.config.checkpoint_uri, "clips")
        return embeddings.table_of(
            {
                "video": pa.array(np.asarray(item["videos"], dtype=np.int64)),
                "clip_id": pa.array(clip_ids),
                "reason": pa.array(reasons, pa.string()),
            },
            {"embeds": all_embeds, "tokens": all_tokens},
        )

    def _encode(
        self,
        frames: list[npt.NDArray[Any]],
        embeds: list[FloatArray],
        tokens: list[FloatArray],
    ) -> None:
        """Encode the collected clips, or places of stored tokens, and clear their list."""
        if not frames:
            return
        stacked = np.stack(frames)
        with self.autocast():
            encoded = self.model.encode_video(
                torch.from_numpy(stacked).to(self.device)
                if self._stored is None
                else self._stored.read(stacked).to(self.device)
            )
        embeds.append(encoded.embeds.float().cpu().numpy())
        # Only matching reads the tokens, which are much larger than the embeddings.
        kept = encoded.tokens if self.model.matches else encoded.tokens[:, :1, :1]
        tokens.append(kept.float().cpu().numpy())
        frames.clear()

    def _texts(self, item: Item) -> pa.Table:
        captions = list(item["captions"])
        tokens = self.tokens_of(captions)
        with self.autocast():
            embeds = self.model.encode_text(tokens).float().cpu().numpy()
        _check_finite(embeds, captions, self.config.checkpoint_uri, "captions")
        return embeddings.table_of({}, {"embeds": embeds})


def _check_finite(embeds: FloatArray, names: list[str], checkpoint: str, what: str) -> None:
    finite = np.asarray(np.isfinite(embeds).reshape(len(embeds), -1).all(axis=1))
    if not finite.all():
        bad = [name for name, ok in zip(names, finite, strict=True) if not ok]
        raise STGTError(
            f"checkpoint {checkpoint} yields embeddings that are not finite for {len(bad)} {what} "
            f"({', '.join(bad[:CLIPS_NAMED])}); its weights are damaged or have diverged"
        )


class Matcher(_Worker):
    """Computes what matching adds to the scores of pairs (a Ray Data actor).

    Reads:
        part, caption (texts of the part's pairs, each once), and lists with one entry per pair:
        row (of the video in the part), text (position among all captions), place (position of the
        text in caption).
    Adds:
        count: Number of pairs matched. Their values are written to the folder of pairs.
    """

    def __init__(self, config: EvaluateConfig, folder: str, pairs: str) -> None:
        super().__init__(config)
        self._folder = folder
        self._pairs = pairs
        self._rule = RULES[config.scoring]

    @ray_errors.errors_as_rows
    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Score the pairs of a batch of parts."""
        items = self.rows_of(batch)
        for item in items:
            part = int(item["part"])
            table = storage.read_table(
                embeddings.part_uri(self._folder, embeddings.VIDEOS, part), ["tokens"]
            )
            tokens = torch.from_numpy(embeddings.tensors_of(table, "tokens").copy())
            found = self._values(tokens, item)
            _check_probabilities(found, self.config.checkpoint_uri)
            storage.write_table(
                storage.join(self._pairs, f"{part:05d}.parquet"),
                pa.table({"text": item["text"], "row": item["row"], self._rule.value: found}),
            )
        return {"count": np.array([len(item["row"]) for item in items])}

    def _values(self, tokens: torch.Tensor, item: Item) -> FloatArray:
        text = self.tokens_of(list(item["caption"]))
        rows, places = (
            torch.from_numpy(np.array(item[name], dtype=np.int64)).to(self.device)
            for name in ("row", "place")
        )
        with self.autocast():
            scorer = self.model.pair_scorer(tokens.to(self.device))
            logits = scorer(rows, places, text, self.config.batch_pairs)
        return self._rule.values_of(logits)


def _check_probabilities(found: FloatArray, checkpoint: str) -> None:
    if not np.isfinite(found).all():
        raise STGTError(
            f"checkpoint {checkpoint} yields match probabilities that are not finite; its "
            "weights are damaged or have diverged"
        )
