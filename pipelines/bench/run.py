"""Runs benchmarks against their baselines and logs the results as a table."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from pipelines.bench.config import BenchConfig, BenchName
from pipelines.bench.harness import Row
from stgt.errors import SettingError

ON_RAY: frozenset[BenchName] = frozenset({"ingest", "fetch", "plan", "feed", "recovery", "sweep"})
"""Benchmarks that start Ray, in this process or in a child."""

logger = logging.getLogger(__name__)


def run_bench(
    config: BenchConfig, connect: Callable[[BenchConfig], None]
) -> list[Mapping[str, Any]]:
    """Run benchmarks and log a table of their rows.

    Args:
        config: Which benchmarks to run.
        connect: Starts or joins Ray. Called in every process that needs Ray.

    Returns:
        One mapping per row. `ok` is true if the row meets its target.

    Raises:
        SettingError: The device is not available.
    """
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise SettingError("device = 'cuda': no CUDA device was found; omit --device cuda")
    rows = [row for name in config.names for row in _measure(name, config, connect)]
    logger.info("on %s\n%s", _device_name(config.device), _table(rows))
    return [row.to_dict() for row in rows]


def _measure(
    name: BenchName, config: BenchConfig, connect: Callable[[BenchConfig], None]
) -> list[Row]:
    logger.info("%s: measuring", name)
    module = importlib.import_module(f"pipelines.bench.{name}")
    if name in ON_RAY:
        return module.measure(config.repeats, functools.partial(connect, config))
    return module.measure(config.device, config.repeats)


def _device_name(device: str) -> str:
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
