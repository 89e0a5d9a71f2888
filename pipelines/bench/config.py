"""Settings for benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from tyro.conf import Positional

from pipelines.common.config import require
from stgt.field_marks import Common, FieldMark

BenchName = Literal[
    "graph",
    "rerank",
    "train_step",
    "features",
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
    "growth",
    "end_to_end",
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
    growth_sizes: Annotated[Literal["full", "small"], Common("benchmarks")] = "full"
    """Sizes of the benchmark growth. Small ones take seconds and show only that it works."""
    output: Annotated[str, Common("results"), FieldMark.LOCATION] = "bench-output"
    """Folder for results. Each run adds a folder to it, with all values (run.json) and a page
    (report.html)."""
    compare: Annotated[tuple[str, str] | None, Common("results"), FieldMark.LOCATION] = None
    """Two finished runs to compare instead of running benchmarks: folders of an output folder, or
    their run.json."""
    check: Annotated[bool, Common("gates")] = False
    """Exit with code 1 if a gate is missed or, with --compare, if the second run is worse."""
    gates: Annotated[str | None, Common("gates"), FieldMark.LOCATION] = None
    """YAML file that says what each row must reach. None takes the gates of the project, which were
    written for two CPU cores."""

    def __post_init__(self) -> None:
        require(self.repeats >= 1, "repeats", self.repeats, "must be at least 1")
        require(len(self.names) >= 1, "names", self.names, "must name at least one benchmark")
        repeated = len(set(self.names)) < len(self.names)
        require(not repeated, "names", self.names, "must not name a benchmark twice")
