"""Text-video retrieval by the protocol of a benchmark: Ray Data encodes and matches, numpy scores.

Stages: encode clips and captions in parts (kept as Parquet, so a restart goes on with the parts
that are left, and scoring needs no model), cosine similarity in chunks, candidates both ways,
matching of the union of candidate pairs (scored once for both directions), metrics with intervals,
a report.

Legend: V videos, N texts, K candidates.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch

from pipelines import (
    checkpoints,
    evaluation_report,
    published,
    report,
    storage,
    tracking,
)
from pipelines.benchmarks import BENCHMARKS, Benchmark
from pipelines.clips import ClipStore
from pipelines.config import EvaluateConfig, fingerprint, to_dict
from pipelines.embeddings import TEXTS, VIDEOS
from pipelines.evaluate_stages import PAIRS, Evaluation, encode, match
from pipelines.gallery import Gallery, open_gallery, reasons_of
from pipelines.progress import Progress
from pipelines.protocol import metric_lines, protocol_of
from pipelines.scores import Scores, ToldChunks, all_metrics, rank_table, score_gallery
from pipelines.sources import check_frames, digest_of, is_manifest
from stgt.errors import ClipStoreError, STGTError
from stgt.retrieval import Similarity

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

METRICS = "metrics.json"
RANKS = "ranks.parquet"
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
    run_id: str | None
    """Of MLflow; None while its server has not been reached."""
    seconds: float


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
    evaluation = Evaluation(config, benchmark, gallery, model)
    _check_frames(evaluation)
    with storage.lock(config.output):
        _claim(evaluation)
        result_uri = storage.join(config.output, METRICS)
        run = None
        if not storage.exists(result_uri):
            run = _open_run(config, parent_id)
            succeeded = False
            try:
                _evaluate(evaluation)
                succeeded = True
            finally:
                if run is not None and not succeeded:
                    run.fail()
        result = storage.read_json(result_uri)
        # Results of earlier versions, without the field, were written once MLflow had them.
        if not result.get("tracked", True):
            run = run or _open_run(config, parent_id)
            if run is not None and _record(config, run, result):
                result["tracked"] = True
                storage.write_json(result_uri, result)
    record = storage.join(config.output, RUN)
    return EvaluateSummary(
        benchmark=config.benchmark,
        protocol=result["protocol"],
        metrics=result["metrics"],
        clips=result["clips"],
        captions=result["captions"],
        missing=[one["clip_id"] for one in result["missing"][:MISSING_SHOWN]],
        report=storage.join(config.output, REPORT),
        picture=storage.join(config.output, PICTURE),
        run_id=storage.read_json(record)["run_id"] if storage.exists(record) else None,
        seconds=round(time.monotonic() - started, 1),
    )


def _open_run(config: EvaluateConfig, parent_id: str | None) -> tracking.Run | None:
    """The run in MLflow; None, with a word, when its server does not answer."""
    return tracking.Run.open_if_reachable(
        config.tracking,
        config.label,
        storage.join(config.output, RUN),
        to_dict(config),
        parent_id,
        meanwhile=f"the evaluation goes on, its results are kept in {config.output}; the same "
        "command enters them when it can be reached",
    )


def _record(config: EvaluateConfig, run: tracking.Run, result: dict[str, Any]) -> bool:
    """Enter a result in MLflow and close the run; False, with a word, when that cannot be done."""
    intervals = result["intervals"]
    try:
        run.log_metrics(
            {
                **result["metrics"],
                "data/missing": float(len(result["missing"])),
                **{f"ci95/{name}/low": low for name, (low, _) in intervals.items()},
                **{f"ci95/{name}/high": high for name, (_, high) in intervals.items()},
            }
        )
        run.describe(
            "\n\n".join(f"**{name}**: {value}" for name, value in result["protocol"].items())
        )
        for name in (PICTURE, REPORT, RANKS):
            run.log_file(name, storage.read_bytes(storage.join(config.output, name)))
        run.log_json(METRICS, {name: value for name, value in result.items() if name != "tracked"})
        run.finish(succeeded=True)
    except tracking.UnreachableError as error:
        logger.warning("%s; the same command enters the results when it can be reached", error)
        return False
    except Exception:
        run.fail()
        raise
    return True


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


def _check_frames(evaluation: Evaluation) -> None:
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


def _claim(evaluation: Evaluation) -> None:
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


def _evaluate(evaluation: Evaluation) -> None:
    config, gallery = evaluation.config, evaluation.gallery
    _require_a_video(gallery, gallery.missing)
    encoded = encode(evaluation)
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

        scores = score_gallery(
            ToldChunks(similarity, progress),
            scored.video_of_caption,
            present,
            config.k_rerank,
            functools.partial(match, evaluation, scored, encoded.rows),
            config.dual_softmax,
        )
    finally:
        torch.set_num_threads(threads)
    _write_result(evaluation, scored, scores, missing)


def _require_a_video(gallery: Gallery, missing: dict[int, str]) -> None:
    if len(missing) == gallery.num_videos:
        raise ClipStoreError(
            f"none of the {gallery.num_videos:,} videos can be used ({reasons_of(missing)}); mend "
            "the videos, or look at the paths in the manifest"
        )


def _write_result(
    evaluation: Evaluation,
    scored: Gallery,
    scores: Scores,
    missing: dict[int, str],
) -> None:
    config = evaluation.config
    prefix = "partial/" if config.allow_missing and missing else ""
    metrics, intervals = all_metrics(scores, scored.video_of_caption, config.resamples)
    metrics = {f"{prefix}{name}": value for name, value in metrics.items()}
    intervals = {f"{prefix}{name}": value for name, value in intervals.items()}
    protocol = protocol_of(evaluation, scored, missing)
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
        "tracked": False,
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
    for line in metric_lines(metrics, intervals):
        logger.info("%s", line)
    storage.write_json(storage.join(config.output, METRICS), result)
