"""Text-video retrieval by the protocol of a benchmark: Ray Data encodes and matches, numpy scores.

Stages: encode clips and captions in parts (kept as Parquet, so a restart goes on with the parts
that are left, and scoring needs no model), cosine similarity in chunks, candidates both ways,
matching of the union of candidate pairs (scored once for both directions), metrics with intervals,
a report.

Legend: V videos, N texts, K candidates.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy

from pipelines import (
    checkpoints,
    embeddings,
    evaluation_report,
    faults,
    published,
    report,
    storage,
    tracking,
)
from pipelines.benchmarks import BENCHMARKS, Benchmark
from pipelines.clips import ClipStore
from pipelines.config import EvaluateConfig, fingerprint, to_dict
from pipelines.embeddings import TEXTS, VIDEOS, Embeddings
from pipelines.gallery import Gallery, open_gallery, reasons_of
from pipelines.progress import Progress
from pipelines.scores import Scores, ToldChunks, all_metrics, rank_table, score_gallery
from pipelines.sources import check_frames, digest_of, is_manifest
from stgt.captions import MAX_WORDS
from stgt.errors import ClipStoreError, STGTError
from stgt.retrieval import Similarity

if TYPE_CHECKING:
    from pipelines.evaluate_worker import _Worker

logger = logging.getLogger(__name__)

METRICS = "metrics.json"
RANKS = "ranks.parquet"
PAIRS = "pairs"
REPORT = "report.html"
CONFIG = "config.json"
RUN = "mlflow_run.json"
PICTURE = "retrieval.png"
CAPTIONS_PER_PART = 512
MATRIX_BYTES = 1024**3
"""Similarities are kept when they fit into this, and else computed a second time."""
PASSES, DUAL_SOFTMAX_PASSES = 2, 5
"""How often similarities are gone through."""
MISSING_SHOWN = 20


class EvaluateSummary(TypedDict):
    """What `run_evaluate` found."""

    benchmark: str
    protocol: dict[str, str]
    metrics: dict[str, float]
    clips: int
    captions: int
    missing: list[str]
    """The first clips that could not be used; `metrics.json` lists all, with reasons."""
    report: str
    picture: str
    run_id: str
    seconds: float


@dataclass(frozen=True)
class _Evaluation:
    """What is evaluated, and where its parts lie."""

    config: EvaluateConfig
    benchmark: Benchmark
    gallery: Gallery
    model: dict[str, Any]
    """The model's sizes."""

    @property
    def embeddings(self) -> str:
        return self.config.embeddings or storage.join(self.config.output, "embeddings")

    @property
    def pairs(self) -> str:
        return storage.join(self.config.output, PAIRS)

    @property
    def num_frames(self) -> int:
        return self.config.num_frames or int(self.model["num_frames"])


def run_evaluate(config: EvaluateConfig, parent_id: str | None = None) -> EvaluateSummary:
    """Evaluate a checkpoint, or give the result when it is there already.

    Raises:
        STGTError: the clips or the checkpoint cannot be used, or embeddings are not finite.
        ValueError: the split is not the benchmark's.
    """
    started = time.monotonic()
    config = _resolved(config)
    benchmark = BENCHMARKS[config.benchmark]
    if config.against == "published":
        published.check(config)
    checkpoints.require(config.checkpoint)
    checkpoints.check_vocabulary(config.checkpoint)
    model = storage.read_json(storage.join(config.checkpoint, "config.json"))["model"]
    config = replace(config, max_text_tokens=_text_tokens(config, benchmark, model))
    gallery = open_gallery(config, benchmark)
    evaluation = _Evaluation(config, benchmark, gallery, model)
    _check_frames(evaluation)
    with storage.lock(config.output):
        _claim(evaluation)
        result_uri = storage.join(config.output, METRICS)
        record = storage.join(config.output, RUN)
        if not storage.exists(result_uri):
            run = tracking.Run.open(config.tracking, config.label, record, parent_id)
            succeeded = False
            try:
                run.log_config(to_dict(config))
                _evaluate(evaluation, run)
                succeeded = True
            finally:
                run.finish(succeeded)
    result = storage.read_json(result_uri)
    return EvaluateSummary(
        benchmark=config.benchmark,
        protocol=result["protocol"],
        metrics=result["metrics"],
        clips=result["clips"],
        captions=result["captions"],
        missing=[one["clip_id"] for one in result["missing"][:MISSING_SHOWN]],
        report=storage.join(config.output, REPORT),
        picture=storage.join(config.output, PICTURE),
        run_id=storage.read_json(record)["run_id"],
        seconds=round(time.monotonic() - started, 1),
    )


