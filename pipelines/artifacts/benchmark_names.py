"""Names of the retrieval benchmarks."""

from __future__ import annotations

from typing import Literal

BenchmarkName = Literal["msrvtt", "msrvtt_full", "didemo", "lsmdc", "msvd", "msvd_670", "any"]

PUBLISHED_FRAMES = 8
"""Number of frames per clip in the published evaluation."""

PUBLISHED_CANDIDATES = 32
"""Number of candidates per caption, and per video, that the published evaluation reranks on each of
the four benchmarks."""
