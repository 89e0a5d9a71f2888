"""What an evaluation's numbers mean, and the numbers, as lines to read."""

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
    """What the numbers mean, in words.

    Args:
        evaluation: what is evaluated.
        scored: the part of its gallery that is scored.
        missing: reasons of the videos that cannot be used.
    """
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


def metric_lines(
    metrics: Mapping[str, float], intervals: Mapping[str, tuple[float, float]]
) -> list[str]:
    """The metrics as lines to read."""
    groups: dict[str, list[str]] = {}
    for name, value in metrics.items():
        group, _, figure = name.rpartition("/")
        low, high = intervals.get(name, (None, None))
        around = "" if low is None or high is None else f" [{low:.1f}, {high:.1f}]"
        groups.setdefault(group, []).append(f"{figure} {value:.1f}{around}")
    return [f"{group or 'both ways'}: {'  '.join(figures)}" for group, figures in groups.items()]
