"""Text-video retrieval on a clip store: embedding and matching on Ray Data, metrics in numpy.

Stages: encode clips and captions in parts (kept as Parquet, so a restart goes on with the parts
that are left and scoring needs no model), cosine similarity, candidates both ways, matching of the
union of candidate pairs (scored once for both directions), metrics.

Legend: V videos, N texts, Q query tokens, E shared embedding, M visual tokens, D vision width.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
import torch
from ray.data import ActorPoolStrategy

from pipelines import checkpoints, faults, report, storage, tracking
from pipelines.clips import ClipStore
from pipelines.config import EvaluateConfig, fingerprint, to_dict
from pipelines.progress import Progress
from stgt.errors import ClipStoreError, STGTError
from stgt.frames import normalize_frames
from stgt.metrics import best_ranks, retrieval_metrics
from stgt.precision import autocast, keep_frozen_weights_in
from stgt.retrieval import fuse_scores, similarity_matrix, top_candidates
from stgt.sampling import choose_frames

logger = logging.getLogger(__name__)

METRICS = "metrics.json"
CONFIG = "config.json"
RUN = "mlflow_run.json"
PICTURE = "retrieval.png"
CLIPS_PER_PART = 64
CAPTIONS_PER_PART = 512

FloatArray = npt.NDArray[np.float32]


class EvaluateSummary(TypedDict):
    """What `run_evaluate` found."""

    metrics: dict[str, float]
    clips: int
    captions: int
    picture: str
    run_id: str
    seconds: float


@dataclass(frozen=True)
class Gallery:
    """The clips searched and the captions searched by, in the store's order."""

    clip_ids: list[str]
    captions: list[str]
    video_of_caption: list[int]

    @property
    def captions_of_video(self) -> list[list[int]]:
        """For each video the positions of its captions."""
        groups: list[list[int]] = [[] for _ in self.clip_ids]
        for caption, video in enumerate(self.video_of_caption):
            groups[video].append(caption)
        return groups


def _gallery(store: ClipStore) -> Gallery:
    clip_ids: list[str] = []
    captions: list[str] = []
    owner: list[int] = []
    for shard in range(len(store.shard_sizes)):
        for clip in store.read_shard(shard, ["clip_id", "captions"]).to_pylist():
            captions += clip["captions"]
            owner += [len(clip_ids)] * len(clip["captions"])
            clip_ids.append(clip["clip_id"])
    return Gallery(clip_ids, captions, owner)


def _tensor_column(array: FloatArray) -> pa.Array:
    """Rows of any shape as binary float32; the shape is the same for all rows of a file."""
    return pa.array([row.astype(np.float32).tobytes() for row in array], pa.large_binary())


def _tensors(table: pa.Table, column: str) -> FloatArray:
    shape = [int(n) for n in table.schema.metadata[f"{column}_shape".encode()].split(b",")]
    rows = [np.frombuffer(row, dtype=np.float32) for row in table[column].to_pylist()]
    return np.stack(rows).reshape(-1, *shape)


def _with_shapes(table: pa.Table, **arrays: FloatArray) -> pa.Table:
    shapes = {f"{name}_shape": ",".join(map(str, a.shape[1:])) for name, a in arrays.items()}
    return table.replace_schema_metadata(shapes)


class _Worker:
    """A loaded model on its device."""

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self.device = torch.device("cuda" if config.use_gpu else "cpu")
        if not config.use_gpu:
            torch.set_num_threads(1)
        model, self.tokenizer = checkpoints.load(config.checkpoint)
        keep_frozen_weights_in(config.precision, model)
        self.model = model.to(self.device).eval()

    def autocast(self) -> torch.autocast:
        """The context that the model runs in."""
        return autocast(self.config.precision, self.device)


