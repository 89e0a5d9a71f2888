"""Caption cleaning, as published. It has no dependencies, so annotation readers load no torch."""

from __future__ import annotations

import re

MAX_WORDS = 50

_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")


def clean_caption(caption: str, max_words: int = MAX_WORDS) -> str:
    """Lowercase, replace `.!"()*#:;~` with spaces and keep the first `max_words` words."""
    caption = _PUNCTUATION.sub(" ", caption.lower())
    caption = _SPACES.sub(" ", caption).rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:max_words])