def _resolved(config: EvaluateConfig) -> EvaluateConfig:
    def there(uri: str | None) -> str | None:
        return None if uri is None else storage.resolve(uri)

    return replace(
        config,
        data=storage.resolve(config.data),
        manifest=there(config.manifest),
        checkpoint=storage.resolve(config.checkpoint),
        output=storage.resolve(config.output),
        embeddings=there(config.embeddings),
        tracking=tracking.resolve(config.tracking),
    )


def _text_tokens(config: EvaluateConfig, benchmark: Benchmark, model: dict[str, Any]) -> int:
    """Tokens of a caption: those asked for, the benchmark's, or the model's."""
    asked = config.max_text_tokens or benchmark.max_text_tokens or int(model["max_text_tokens"])
    most = int(model["qformer"]["max_position"])
    if asked > most:
        if config.max_text_tokens is not None:
            raise ValueError(f"max_text_tokens = {asked}: the model takes at most {most}")
        logger.warning("captions are cut at the model's %d tokens, not at %d", most, asked)
    return min(asked, most)


def _check_frames(evaluation: _Evaluation) -> None:
    """Check that the store holds the frames that the model is evaluated on."""
    config = evaluation.config
    if config.manifest is not None and is_manifest(config.data):
        raise ValueError(
            "manifest is for a clip store that holds more than the split; with a manifest as data "
            "leave it out"
        )
    if not is_manifest(config.data):
        size = evaluation.model["vision"]["image_size"]
        check_frames(ClipStore(config.data), size, evaluation.num_frames, config.resize)


def _claim(evaluation: _Evaluation) -> None:
    """Results and embeddings of another model or gallery must not be taken for those of this one.

    Raises:
        STGTError: a folder holds those of another one.
    """
    config, gallery = evaluation.config, evaluation.gallery
    encoded = fingerprint(
        [
            config.checkpoint,
            storage.version(storage.join(config.checkpoint, checkpoints.WEIGHTS)),
            config.data,
            digest_of(config.data),
            gallery.clip_ids,
            gallery.captions,
            evaluation.num_frames,
            config.resize,
            config.max_text_tokens,
            config.precision,
        ]
    )
    scored = fingerprint(
        [
            encoded,
            config.benchmark,
            config.k_rerank,
            config.allow_missing,
            config.dual_softmax,
            config.resamples,
        ]
    )
    for folder, what, identity in (
        (config.output, "the evaluation", scored),
        (evaluation.embeddings, "embeddings", encoded),
    ):
        uri = storage.join(folder, CONFIG)
        # A start that came to nothing binds nobody.
        made = [storage.list_names(storage.join(folder, name)) for name in (VIDEOS, TEXTS, PAIRS)]
        begun = any(made) or storage.exists(storage.join(folder, METRICS))
        found = storage.read_json(uri) if storage.exists(uri) else None
        if found is not None and "identity" not in found:
            raise STGTError(
                f"{folder} holds something else, with a {CONFIG} of its own; choose another folder"
            )
        if begun and found is not None and found["identity"] != identity:
            raise STGTError(
                f"{folder} holds {what} of another checkpoint, gallery or setting; choose another "
                "folder, or delete this one"
            )
        storage.write_json(uri, {"identity": identity, **to_dict(config)})