class Encoder(_Worker):
    """Encodes parts of the gallery (a Ray Data actor).

    Reads:
        kind ("videos" or "texts"), part; videos: shard, start, stop; texts: captions.
    Adds:
        count: items encoded. The embeddings themselves are written to the output folder.
    """

    @faults.contained
    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Encode the parts of a batch."""
        counts = []
        for row in range(len(batch["part"])):
            item = {name: column[row] for name, column in batch.items()}
            encode = self._videos if item["kind"] == "videos" else self._texts
            table = encode(item)
            storage.write_table(
                storage.join(self.config.output, item["kind"], f"{int(item['part']):05d}.parquet"),
                table,
            )
            counts.append(len(table))
        return {"count": np.array(counts)}

    def _videos(self, item: dict[str, Any]) -> pa.Table:
        store = ClipStore(self.config.store)
        clips = store.read_shard(int(item["shard"]), ["clip_id", "frames"])
        clips = clips.slice(int(item["start"]), int(item["stop"] - item["start"])).to_pylist()
        embeds, tokens = [], []
        for start in range(0, len(clips), self.config.batch_clips):
            frames = np.stack(
                [
                    self._frames(clip, store)
                    for clip in clips[start : start + self.config.batch_clips]
                ]
            )
            with self.autocast():
                encoded = self.model.encode_video(
                    normalize_frames(torch.from_numpy(frames).to(self.device))
                )
            embeds.append(encoded.embeds.float().cpu().numpy())
            tokens.append(encoded.tokens.float().cpu().numpy())
        all_embeds, all_tokens = np.concatenate(embeds), np.concatenate(tokens)
        table = pa.table(
            {
                "clip_id": [clip["clip_id"] for clip in clips],
                "embeds": _tensor_column(all_embeds),
                "tokens": _tensor_column(all_tokens),
            }
        )
        _check_finite(all_embeds, [clip["clip_id"] for clip in clips], self.config.checkpoint)
        return _with_shapes(table, embeds=all_embeds, tokens=all_tokens)

    def _frames(self, clip: dict[str, Any], store: ClipStore) -> npt.NDArray[np.uint8]:
        count = self.config.num_frames or self.model.config.num_frames
        chosen = choose_frames(len(clip["frames"]), count, "uniform")
        return store.decode([clip["frames"][i] for i in chosen])

    def _texts(self, item: dict[str, Any]) -> pa.Table:
        captions = list(item["captions"])
        tokens = self.tokenizer(captions, self.model.config.max_text_tokens).to(self.device)
        with self.autocast():
            embeds = self.model.encode_text(tokens).float().cpu().numpy()
        _check_finite(embeds, captions, self.config.checkpoint)
        return _with_shapes(pa.table({"embeds": _tensor_column(embeds)}), embeds=embeds)


def _check_finite(embeds: FloatArray, names: list[str], checkpoint: str) -> None:
    finite = np.asarray(np.isfinite(embeds).reshape(len(embeds), -1).all(axis=1))
    if not finite.all():
        bad = [name for name, ok in zip(names, finite, strict=True) if not ok]
        raise STGTError(
            f"checkpoint {checkpoint} gives embeddings that are not finite for "
            f"{len(bad)} items ({', '.join(bad[:5])}); its weights are damaged or have diverged"
        )


class Matcher(_Worker):
    """Matching probabilities of pairs (a Ray Data actor).

    Reads:
        part, video (row in the part), text (position among all captions), caption: lists.
    Adds:
        probability: list of floats, one a pair.
    """

    @faults.contained
    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Score the pairs of a batch of parts."""
        results = np.empty(len(batch["part"]), dtype=object)
        for row, part in enumerate(batch["part"]):
            uri = storage.join(self.config.output, "videos", f"{int(part):05d}.parquet")
            tokens = torch.from_numpy(_tensors(storage.read_table(uri), "tokens"))
            videos, captions = batch["video"][row], list(batch["caption"][row])
            results[row] = self._probabilities(tokens, np.asarray(videos), captions)
        return {"part": batch["part"], "probability": results}

    def _probabilities(
        self, tokens: torch.Tensor, videos: npt.NDArray[np.int64], captions: list[str]
    ) -> list[float]:
        from stgt.matching import PairScorer  # the driver needs no model: see `checkpoints`

        unique, rows = np.unique(np.array(captions), return_inverse=True)
        text = self.tokenizer(unique.tolist(), self.model.config.max_text_tokens).to(self.device)
        with self.autocast():
            logits = PairScorer(self.model, tokens.to(self.device))(
                torch.from_numpy(np.array(videos, dtype=np.int64)).to(self.device),
                torch.from_numpy(rows.astype(np.int64)).to(self.device),
                text,
                self.config.batch_pairs,
            )
        return logits.softmax(dim=1)[:, 1].cpu().tolist()


