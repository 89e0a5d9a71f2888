"""Benchmark parts of the project against baselines; print a table and one JSON line per row."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.entry import ClusterSize, Job, main
from jobs.settings import CommandLine
from pipelines.bench.config import BenchConfig

EXTRA_CPUS = 3
"""CPUs of a local cluster beyond the machine's cores. Training workers that only count clips use
none, and a driver uses little."""
OBJECT_STORE_BYTES = 2 * 1024**3
"""The default object store of 300 MB would slow down data workers with batches of 77 MB."""


def _cluster(config: BenchConfig) -> ClusterSize:
    return ClusterSize(
        cpus=(os.cpu_count() or 1) + EXTRA_CPUS, object_store_bytes=OBJECT_STORE_BYTES
    )


def _missed_gates(config: BenchConfig, rows: Sequence[Mapping[str, Any]]) -> str | None:
    if not config.check:
        return None
    if config.compare is not None:
        worse = [str(row["name"]) for row in rows if not row["ok"]]
        return f"worse than in {config.compare[0]}: {', '.join(worse)}" if worse else None
    from pipelines.bench.gates import failed_check

    return failed_check(config, rows)


JOB = Job(
    name="bench",
    summary=(__doc__ or "").splitlines()[0],
    command_line=CommandLine(BenchConfig, __doc__ or ""),
    target="pipelines.bench.run:run_bench",
    cluster=_cluster,
    verdict=_missed_gates,
)

if __name__ == "__main__":
    main(JOB)
