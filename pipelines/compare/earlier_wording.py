"""Descriptions of protocols as earlier versions worded them, in today's words.

Evaluations are comparable when their protocols are described in the same words, so those of earlier
versions are translated before they are compared.
"""

from __future__ import annotations

import re

PHRASES = (
    (r"the 1k-A test \(JSFusion\)", "the 1k-A test split (JSFusion)"),
    (
        r"1,000 pairs; each sentence against 1,000 (video|clip)s and back",
        r"1,000 pairs of a sentence and a \1, in both directions",
    ),
    (
        r"each of 59,800 sentences against 2,990 videos; a video finds any of its own",
        "59,800 sentences against 2,990 videos; for a video, any of its own sentences is correct",
    ),
    (
        r"grouped by the stem of the video's name: 1,004 videos",
        "grouped by video name without extension: 1,004 videos",
    ),
    (r"joined, without their times", "joined, without timestamps"),
    (
        r"each of 27,763 captions against 670 videos; a video finds any of its own",
        "27,763 captions against 670 videos; for a video, any of its own captions is correct",
    ),
    (
        r"670 pairs, an easier protocol than MSVD's own: not comparable with it",
        "670 pairs; easier than MSVD's own protocol and not comparable with it",
    ),
    (r"\bthe clips given", "all clips of the given data"),
    (
        r"each caption against all videos; a video finds any of its captions",
        "each caption against all videos; for a video, any of its own captions is correct",
    ),
    (r"figures are not the benchmark's", "not comparable with the benchmark"),
    (r"\(many captions a video\)", "(several captions per video)"),
    (
        r"captions search among the ([\d,]+) videos that are there",
        r"captions are searched in the \1 available videos",
    ),
    (
        r"pessimistic: whatever scores the same as the right answer counts as ahead of it",
        "pessimistic: an item with the same score as the correct answer ranks ahead of it",
    ),
    (
        r"the best (\d+) by cosine, both ways, by cosine \+ probability of a match; all else is "
        r"unscored",
        r"the top \1 by cosine in both directions are reranked by cosine + match probability; all "
        r"others are unscored",
    ),
    (r"evenly spread over", "evenly spaced over"),
    (r"captions cleaned and cut at", "captions cleaned and truncated to"),
    (
        r"captions are another video's too \(([\d,]+) repeat an earlier one\); only their own "
        r"video counts as right",
        r"captions also belong to another video (\1 repeat an earlier caption); only the caption's "
        r"own video counts as correct",
    ),
    (
        r"is transductive: it uses all queries of the test at once",
        "is transductive: scores depend on all test queries",
    ),
)
"""Earlier wording (a regular expression) and today's."""


def in_current_words(protocol: dict[str, str]) -> dict[str, str]:
    """A protocol's description, by topic, in the words that evaluations use today."""
    current = {}
    for topic, text in protocol.items():
        for earlier, today in PHRASES:
            text = re.sub(earlier, today, text)  # noqa: PLW2901 - one phrase after another
        current[topic] = text
    return current
