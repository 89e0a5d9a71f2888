"""Protocols in the words of earlier versions compare with those of today."""

from __future__ import annotations

import pytest

from pipelines.compare.earlier_wording import in_current_words
from pipelines.evaluate.benchmarks import BENCHMARKS

EARLIER = {
    "msrvtt": "1,000 pairs; each sentence against 1,000 videos and back",
    "msrvtt_full": "each of 59,800 sentences against 2,990 videos; a video finds any of its own",
    "didemo": "paragraph to video: all descriptions of a video joined, without their times",
    "lsmdc": "1,000 pairs; each sentence against 1,000 clips and back",
    "msvd": "each of 27,763 captions against 670 videos; a video finds any of its own",
    "msvd_670": "670 pairs, an easier protocol than MSVD's own: not comparable with it",
    "any": "each caption against all videos; a video finds any of its captions",
}
"""What `metrics.json` said of each benchmark's protocol."""
SPLITS = {
    "msrvtt": "the 1k-A test (JSFusion): 1,000 videos with one sentence each",
    "didemo": "the test split, grouped by the stem of the video's name: 1,004 videos",
    "any": "the clips given",
}


@pytest.mark.parametrize("name", EARLIER)
def test_protocols_of_earlier_versions_are_those_of_today(name: str) -> None:
    benchmark = BENCHMARKS[name]
    earlier = {"protocol": EARLIER[name]}
    assert in_current_words(earlier) == {"protocol": benchmark.protocol}
    assert in_current_words({"protocol": benchmark.protocol}) == {"protocol": benchmark.protocol}
    if name in SPLITS:
        assert in_current_words({"benchmark": SPLITS[name]})["benchmark"] == benchmark.split


def test_phrases_with_numbers_are_translated() -> None:
    earlier = {
        "scored": "24 captions, 12 videos (many captions a video); captions search among the 1,011 "
        "videos that are there",
        "reranking": "the best 128 by cosine, both ways, by cosine + probability of a match; all "
        "else is unscored",
        "text tokens": "captions cleaned and cut at 50 words and 36 tokens",
    }
    assert in_current_words(earlier) == {
        "scored": "24 captions, 12 videos (several captions per video); captions are searched in "
        "the 1,011 available videos",
        "reranking": "the top 128 by cosine in both directions are reranked by cosine + match "
        "probability; all others are unscored",
        "text tokens": "captions cleaned and truncated to 50 words and 36 tokens",
    }
