"""Names of the retrieval benchmarks."""

from __future__ import annotations

from typing import Literal

BenchmarkName = Literal["msrvtt", "msrvtt_full", "didemo", "lsmdc", "msvd", "msvd_670", "any"]

PUBLISHED_FRAMES = 8