def _evaluate(evaluation: _Evaluation, run: tracking.Run) -> None:
    config, gallery = evaluation.config, evaluation.gallery
    _require_a_video(gallery, gallery.missing)
    encoded = _encode(evaluation)
    missing = {**gallery.missing, **encoded.missing}
    _require_a_video(gallery, missing)
    if missing:
        treated = "left out" if config.allow_missing else "counted as misses"
        logger.warning(
            "%d of %d videos cannot be used and are %s: %s",
            len(missing),
            gallery.num_videos,
            treated,
            reasons_of(missing),
        )
    scored = gallery
    if config.allow_missing:
        scored = gallery.without(missing)
        kept = [video for video in range(gallery.num_videos) if video not in missing]
        captions = np.flatnonzero(~np.isin(gallery.video_of_caption, list(missing)))
        encoded = replace(
            encoded,
            videos=encoded.videos[kept],
            rows=encoded.rows[kept],
            texts=encoded.texts[captions],
        )
    present = np.array([row[0] >= 0 for row in encoded.rows])
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # the only work there is meanwhile
    try:
        videos = encoded.videos if present.all() else encoded.videos[present]
        similarity = Similarity(videos, encoded.texts, most_bytes=MATRIX_BYTES)
        passes = PASSES + (DUAL_SOFTMAX_PASSES if config.dual_softmax else 0)
        progress = Progress(f"{config.label}: score", passes * len(encoded.texts), "captions")

        def match(pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
            return _match(evaluation, scored, encoded.rows, pairs)

        scores = score_gallery(
            ToldChunks(similarity, progress),
            scored.video_of_caption,
            present,
            config.k_rerank,
            match,
            config.dual_softmax,
        )
    finally:
        torch.set_num_threads(threads)
    _write_result(evaluation, scored, scores, missing, run)


def _require_a_video(gallery: Gallery, missing: dict[int, str]) -> None:
    if len(missing) == gallery.num_videos:
        raise ClipStoreError(
            f"none of the {gallery.num_videos:,} videos can be used ({reasons_of(missing)}); mend "
            "the videos, or look at the paths in the manifest"
        )


def _write_result(
    evaluation: _Evaluation,
    scored: Gallery,
    scores: Scores,
    missing: dict[int, str],
    run: tracking.Run,
) -> None:
    config = evaluation.config
    prefix = "partial/" if config.allow_missing and missing else ""
    metrics, intervals = all_metrics(scores, scored.video_of_caption, config.resamples)
    metrics = {f"{prefix}{name}": value for name, value in metrics.items()}
    intervals = {f"{prefix}{name}": value for name, value in intervals.items()}
    protocol = _protocol(evaluation, scored, missing)
    result = {
        "benchmark": config.benchmark,
        "title": evaluation.benchmark.title,
        "protocol": protocol,
        "metrics": metrics,
        "intervals": intervals,
        "clips": scored.num_videos,
        "captions": len(scored.captions),
        "missing": [
            {"clip_id": evaluation.gallery.clip_ids[video], "reason": reason}
            for video, reason in sorted(missing.items())
        ],
        "checkpoint": config.checkpoint,
    }
    table = rank_table(scores, scored.clip_ids, scored.captions, scored.video_of_caption)
    storage.write_table(storage.join(config.output, RANKS), table)
    frames_of = report.frame_reader(config, evaluation.model["vision"]["image_size"], scored)
    try:
        picture = report.draw_retrieval(scored, scores.t2v, frames_of, config.num_pictures)
        page = evaluation_report.page(result, table, scored, scores, frames_of, config.num_pictures)
    finally:
        frames_of.close()
    storage.write_bytes(storage.join(config.output, PICTURE), picture)
    storage.write_bytes(storage.join(config.output, REPORT), page.encode())
    for name, value in protocol.items():
        logger.info("%s: %s", name, value)
    for line in _lines(metrics, intervals):
        logger.info("%s", line)
    run.log_metrics(
        {
            **metrics,
            "data/missing": float(len(missing)),
            **{f"ci95/{name}/low": low for name, (low, _) in intervals.items()},
            **{f"ci95/{name}/high": high for name, (_, high) in intervals.items()},
        }
    )
    run.describe("\n\n".join(f"**{name}**: {value}" for name, value in protocol.items()))
    run.log_file(PICTURE, picture)
    run.log_file(REPORT, page.encode())
    run.log_file(RANKS, storage.read_bytes(storage.join(config.output, RANKS)))
    run.log_json(METRICS, result)
    storage.write_json(storage.join(config.output, METRICS), result)


def _protocol(evaluation: _Evaluation, scored: Gallery, missing: dict[int, str]) -> dict[str, str]:
    """What the numbers mean, in words."""
    config, benchmark = evaluation.config, evaluation.benchmark
    count = len(evaluation.gallery.captions)
    pairs = count == evaluation.gallery.num_videos
    held = "the video"
    if not is_manifest(config.data):
        sampling = ClipStore(config.data).sampling
        held = f"{sampling.num_frames} stored ({sampling.frame_choice})"
    searched = evaluation.gallery.num_videos - len(missing)
    if not missing:
        treated = "none"
    elif config.allow_missing:
        treated = (
            f"PARTIAL: {len(missing):,} of {evaluation.gallery.num_videos:,} videos and their "
            f"captions are left out ({reasons_of(missing)}); figures are not the benchmark's"
        )
    else:
        treated = f"{len(missing):,} count as misses ({reasons_of(missing)})"
    told = {
        "benchmark": f"{benchmark.title}: {benchmark.split}",
        "protocol": benchmark.protocol,
        "scored": f"{len(scored.captions):,} captions, {scored.num_videos:,} videos"
        + (" (pairs)" if pairs else " (many captions a video)")
        + (f"; captions search among the {searched:,} videos that are there" if missing else ""),
        "missing videos": treated,
        "ties": "pessimistic: whatever scores the same as the right answer counts as ahead of it",
        "reranking": f"the best {config.k_rerank} by cosine, both ways, by cosine + probability "
        "of a match; all else is unscored"
        if config.k_rerank
        else "none",
        "frames": f"{evaluation.num_frames}, evenly spread over {held}, "
        f"{evaluation.model['vision']['image_size']} pixels, {config.resize}",
        "text tokens": f"captions cleaned and cut at {MAX_WORDS} words and "
        f"{config.max_text_tokens} tokens",
        "precision": config.precision,
        "checkpoint": config.checkpoint,
    }
    affected, repeats = scored.repeated_captions
    if affected:
        told["repeated captions"] = (
            f"{affected:,} captions are another video's too ({repeats:,} repeat an earlier one); "
            "only their own video counts as right"
        )
    if config.dual_softmax:
        told["dual softmax"] = "dsl/... is transductive: it uses all queries of the test at once"
    return told


def _lines(metrics: dict[str, float], intervals: dict[str, tuple[float, float]]) -> list[str]:
    """The metrics as lines to read."""
    groups: dict[str, list[str]] = {}
    for name, value in metrics.items():
        group, _, figure = name.rpartition("/")
        low, high = intervals.get(name, (None, None))
        around = "" if low is None or high is None else f" [{low:.1f}, {high:.1f}]"
        groups.setdefault(group, []).append(f"{figure} {value:.1f}{around}")
    return [f"{group or 'both ways'}: {'  '.join(figures)}" for group, figures in groups.items()]


def _encode(evaluation: _Evaluation) -> Embeddings:
    """Encode what is not encoded yet."""
    gallery, folder = evaluation.gallery, evaluation.embeddings
    video_parts = gallery.parts()
    items: list[dict[str, Any]] = [
        {
            "kind": VIDEOS,
            "part": number,
            "shard": part.shard,
            "rows": part.rows,
            "videos": part.videos,
            "captions": [""],
        }
        for number, part in enumerate(video_parts)
    ]
    starts = range(0, len(gallery.captions), CAPTIONS_PER_PART)
    items += [
        {
            "kind": TEXTS,
            "part": number,
            "shard": 0,
            "rows": [0],
            "videos": [0],
            "captions": gallery.captions[start : start + CAPTIONS_PER_PART],
        }
        for number, start in enumerate(starts)
    ]
    there = {kind: set(storage.list_names(storage.join(folder, kind))) for kind in (VIDEOS, TEXTS)}
    pending = [
        item
        for item in items
        if f"{item['part']:05d}.parquet" not in there[item["kind"]]
        or (is_manifest(evaluation.config.data) and _lacks_videos(folder, item))
    ]

    def encoder() -> type[_Worker]:
        from pipelines.evaluate_worker import Encoder

        return Encoder

    done = sum(_size(item) for item in items) - sum(_size(item) for item in pending)
    _run_stage(
        evaluation,
        f"{evaluation.config.label}: encode",
        pending,
        encoder,
        (evaluation.config, folder),
        "clips and captions",
        done,
    )
    return embeddings.read_all(
        folder, gallery.num_videos, len(gallery.captions), (len(video_parts), len(starts))
    )


def _lacks_videos(folder: str, item: dict[str, Any]) -> bool:
    """Whether videos of a part could not be decoded the last time; they may have been mended."""
    if item["kind"] != VIDEOS:
        return False
    uri = embeddings.part_uri(folder, VIDEOS, item["part"])
    reasons = storage.read_table(uri, ["reason"])["reason"]
    return reasons.null_count < len(reasons)


def _size(item: dict[str, Any]) -> int:
    return len(item["videos"] if item["kind"] == VIDEOS else item["captions"])


def _run_stage(
    evaluation: _Evaluation,
    label: str,
    items: list[dict[str, Any]],
    worker: Callable[[], type[_Worker]],
    arguments: tuple[Any, ...],
    unit: str,
    done: int = 0,
) -> None:
    """Have a pool of actors work on items, each of which leaves a file."""
    if not items:
        return
    config = evaluation.config
    _check_cluster(config)
    total = done + sum(len(item["row"]) if "row" in item else _size(item) for item in items)
    progress = Progress(label, total, unit, done)
    stage = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        worker(),  # type: ignore[arg-type]
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ActorPoolStrategy(size=min(config.num_workers, len(items))),
        num_cpus=1,
        num_gpus=1 if config.use_gpu else 0,
    )
    for row in faults.rows(stage):
        progress.advance(row["count"])


