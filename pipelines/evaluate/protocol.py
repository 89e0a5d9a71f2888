"""The protocol and metrics of an evaluation as readable text."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.locations import is_manifest
from pipelines.evaluate.file_inputs import FileInputs
from pipelines.evaluate.gallery import Gallery, reasons_of
from pipelines.evaluate.inputs import EvaluationInputs
from pipelines.evaluate.known_galleries import recognize
from pipelines.evaluate.published_evaluators import (
    figures_in_words,
    keeps_captions_as_written,
    reranking_in_words,
)
from stgt.inputs.caption_text import MAX_WORDS

TIES = "pessimistic: an item with the same score as the correct answer ranks ahead of it"


def protocol_of(
    evaluation: EvaluationInputs, scored: Gallery, missing: Mapping[int, str]
) -> dict[str, str]:
    """Describe the protocol under which the metrics were computed.

    Args:
        evaluation: Inputs of the evaluation.
        scored: The part of its gallery that is scored.
        missing: Videos that cannot be used, each with its reason.
    """
    config = evaluation.config
    first_s = evaluation.gallery.first_s
    held = "the video" if first_s is None else f"the first {first_s:g} s of the video"
    if not is_manifest(config.data_uri):
        sampling = ClipStore(config.data_uri).sampling
        stored = "stored" if first_s is None else f"stored of {held}"
        held = f"{sampling.num_frames} {stored} ({sampling.frame_choice})"
    if not missing:
        treated = "none"
    elif config.allow_missing:
        treated = (
            f"PARTIAL: {len(missing):,} of {evaluation.gallery.num_videos:,} videos and their "
            f"captions are left out ({reasons_of(missing)}); not comparable with the benchmark"
        )
    else:
        treated = f"{len(missing):,} count as misses ({reasons_of(missing)})"
    told = {
        **_of_the_gallery(evaluation, scored),
        "missing videos": treated,
        "ties": TIES,
        "reranking": reranking_in_words(config.scoring, config.k_rerank)
        if evaluation.model.matches
        else "none: the model does not match pairs",
        "frames": f"{evaluation.num_frames}, evenly spaced over {held}, "
        f"{evaluation.model.inputs.image_size} pixels, {config.resize}",
        "text tokens": (
            f"captions cleaned and truncated to {MAX_WORDS} words and "
            f"{config.max_text_tokens} tokens"
            if evaluation.model.inputs.cleans_captions
            and not keeps_captions_as_written(config.scoring)
            else f"captions truncated to {config.max_text_tokens} tokens"
        ),
        "precision": config.precision,
        "checkpoint": config.checkpoint_uri,
    }
    if missing:
        searched = evaluation.gallery.num_videos - len(missing)
        told["scored"] += f"; captions are searched in the {searched:,} available videos"
    told |= figures_in_words(config.scoring, evaluation.benchmark.name)
    return {**told, **_further(evaluation, scored)}


def protocol_of_file(evaluation: FileInputs) -> dict[str, str]:
    """Describe the protocol of an evaluation whose embeddings come from a file."""
    file, gallery = evaluation.file, evaluation.gallery
    per_video, per_caption = file.vectors
    unsaid = "not recorded in the file of embeddings"
    told = {
        **_of_the_gallery(evaluation, gallery),
        "missing videos": "none",
        "ties": TIES,
        "reranking": "none"
        if file.pair_scores is None
        else "ranked by the pair scores of the file alone; pairs without a score are unscored",
        "embeddings": f"up to {per_video} vectors per video and {per_caption} per caption, of "
        f"width {file.videos.shape[2]}; the best cosine of a pair counts"
        + ("" if file.was_normalized else "; vectors were not of unit length and were normalized"),
        "frames": unsaid,
        "text tokens": unsaid,
        "precision": unsaid,
        "checkpoint": f"none; embeddings of {file.uri}",
    }
    if file.captions is None:
        told["captions"] = (
            "the file contains no texts, so captions are matched by their order within a video; "
            "whether their texts are those of the protocol was not checked"
        )
    return {**told, **_further(evaluation, gallery)}


def _of_the_gallery(evaluation: EvaluationInputs | FileInputs, scored: Gallery) -> dict[str, str]:
    """Describe what is searched, and as which split in circulation it was recognized."""
    benchmark = evaluation.benchmark
    pairs = len(evaluation.gallery.captions) == evaluation.gallery.num_videos
    told = {
        "benchmark": f"{benchmark.title}: {benchmark.split}",
        "protocol": benchmark.protocol,
        "scored": f"{len(scored.captions):,} captions, {scored.num_videos:,} videos"
        + (" (pairs)" if pairs else " (several captions per video)"),
    }
    known = recognize(scored.clip_ids, len(scored.captions))
    if known is not None and benchmark.name == "any":
        told["gallery"] = f"recognized as {known}"
    return told


def _further(evaluation: EvaluationInputs | FileInputs, scored: Gallery) -> dict[str, str]:
    told = {}
    affected, repeats = scored.repeated_captions
    if affected:
        told["repeated captions"] = (
            f"{affected:,} captions also belong to another video ({repeats:,} repeat an earlier "
            "caption); only the caption's own video counts as correct"
        )
    if evaluation.config.dual_softmax:
        told["dual softmax"] = "dsl/... is transductive: scores depend on all test queries"
    return told


def metric_lines(
    metrics: Mapping[str, float], intervals: Mapping[str, tuple[float, float]]
) -> list[str]:
    """Format metrics as lines of text, one line per group such as `t2v`."""
    groups: dict[str, list[str]] = {}
    for name, value in metrics.items():
        group, _, figure = name.rpartition("/")
        low, high = intervals.get(name, (None, None))
        around = "" if low is None or high is None else f" [{low:.1f}, {high:.1f}]"
        groups.setdefault(group, []).append(f"{figure} {value:.1f}{around}")
    return [
        f"{group or 'both directions'}: {'  '.join(figures)}" for group, figures in groups.items()
    ]
