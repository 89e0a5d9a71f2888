"""Measure ours beside a baseline, in the same run: a table, and one JSON line a row."""

import importlib
import json
import logging
import os
import sys
from dataclasses import dataclass
from typing import Literal

import tyro

from jobs.entry import EXIT_FAILED, quieten, start_ray
from pipelines.bench.harness import Row

PROG = "python -m jobs.bench"
Name = Literal["graph", "rerank", "decode", "ingest", "store", "plan", "feed", "recovery", "score"]
NAMES: tuple[Name, ...] = (
    "graph",
    "rerank",
    "decode",
    "ingest",
    "store",
    "plan",
    "feed",
    "recovery",
    "score",
)
ON_RAY = ("ingest", "plan", "feed", "recovery")

MOST_WORKERS = 3
"""CPUs that a local Ray counts beyond those there are: training workers that only count take none,
and a driver little."""
OBJECT_STORE_BYTES = 2 * 1024**3
"""A local store of the usual 300 MB holds back data workers whose batches are 77 MB."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure and where."""

    names: tyro.conf.Positional[tuple[Name, ...]] = NAMES
    """Measurements; without a name, all of them."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the work runs."""
    repeats: int = 3
    """Runs of each that count; the figures are medians."""
    check: bool = False
    """Leave with exit code 1 when a target is missed."""


def main() -> None:
    """Run the benchmark job."""
    config = tyro.cli(BenchConfig, prog=PROG, description=__doc__)
    quieten()
    rows = [row for name in config.names for row in _measure(name, config)]
    logger.info("on %s\n%s", _where(config.device), _table(rows))
    for row in rows:
        print(json.dumps(row.to_dict()), flush=True)
    if config.check and not all(row.ok for row in rows):
        sys.exit(EXIT_FAILED)


def connect() -> None:
    """Join or start Ray, in whichever process a measurement needs it."""
    quieten()
    start_ray(cpus=(os.cpu_count() or 1) + MOST_WORKERS, object_store_bytes=OBJECT_STORE_BYTES)


def _measure(name: Name, config: BenchConfig) -> list[Row]:
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device is here; leave out --device cuda", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    logger.info("%s: measuring", name)
    module = importlib.import_module(f"pipelines.bench.{name}")
    if name in ON_RAY:
        return module.measure(config.repeats, connect)
    return module.measure(config.device, config.repeats)


def _where(device: str) -> str:
    import torch

    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}"


def _table(rows: list[Row]) -> str:
    lines = [f"{'':20}{'ours':>14}{'baseline':>14}{'ratio':>9}  target"]
    lines += [
        f"{row.name:20}{row.ours:>14.4g}{row.baseline:>14.4g}{row.ratio:>9.3g}  {row.target}"
        f"{'' if row.ok else '  MISSED'}   ({row.unit})"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
