"""The arithmetic of windows, shots and subtitles."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.manifest.cutting.spans import Cue, Span, caption_of, cues_within, shots, windows

MILLISECONDS = st.integers(1, 4 * 3600 * 1000).map(lambda ms: ms / 1000)


@pytest.mark.parametrize(
    ("length_s", "expected"),
    [
        (30.0, [(0, 10), (10, 20), (20, 30)]),
        (35.0, [(0, 10), (10, 20), (20, 30), (30, 35)]),  # half a window is kept
        (34.9, [(0, 10), (10, 20), (20, 34.9)]),  # less is joined
        (10.0, [(0, 10)]),
        (14.0, [(0, 14)]),
        (3.0, [(0, 3)]),  # shorter than a window
        (0.04, [(0, 0.04)]),
        (30.0004, [(0, 10), (10, 20), (20, 30.0004)]),
        (29.9996, [(0, 10), (10, 20), (20, 29.9996)]),
    ],
)
def test_windows_end_with_the_video(length_s: float, expected: list) -> None:
    assert windows(Span(0.0, length_s), 10.0, 0.0) == expected


def test_windows_overlap() -> None:
    assert windows(Span(0.0, 20.0), 10.0, 5.0) == [(0, 10), (5, 15), (10, 20)]
    assert windows(Span(0.0, 22.0), 10.0, 5.0) == [(0, 10), (5, 15), (10, 20), (15, 22)]
    assert windows(Span(0.0, 21.0), 10.0, 2.0) == [(0, 10), (8, 18), (16, 21)]
    assert windows(Span(0.0, 20.0), 10.0, 2.0) == [(0, 10), (8, 20)]


def test_windows_of_a_span_lie_within_it() -> None:
    assert windows(Span(100.5, 126.5), 10.0, 0.0) == [
        (100.5, 110.5),
        (110.5, 120.5),
        (120.5, 126.5),
    ]


@settings(max_examples=50)
@given(
    start_s=st.floats(0, 1e4),
    length_s=MILLISECONDS,
    window_s=st.floats(1.0, 600.0),
    overlap=st.floats(0.0, 0.9),
)
def test_windows_cover_everything(
    start_s: float, length_s: float, window_s: float, overlap: float
) -> None:
    whole, overlap_s = Span(start_s, start_s + length_s), overlap * window_s
    found = windows(whole, window_s, overlap_s)
    assert found[0].start_s == pytest.approx(whole.start_s, abs=1e-6)
    assert found[-1].end_s == pytest.approx(whole.end_s, abs=1e-6)
    for one, following in pairwise(found):
        assert one.end_s - following.start_s == pytest.approx(overlap_s, abs=2e-6)
        assert one.length_s == pytest.approx(window_s, abs=2e-6)
    if len(found) > 1:
        # A rest of less than half a window is joined, so the last one is longer by less than that.
        assert 0.5 * window_s - 0.002 <= found[-1].length_s < 1.5 * window_s + 0.002
    else:
        assert length_s < 1.5 * window_s + 0.002


def test_shots_begin_at_cuts() -> None:
    assert shots(Span(0.0, 10.0), [2.0, 5.0], 0.6, None) == [(0, 2), (2, 5), (5, 10)]
    assert shots(Span(0.0, 10.0), [], 0.6, None) == [(0, 10)]


def test_short_shots_are_joined_to_the_next_one_and_the_last_one_to_the_one_before() -> None:
    assert shots(Span(0.0, 10.0), [0.3, 5.0, 5.2, 9.8], 0.6, None) == [(0, 5), (5, 10)]


def test_cuts_closer_than_rounding_make_no_shots() -> None:
    assert shots(Span(0.0, 10.0), [5.0, 5.0005, 9.9999], 0.0, None) == [(0, 5), (5, 10)]


def test_long_shots_are_divided_into_equal_parts() -> None:
    found = shots(Span(0.0, 30.0), [5.0], 0.6, 10.0)
    assert found == [(0, 5), (5, 13.333333), (13.333333, 21.666667), (21.666667, 30)]
    assert shots(Span(0.0, 10.0), [], 0.6, 10.0) == [(0, 10)]


def test_shots_of_a_span_are_cut_within_it() -> None:
    assert shots(Span(4.0, 8.0), [2.0, 5.0, 9.0], 0.6, None) == [(4, 5), (5, 8)]


@pytest.mark.slow
@settings(max_examples=50)
@given(
    length_s=MILLISECONDS,
    places=st.lists(st.floats(0.0, 1.0), max_size=30),
    min_shot_s=st.floats(0.0, 5.0),
    longest=st.none() | st.floats(2.0, 10.0),
)
def test_shots_cover_everything(
    length_s: float, places: list[float], min_shot_s: float, longest: float | None
) -> None:
    whole = Span(0.0, length_s)
    most_s = None if longest is None else max(0.1, longest * min_shot_s)
    found = shots(whole, sorted(place * length_s for place in places), min_shot_s, most_s)
    assert (found[0].start_s, found[-1].end_s) == whole
    for one, following in pairwise(found):
        assert one.end_s == following.start_s
    if most_s is not None:
        assert max(shot.length_s for shot in found) <= most_s + 0.001
    if len(found) > 1:
        assert min(shot.length_s for shot in found) >= min_shot_s - 0.002


def test_a_subtitle_across_a_border_belongs_to_the_larger_part() -> None:
    cues = [Cue(8.0, 11.0, "mostly first"), Cue(9.5, 12.0, "mostly second"), Cue(3, 4, "inside")]
    first, second = Span(0.0, 10.0), Span(10.0, 20.0)
    assert caption_of(first, cues) == "mostly first inside"
    assert caption_of(second, cues) == "mostly second"
    assert caption_of(Span(20.0, 30.0), cues) == ""


def test_a_subtitle_that_is_longer_than_windows_belongs_to_those_that_it_fills() -> None:
    cues = [Cue(0.0, 30.0, "song")]
    assert [caption_of(span, cues) for span in windows(Span(0.0, 40.0), 10.0, 0.0)] == [
        "song",
        "song",
        "song",
        "",
    ]


@settings(max_examples=50)
@given(
    start_s=st.floats(0.0, 100.0),
    length_s=st.floats(0.01, 60.0),
    window_s=st.floats(1.0, 30.0),
)
def test_every_subtitle_of_a_video_is_in_a_caption(
    start_s: float, length_s: float, window_s: float
) -> None:
    cue = Cue(start_s, start_s + length_s, "word")
    found = windows(Span(0.0, 200.0), window_s, 0.0)
    assert any(caption_of(span, [cue]) for span in found)


def test_subtitles_of_a_span_are_cut_to_it() -> None:
    cues = [Cue(1.0, 3.0, "a"), Cue(9.0, 11.5, "b"), Cue(9.9, 12.0, "c"), Cue(20.0, 21.0, "d")]
    assert [(*span, cue.text) for span, cue in cues_within(Span(2.0, 10.5), cues)] == [
        (2.0, 3.0, "a"),
        (9.0, 10.5, "b"),
    ]
