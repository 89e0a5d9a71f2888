"""Images of retrieval results: captions with frames of their top-ranked clips."""

from __future__ import annotations

import io
import textwrap
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.locations import is_manifest
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.gallery import Gallery, spread
from pipelines.evaluate.order_pairs import OrderExample
from pipelines.feed.sources import ManifestSource
from stgt.inputs.frame_choice import choose_frames
from stgt.retrieval.gallery import Direction

TOP = 5
FRAMES = 4
EDGE = 44
"""Edge length of a frame in the image, in pixels."""
GAP = 10
CAPTION_WIDTH = 190
MARGIN = 12
RIGHT = (0, 130, 60)
WRONG = (176, 176, 176)
INK = (30, 30, 30)
CLIPS_IN_MEMORY = 64

Frames = npt.NDArray[np.uint8]


class FrameReader(Protocol):
    """Reads a few frames of any video of a gallery."""

    def __call__(self, video: int) -> Frames:
        """Return frames [FRAMES, size, size, 3] uint8 of a video that is not missing."""
        ...

    def close(self) -> None:
        """Release caches and decoder processes."""
        ...


class _StoredFrames:
    def __init__(self, uri: str, gallery: Gallery) -> None:
        self._store = ClipStore(uri)
        self._gallery = gallery
        self._known: OrderedDict[int, Frames] = OrderedDict()

    def __call__(self, video: int) -> Frames:
        if video not in self._known:
            place = self._gallery.places[video]
            assert place is not None, "missing videos are never ranked"
            coded = self._store.read_rows(place[0], [place[1]], ["frames"])[0]["frames"]
            chosen = choose_frames(len(coded), FRAMES, "middle")
            self._known[video] = self._store.decode([coded[i] for i in chosen])
            while len(self._known) > CLIPS_IN_MEMORY:
                self._known.popitem(last=False)
        return self._known[video]

    def close(self) -> None:
        self._known.clear()


class _DecodedFrames:
    def __init__(self, config: EvaluateConfig, size: int, gallery: Gallery) -> None:
        self._source = ManifestSource(config.data_uri, size, config.resize, config.frame_rules)
        self._gallery = gallery

    def __call__(self, video: int) -> Frames:
        place = self._gallery.places[video]
        assert place is not None, "every clip of a manifest has a position"
        clip = self._source.clip(*place)
        return self._source.frames(clip, FRAMES, "middle", np.random.default_rng(0))

    def close(self) -> None:
        self._source.close()


def frame_reader(config: EvaluateConfig, size: int, gallery: Gallery) -> FrameReader:
    """Return a reader for the frames of a gallery.

    Args:
        config: Names the clip store or manifest.
        size: Edge length of frames decoded from a video, in pixels. A store has its own size.
        gallery: Videos to read from.
    """
    if is_manifest(config.data_uri):
        return _DecodedFrames(config, size, gallery)
    return _StoredFrames(config.data_uri, gallery)


def draw_retrieval(
    gallery: Gallery,
    found: Direction,
    frames_of: FrameReader,
    count: int,
    orders: Sequence[OrderExample] = (),
) -> bytes:
    """Draw captions with frames of their five top-ranked clips and return the image as PNG.

    The correct clip has a green frame. Pairs of captions that differ only in the order of events
    follow below, each with its clip.

    Args:
        gallery: Captions and videos.
        found: Results of text-to-video retrieval.
        frames_of: Reads frames of a video.
        count: Number of captions to show, spread evenly over all captions.
        orders: Pairs of captions to show.
    """
    captions, ranking = gallery.captions, found.best
    chosen = spread(len(captions), count)
    strip = FRAMES * EDGE
    row_height = EDGE + 30
    width = 2 * MARGIN + CAPTION_WIDTH + TOP * (strip + GAP)
    orders_top = MARGIN + 34 + row_height * len(chosen)
    height = orders_top + MARGIN + (34 + row_height * len(orders) if orders else 0)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    draw.text((MARGIN, MARGIN), "Caption", fill=INK, font=font)
    heading = "Top five clips, four frames each in temporal order; the correct clip is framed green"
    draw.text((MARGIN + CAPTION_WIDTH, MARGIN), heading, fill=INK, font=font)
    for place, caption in enumerate(chosen):
        top = MARGIN + 34 + place * row_height
        text = "\n".join(textwrap.wrap(captions[caption], 30)[:4])
        draw.multiline_text((MARGIN, top), text, fill=INK, font=small, spacing=2)
        for rank, video in enumerate(ranking.candidates[caption, :TOP].tolist()):
            left = MARGIN + CAPTION_WIDTH + rank * (strip + GAP)
            is_right = video == gallery.video_of_caption[caption]
            _paste_frames(picture, gallery, frames_of, video, left, top)
            box = (left - 2, top - 2, left + strip + 1, top + EDGE + 1)
            draw.rectangle(box, outline=RIGHT if is_right else WRONG, width=3 if is_right else 1)
            score = ranking.scores[caption, rank]
            label = f"{rank + 1}.  {score:.2f}{'  correct' if is_right else ''}"
            color = RIGHT if is_right else INK
            draw.text((left, top + EDGE + 4), label, fill=color, font=small)
    if orders:
        heading = (
            "Captions that differ only in the order or direction of events, with their scores; the "
            "true one is green, and the one that the model prefers is marked >"
        )
        draw.text((MARGIN, orders_top), heading, fill=INK, font=font)
    video_of = {clip_id: video for video, clip_id in enumerate(gallery.clip_ids)}
    for place, pair in enumerate(orders):
        top = orders_top + 34 + place * row_height
        _paste_frames(picture, gallery, frames_of, video_of[pair.clip_id], MARGIN, top)
        box = (MARGIN - 2, top - 2, MARGIN + strip + 1, top + EDGE + 1)
        draw.rectangle(box, outline=WRONG)
        for line, (text, score, other, color) in enumerate(
            (
                (pair.caption, pair.score, pair.counterpart_score, RIGHT),
                (pair.counterpart, pair.counterpart_score, pair.score, INK),
            )
        ):
            left, below = MARGIN + strip + 2 * GAP, top + 4 + 20 * line
            draw.text((left, below), ">" if score > other else "", fill=color, font=font)
            draw.text((left + 14, below), f"{score:.2f}   {text}", fill=color, font=font)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _paste_frames(
    picture: Image.Image, gallery: Gallery, frames_of: FrameReader, video: int, left: int, top: int
) -> None:
    if gallery.places[video] is None:
        return  # embeddings of a file may be of videos whose frames are not at hand
    for number, frame in enumerate(frames_of(video)):
        image = Image.fromarray(frame).resize((EDGE, EDGE))
        picture.paste(image, (left + number * EDGE, top))