def _encode(config: EvaluateConfig, store: ClipStore, gallery: Gallery) -> tuple[int, int]:
    """Encode what is not encoded yet; gives the number of video and of text parts."""
    video_parts = [
        {"shard": shard, "start": start, "stop": min(start + CLIPS_PER_PART, size)}
        for shard, size in enumerate(store.shard_sizes)
        for start in range(0, size, CLIPS_PER_PART)
    ]
    text_parts = [
        gallery.captions[start : start + CAPTIONS_PER_PART]
        for start in range(0, len(gallery.captions), CAPTIONS_PER_PART)
    ]
    items = [
        {"kind": "videos", "part": part, "captions": [""], **item}
        for part, item in enumerate(video_parts)
    ] + [
        {"kind": "texts", "part": part, "captions": texts, "shard": 0, "start": 0, "stop": 0}
        for part, texts in enumerate(text_parts)
    ]
    pending = [item for item in items if not _is_encoded(config, item)]
    if pending:
        total = len(gallery.clip_ids) + len(gallery.captions)
        progress = Progress(f"{config.name}: encode", total, "clips and captions")
        encoded = ray.data.from_items(pending, override_num_blocks=len(pending)).map_batches(
            Encoder,
            fn_constructor_args=(config,),
            batch_size=1,
            compute=ActorPoolStrategy(size=min(config.num_workers, len(pending))),
            num_cpus=1,
            num_gpus=1 if config.use_gpu else 0,
        )
        for row in faults.rows(encoded):
            progress.advance(row["count"])
    return len(video_parts), len(text_parts)


def _is_encoded(config: EvaluateConfig, item: dict[str, Any]) -> bool:
    name = f"{item['part']:05d}.parquet"
    return storage.exists(storage.join(config.output, item["kind"], name))


def _match(
    config: EvaluateConfig,
    gallery: Gallery,
    parts: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    pairs: npt.NDArray[np.int64],
) -> FloatArray:
    """Matching probability of each pair, computed part by part.

    Args:
        config: the evaluation.
        gallery: clips and captions.
        parts: [V] part of each video.
        rows: [V] row of each video in its part.
        pairs: [n, 2] (text, video).

    Returns:
        [N, V] float32, NaN where no pair was asked for.
    """
    probability = np.full((len(gallery.captions), len(gallery.clip_ids)), np.nan, np.float32)
    part_of_pair = parts[pairs[:, 1]]
    groups = [pairs[part_of_pair == part] for part in range(int(parts.max()) + 1)]
    items = [
        {
            "part": part,
            "video": rows[group[:, 1]].tolist(),
            "caption": [gallery.captions[text] for text in group[:, 0]],
        }
        for part, group in enumerate(groups)
        if len(group)
    ]
    progress = Progress(f"{config.name}: match", len(pairs), "pairs")
    matched = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Matcher,
        fn_constructor_args=(config,),
        batch_size=1,
        compute=ActorPoolStrategy(size=min(config.num_workers, len(items))),
        num_cpus=1,
        num_gpus=1 if config.use_gpu else 0,
    )
    for row in faults.rows(matched):
        group = groups[row["part"]]
        probability[group[:, 0], group[:, 1]] = row["probability"]
        progress.advance(len(group))
    return probability


@dataclass(frozen=True)
class Scores:
    """Score matrices [N, V] text-to-video and [V, N] video-to-text, cosine and reranked."""

    similarity: FloatArray
    t2v: FloatArray
    v2t: FloatArray


def _score(config: EvaluateConfig, store: ClipStore, gallery: Gallery) -> Scores:
    video_parts, text_parts = _encode(config, store, gallery)
    tables = [
        storage.read_table(
            storage.join(config.output, "videos", f"{part:05d}.parquet"), ["clip_id", "embeds"]
        )
        for part in range(video_parts)
    ]
    clip_ids = [clip_id for table in tables for clip_id in table["clip_id"].to_pylist()]
    if clip_ids != gallery.clip_ids:
        raise ClipStoreError(
            f"{config.output} holds embeddings of other clips than {config.store}; "
            "choose another output folder, or delete this one"
        )
    videos = np.concatenate([_tensors(table, "embeds") for table in tables])
    texts = np.concatenate(
        [
            _tensors(
                storage.read_table(storage.join(config.output, "texts", f"{p:05d}.parquet")),
                "embeds",
            )
            for p in range(text_parts)
        ]
    )
    similarity = similarity_matrix(videos, texts)
    video_candidates = top_candidates(similarity, config.k_rerank)
    text_candidates = top_candidates(similarity.T, config.k_rerank)
    wanted = np.zeros(similarity.shape, dtype=bool)
    np.put_along_axis(wanted, video_candidates, True, axis=1)
    np.put_along_axis(wanted.T, text_candidates, True, axis=1)
    lengths = [len(table) for table in tables]
    parts = np.repeat(np.arange(len(tables)), lengths)
    rows = np.concatenate([np.arange(length) for length in lengths])
    probability = _match(config, gallery, parts, rows, np.argwhere(wanted))
    return Scores(
        similarity=similarity,
        t2v=_fused(similarity, video_candidates, probability),
        v2t=_fused(similarity.T, text_candidates, probability.T),
    )


