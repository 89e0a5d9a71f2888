"""The arithmetic of cutting: spans of windows, shots and subtitles, in seconds.

A span is [start, end). The spans of a clip are in order, begin at its start and end at its end, and
without an overlap each begins where the one before ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

ROUNDING_S = 0.001
"""A rest that is shorter than this is rounding: containers count milliseconds at best."""
DIGITS = 6


class Span(NamedTuple):
    """A time span."""

    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        """Length in seconds."""
        return self.end_s - self.start_s


class Cue(NamedTuple):
    """A subtitle."""

    start_s: float
    end_s: float
    text: str


def windows(whole: Span, window_s: float, overlap_s: float) -> list[Span]:
    """Return the windows of a span.

    The last window, which ends with the span, is kept if it is at least half a window long, and is
    otherwise joined to the one before. A span that is shorter than one window is one window.
    """
    step_s = window_s - overlap_s
    num_full = max(0, math.floor((whole.length_s - window_s + ROUNDING_S) / step_s) + 1)
    if num_full == 0:
        return [whole]
    starts = [whole.start_s + number * step_s for number in range(num_full)]
    ends = [start_s + window_s for start_s in starts]
    rest_s = whole.end_s - ends[-1]
    last_s = whole.start_s + num_full * step_s
    if rest_s > ROUNDING_S and whole.end_s - last_s >= window_s / 2 - ROUNDING_S:
        starts.append(last_s)
        ends.append(whole.end_s)
    ends[-1] = whole.end_s
    return [
        Span(round(start_s, DIGITS), round(end_s, DIGITS))
        for start_s, end_s in zip(starts, ends, strict=True)
    ]


def shots(
    whole: Span, cuts_s: Sequence[float], min_shot_s: float, max_shot_s: float | None
) -> list[Span]:
    """Return the shots of a span.

    Args:
        whole: The span.
        cuts_s: Ascending times at which another shot begins, in any part of the video.
        min_shot_s: A shorter shot is joined to the next one, and the last one to the one before.
        max_shot_s: A longer shot is divided into equal parts that are not longer; None divides
            none.
    """
    begins = [whole.start_s]
    for cut_s in cuts_s:
        inside = whole.start_s < cut_s < whole.end_s
        if inside and cut_s - begins[-1] >= max(min_shot_s - ROUNDING_S, ROUNDING_S):
            begins.append(cut_s)
    if len(begins) > 1 and whole.end_s - begins[-1] < max(min_shot_s - ROUNDING_S, ROUNDING_S):
        begins.pop()
    found = [
        Span(begin_s, end_s)
        for begin_s, end_s in zip(begins, [*begins[1:], whole.end_s], strict=True)
    ]
    if max_shot_s is None:
        return found
    return [part for shot in found for part in _equal_parts(shot, max_shot_s)]


def _equal_parts(whole: Span, most_s: float) -> list[Span]:
    count = max(1, math.ceil((whole.length_s - ROUNDING_S) / most_s))
    inner = [
        round(whole.start_s + number * whole.length_s / count, DIGITS) for number in range(1, count)
    ]
    return [
        Span(begin_s, end_s)
        for begin_s, end_s in zip([whole.start_s, *inner], [*inner, whole.end_s], strict=True)
    ]


def caption_of(span: Span, cues: Sequence[Cue]) -> str:
    """Return the text of the subtitles of a span, in order; empty if it has none.

    A subtitle belongs to a span if at least half of it lies within the span. One that is longer
    than the spans also belongs to every span that it fills.
    """
    return " ".join(cue.text for cue in cues if _belongs(cue, span))


def _belongs(cue: Cue, span: Span) -> bool:
    common_s = min(cue.end_s, span.end_s) - max(cue.start_s, span.start_s)
    is_filled = cue.start_s <= span.start_s and span.end_s <= cue.end_s
    return common_s > 0 and (is_filled or 2 * common_s >= cue.end_s - cue.start_s)


def cues_within(whole: Span, cues: Sequence[Cue]) -> list[tuple[Span, Cue]]:
    """Return the subtitles of a span, each with the part of the span that it covers."""
    return [
        (Span(max(cue.start_s, whole.start_s), min(cue.end_s, whole.end_s)), cue)
        for cue in cues
        if _belongs(cue, whole)
    ]
