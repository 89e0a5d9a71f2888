"""Builds the clips of dense captions, in which every sentence of a video has a time span."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.manifest.formats import reading, values
from pipelines.manifest.formats.files import VideoFinder
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows
from stgt.errors import ManifestError

SENTENCE, PARAGRAPH = "sentence", "paragraph"


def kind_of(source: AnnotationSource) -> str:
    """Return the kind of clips to make: of sentences or of whole videos.

    Raises:
        ManifestError: The setting `caption` is neither.
    """
    kind = source.caption or SENTENCE
    if kind not in (SENTENCE, PARAGRAPH):
        raise ManifestError(f"caption = {kind!r}: must be {SENTENCE} or {PARAGRAPH}")
    return kind


def clips(
    video_id: str,
    spans: Sequence[Any],
    sentences: Sequence[Any],
    split: str,
    extras: dict[str, Any],
    source: AnnotationSource,
    place: BadRow,
    name: str,
    uri: Any,
) -> Rows:
    """Yield a clip for each sentence of a video, or one for the paragraph that they make.

    Args:
        video_id: Id of the video.
        spans: [start, end] of each sentence, in seconds.
        sentences: The sentences.
        split: Name of the split.
        extras: Other values of the video.
        source: The source, whose setting `caption` selects the kind of clips.
        place: File and row of the video, for rejected sentences.
        name: Name of the format.
        uri: URI of the video.
    """

    def bad(reason: str) -> BadRow:
        return BadRow(file=place.file, row=place.row, reason=f"{video_id}: {reason}")

    if len(spans) != len(sentences):
        yield bad(f"it has {len(spans)} time spans, but {len(sentences)} sentences")
        return
    if kind_of(source) == PARAGRAPH:
        texts = [" ".join(reading.caption_list(sentence)) for sentence in sentences]
        paragraph = " ".join(" ".join(texts).split())
        if not paragraph:
            yield bad(reading.EMPTY)
            return
        yield ClipRow(
            clip_id=video_id,
            video_id=video_id,
            video_uri=uri,
            captions=[paragraph],
            split=split,
            source=name,
            extras={**extras, "num_sentences": len(sentences)},
        )
        return
    for number, (span, sentence) in enumerate(zip(spans, sentences, strict=True), start=1):
        captions = reading.caption_list(sentence)
        if not captions:
            yield bad(f"sentence {number}: {reading.EMPTY}")
            continue
        try:
            start, end = values.span(span, "time span")
        except ValueError as error:
            yield bad(f"sentence {number}: {error}")
            continue
        yield ClipRow(
            clip_id=f"{video_id}#{start}-{end}",
            video_id=video_id,
            video_uri=uri,
            captions=captions,
            split=split,
            source=name,
            start_s=start,
            end_s=end,
            extras=extras,
        )


def video_uri(video_id: str, files: VideoFinder) -> Any:
    """Return the URI of a video, whose file may lack the `v_` at the beginning of its id."""
    others = [video_id.removeprefix("v_")] if video_id.startswith("v_") else [f"v_{video_id}"]
    return files.of_id(video_id, *others)
