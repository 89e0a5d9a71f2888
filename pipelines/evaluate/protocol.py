"""The protocol and metrics of an evaluation as readable text."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.artifacts.clip_store import ClipStore
from pipelines.evaluate.gallery import Gallery, reasons_of
from pipelines.evaluate.inputs import EvaluationInputs
from pipelines.feed.sources import is_manifest
from stgt.inputs.caption_text import MAX_WORDS


def protocol_of(
    evaluation: EvaluationInputs, scored: Gallery, missing: Mapping[int, str]
) -> dict[str, str]:
    """Describe the protocol under which the metrics were computed.

    Args:
        evaluation: Inputs of the evaluation.
        scored: The part of its gallery that is scored.
        missing: Videos that cannot be used, each with its reason.
    """
    config, benchmark = evaluation.config, evaluation.benchmark
    count = len(evaluation.gallery.captions)
    pairs = count == evaluation.gallery.num_videos
    first_s = evaluation.gallery.first_s
    held = "the video" if first_s is None else f"the first {first_s:g} s of the video"
    if not is_manifest(config.data):
        sampling = ClipStore(config.data).sampling
        stored = "stored" if first_s is None else f"stored of {held}"
        held = f"{sampling.num_frames} {stored} ({sampling.frame_choice})"
    searched = evaluation.gallery.num_videos - len(missing)
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
        "benchmark": f"{benchmark.title}: {benchmark.split}",
        "protocol": benchmark.protocol,
        "scored": f"{len(scored.captions):,} captions, {scored.num_videos:,} videos"
        + (" (pairs)" if pairs else " (several captions per video)")
        + (f"; captions are searched in the {searched:,} available videos" if missing else ""),
        "missing videos": treated,
        "ties": "pessimistic: an item with the same score as the correct answer ranks ahead of it",
        "reranking": f"the top {config.k_rerank} by cosine in both directions are reranked by "
        "cosine + match probability; all others are unscored"
        if config.k_rerank
        else "none",
        "frames": f"{evaluation.num_frames}, evenly spaced over {held}, "
        f"{evaluation.model['vision']['image_size']} pixels, {config.resize}",
        "text tokens": f"captions cleaned and truncated to {MAX_WORDS} words and "
        f"{config.max_text_tokens} tokens",
        "precision": config.precision,
        "checkpoint": config.checkpoint,
    }
    affected, repeats = scored.repeated_captions
    if affected:
        told["repeated captions"] = (
            f"{affected:,} captions also belong to another video ({repeats:,} repeat an earlier "
            "caption); only the caption's own video counts as correct"
        )
    if config.dual_softmax:
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