def _check_cluster(config: EvaluateConfig) -> None:
    """Check that the workers fit the cluster; a pool that does not would wait forever.

    Raises:
        ValueError: they do not.
    """
    resources = ray.cluster_resources()
    for name, wanted in (("CPU", True), ("GPU", config.use_gpu)):
        there = resources.get(name, 0)
        if wanted and there < config.num_workers:
            raise ValueError(
                f"evaluation needs {config.num_workers} {name}s, one a worker, the cluster has "
                f"{there:g}; lower num_workers"
            )


def _match(
    evaluation: _Evaluation,
    gallery: Gallery,
    rows: npt.NDArray[np.int64],
    pairs: npt.NDArray[np.int64],
) -> npt.NDArray[np.float32]:
    """Matching probability of each pair, computed part by part; what is there is not done again.

    Args:
        evaluation: what is evaluated.
        gallery: what is scored of it.
        rows: [V, 2] part and row of each video's embeddings.
        pairs: [n, 2] (text, video), in a fixed order.

    Returns:
        [n] float32.
    """
    part_of_pair = rows[pairs[:, 1], 0]
    groups = {int(part): np.flatnonzero(part_of_pair == part) for part in np.unique(part_of_pair)}
    items = [_pairs_of(part, pairs[group], rows, gallery) for part, group in groups.items()]
    there = set(storage.list_names(evaluation.pairs))
    found = {item["part"]: _matched(evaluation, item, there) for item in items}
    pending = [item for item in items if found[item["part"]] is None]

    def matcher() -> type[_Worker]:
        from pipelines.evaluate_worker import Matcher

        return Matcher

    _run_stage(
        evaluation,
        f"{evaluation.config.label}: match",
        pending,
        matcher,
        (evaluation.config, evaluation.embeddings, evaluation.pairs),
        "pairs",
        len(pairs) - sum(len(item["row"]) for item in pending),
    )
    there |= {f"{item['part']:05d}.parquet" for item in pending}
    probability = np.empty(len(pairs), dtype=np.float32)
    for item in items:
        values = found[item["part"]]
        values = _matched(evaluation, item, there) if values is None else values
        assert values is not None, "the stage has just written it"
        probability[groups[item["part"]]] = values
    return probability


def _pairs_of(
    part: int,
    pairs: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    gallery: Gallery,
) -> dict[str, Any]:
    """What a worker needs to match the pairs of a part; arrays, since there may be millions."""
    texts, places = np.unique(pairs[:, 0], return_inverse=True)
    return {
        "part": part,
        "row": rows[pairs[:, 1], 1],
        "text": pairs[:, 0],
        "place": places,
        "caption": [gallery.captions[text] for text in texts],
    }


def _matched(
    evaluation: _Evaluation, item: dict[str, Any], there: set[str]
) -> npt.NDArray[np.float32] | None:
    """Probabilities of a part's pairs; None when they are not there, or those of other pairs."""
    name = f"{item['part']:05d}.parquet"
    if name not in there:
        return None
    table: pa.Table = storage.read_table(storage.join(evaluation.pairs, name))
    same = all(np.array_equal(table[column].to_numpy(), item[column]) for column in ("text", "row"))
    return table["probability"].to_numpy() if same else None