def _fused(
    similarity: FloatArray, candidates: npt.NDArray[np.int64], probability: FloatArray
) -> FloatArray:
    return fuse_scores(similarity, candidates, np.take_along_axis(probability, candidates, axis=1))


def compute_metrics(scores: Scores, gallery: Gallery) -> dict[str, float]:
    """All retrieval metrics: `t2v/...` and `v2t/...` reranked, `sim/...` by cosine alone."""
    videos = [[video] for video in gallery.video_of_caption]
    captions = gallery.captions_of_video
    metrics: dict[str, float] = {}
    for prefix, t2v, v2t in (
        ("", scores.t2v, scores.v2t),
        ("sim/", scores.similarity, scores.similarity.T),
    ):
        found = retrieval_metrics(best_ranks(t2v, videos), "t2v")
        found.update(retrieval_metrics(best_ranks(v2t, captions), "v2t"))
        metrics.update({f"{prefix}{name}": value for name, value in found.items()})
    return metrics


def run_evaluate(config: EvaluateConfig, parent_id: str | None = None) -> EvaluateSummary:
    """Evaluate a checkpoint on a clip store, or give the result when it is there already.

    Raises:
        STGTError: the store or the checkpoint cannot be used, or embeddings are not finite.
    """
    started = time.monotonic()
    config = _resolved(config)
    store = ClipStore(config.store)
    checkpoints.require(config.checkpoint)
    with storage.lock(config.output):
        _claim_output(config, store)
        result_uri = storage.join(config.output, METRICS)
        record = storage.join(config.output, RUN)
        if not storage.exists(result_uri):
            run = tracking.Run.open(config.tracking, config.name, record, parent_id)
            succeeded = False
            try:
                run.log_config(to_dict(config))
                gallery = _gallery(store)
                scores = _score(config, store, gallery)
                metrics = compute_metrics(scores, gallery)
                picture = report.draw_retrieval(
                    store,
                    gallery.captions,
                    gallery.video_of_caption,
                    scores.t2v,
                    config.num_pictures,
                )
                storage.write_bytes(storage.join(config.output, PICTURE), picture)
                run.log_metrics(metrics)
                run.log_file(PICTURE, picture)
                storage.write_json(
                    result_uri,
                    {
                        "metrics": metrics,
                        "clips": len(gallery.clip_ids),
                        "captions": len(gallery.captions),
                        "missing": store.num_quarantined,
                    },
                )
                succeeded = True
            finally:
                run.finish(succeeded)
    result = storage.read_json(result_uri)
    return EvaluateSummary(
        metrics=result["metrics"],
        clips=result["clips"],
        captions=result["captions"],
        picture=storage.join(config.output, PICTURE),
        run_id=storage.read_json(record)["run_id"],
        seconds=round(time.monotonic() - started, 1),
    )


def _resolved(config: EvaluateConfig) -> EvaluateConfig:
    values = {
        **{name: getattr(config, name) for name in to_dict(config)},
        "store": storage.resolve(config.store),
        "checkpoint": storage.resolve(config.checkpoint),
        "output": storage.resolve(config.output),
        "tracking": tracking.resolve(config.tracking),
    }
    return EvaluateConfig(**values)


def _claim_output(config: EvaluateConfig, store: ClipStore) -> None:
    """Embeddings of another model or store must not be taken for those of this one."""
    identity = fingerprint(
        [
            config.checkpoint,
            storage.version(storage.join(config.checkpoint, checkpoints.WEIGHTS)),
            config.store,
            config.num_frames,
            config.k_rerank,
            config.precision,
            store.catalogue,
        ]
    )
    uri = storage.join(config.output, CONFIG)
    if storage.exists(uri) and storage.read_json(uri)["identity"] != identity:
        raise STGTError(
            f"{config.output} holds the evaluation of another checkpoint, store or setting; "
            "choose another output folder, or delete this one"
        )
    storage.write_json(uri, {"identity": identity, **to_dict(config)})
