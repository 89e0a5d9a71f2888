"""Builds the clips of dense captions, in which every sentence of a video has a time span."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.manifest.formats import reading, values
from pipelines.manifest.formats.files import AmbiguousVideo, VideoFinder
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows
from stgt.errors import ManifestError

SENTENCE, PARAGRAPH = "sentence", "paragraph"
PREFIX = "v_"
"""What ids of ActivityNet begin with, but not always their files."""


@dataclass(frozen=True, kw_only=True)
class DenseVideo:
    """The dense captions of a video."""

    file: str
    row: int
    """Annotation file and row, for rejected sentences."""
    video_id: str
    spans: Sequence[Any]
    """[start, end] of each sentence, in seconds."""
    sentences: Sequence[Any]
    split: str
    source: str
    """Name of the format."""
    extras: dict[str, Any]

    def bad(self, reason: str) -> BadRow:
        """Return a rejected row for the video or one of its sentences."""
        return BadRow(file=self.file, row=self.row, reason=f"{self.video_id}: {reason}")


def kind_of(source: AnnotationSource) -> str:
    """Return the kind of clips to make: of sentences or of whole videos.

    Raises:
        ManifestError: The setting `caption` is neither.
    """
    kind = source.caption or SENTENCE
    if kind not in (SENTENCE, PARAGRAPH):
        raise ManifestError(f"caption = {kind!r}: must be {SENTENCE} or {PARAGRAPH}")
    return kind


def clips(video: DenseVideo, kind: str, files: VideoFinder) -> Rows:
    """Yield a clip for each sentence of a video, or one for the paragraph that they make."""
    if len(video.spans) != len(video.sentences):
        yield video.bad(
            f"it has {len(video.spans)} time spans, but {len(video.sentences)} sentences"
        )
        return
    uri = _uri(video.video_id, files)
    if kind == PARAGRAPH:
        yield _paragraph(video, uri)
        return
    for number, (span, sentence) in enumerate(
        zip(video.spans, video.sentences, strict=True), start=1
    ):
        captions = reading.caption_list(sentence)
        if not captions:
            yield video.bad(f"sentence {number}: {reading.EMPTY}")
            continue
        try:
            start, end = values.span(span, "time span")
        except ValueError as error:
            yield video.bad(f"sentence {number}: {error}")
            continue
        yield ClipRow(
            clip_id=f"{video.video_id}#{start}-{end}",
            video_id=video.video_id,
            video_uri=uri,
            captions=captions,
            split=video.split,
            source=video.source,
            start_s=start,
            end_s=end,
            extras=dict(video.extras),
        )


def _paragraph(video: DenseVideo, uri: str | AmbiguousVideo) -> ClipRow | BadRow:
    texts = [" ".join(reading.caption_list(sentence)) for sentence in video.sentences]
    paragraph = " ".join(" ".join(texts).split())
    if not paragraph:
        return video.bad(reading.EMPTY)
    return ClipRow(
        clip_id=video.video_id,
        video_id=video.video_id,
        video_uri=uri,
        captions=[paragraph],
        split=video.split,
        source=video.source,
        extras={**video.extras, "num_sentences": len(video.sentences)},
    )


def _uri(video_id: str, files: VideoFinder) -> str | AmbiguousVideo:
    bare = video_id.removeprefix(PREFIX)
    return files.of_id(video_id, bare if bare != video_id else f"{PREFIX}{video_id}")
