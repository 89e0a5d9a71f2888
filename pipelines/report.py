"""Pictures of retrieval results: captions with the frames of their best clips."""

from __future__ import annotations

import io
import textwrap

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from pipelines.clips import ClipStore
from stgt.sampling import choose_frames

TOP = 5
FRAMES = 4
EDGE = 44
"""Pixels of a frame in the picture."""
GAP = 10
CAPTION_WIDTH = 190
MARGIN = 12
RIGHT = (0, 130, 60)
WRONG = (176, 176, 176)
INK = (30, 30, 30)


def draw_retrieval(
    store: ClipStore,
    captions: list[str],
    video_of_caption: list[int],
    scores: npt.NDArray[np.float32],
    count: int,
) -> bytes:
    """A PNG of captions, each with frames of the five best clips; the right clip is framed green.

    Args:
        store: the gallery.
        captions: N captions.
        video_of_caption: for each, the clip it belongs to.
        scores: [N, V] float, text-to-video.
        count: captions shown, spread evenly over all.
    """
    chosen = np.linspace(0, len(captions) - 1, min(count, len(captions))).round().astype(int)
    strip = FRAMES * EDGE
    row_height = EDGE + 30
    width = 2 * MARGIN + CAPTION_WIDTH + TOP * (strip + GAP)
    height = 2 * MARGIN + 34 + row_height * len(chosen)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    draw.text((MARGIN, MARGIN), "Caption", fill=INK, font=font)
    heading = "Best five clips, four frames of each in time order; the right clip is framed green"
    draw.text((MARGIN + CAPTION_WIDTH, MARGIN), heading, fill=INK, font=font)
    for place, caption in enumerate(chosen):
        top = MARGIN + 34 + place * row_height
        text = "\n".join(textwrap.wrap(captions[caption], 30)[:4])
        draw.multiline_text((MARGIN, top), text, fill=INK, font=small, spacing=2)
        order = np.argsort(-scores[caption], kind="stable")
        for rank, video in enumerate(order[:TOP]):
            left = MARGIN + CAPTION_WIDTH + rank * (strip + GAP)
            is_right = int(video) == video_of_caption[caption]
            _paste_clip(picture, store, int(video), (left, top))
            box = (left - 2, top - 2, left + strip + 1, top + EDGE + 1)
            draw.rectangle(box, outline=RIGHT if is_right else WRONG, width=3 if is_right else 1)
            label = f"{rank + 1}.  {scores[caption, video]:.2f}{'  right' if is_right else ''}"
            colour = RIGHT if is_right else INK
            draw.text((left, top + EDGE + 4), label, fill=colour, font=small)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _paste_clip(
    picture: Image.Image, store: ClipStore, video: int, corner: tuple[int, int]
) -> None:
    ends = np.cumsum(store.shard_sizes)
    shard = int(np.searchsorted(ends, video, side="right"))
    row = video - int(ends[shard] - store.shard_sizes[shard])
    coded = store.read_shard(shard, ["frames"]).slice(row, 1)["frames"].to_pylist()[0]
    chosen = choose_frames(len(coded), FRAMES, "middle")
    for place, frame in enumerate(store.decode([coded[i] for i in chosen])):
        image = Image.fromarray(frame).resize((EDGE, EDGE))
        picture.paste(image, (corner[0] + place * EDGE, corner[1]))
