"""Settings for benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from tyro.conf import Positional

from stgt.field_marks import Common

BenchName = Literal[
    "graph",
    "rerank",
    "decode",
    "spans",
    "ingest",
    "fetch",
    "cutting",
    "store",
    "plan",
    "feed",
    "recovery",
    "score",
    "sweep",
]
NAMES: tuple[BenchName, ...] = get_args(BenchName)


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Which benchmarks to run, and how."""

    names: Annotated[Positional[tuple[BenchName, ...]], Common("benchmarks")] = NAMES
    """Benchmarks to run. By default all of them run."""
    device: Annotated[Literal["cpu", "cuda"], Common("benchmarks")] = "cpu"
    """Device for benchmarks of the model."""
    repeats: Annotated[int, Common("benchmarks")] = 3
    """Number of measured runs per benchmark. Results are medians over these runs."""
    check: Annotated[bool, Common("benchmarks")] = False
    """Exit with code 1 if a target is missed."""
