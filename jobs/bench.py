"""Measure parts of the project beside a baseline: a table, and one JSON line per row."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.entry import ClusterSize, Job, main
from jobs.settings import CommandLine
from pipelines.bench.config import BenchConfig

MOST_WORKERS = 3
"""CPUs of a local cluster beyond those of the machine: training workers that only count take none,
and a driver little."""
OBJECT_STORE_BYTES = 2 * 1024**3
"""An object store of the usual 300 MB holds back data workers whose batches are 77 MB."""


def _cluster(config: BenchConfig) -> ClusterSize:
    return ClusterSize(
        cpus=(os.cpu_count() or 1) + MOST_WORKERS, object_store_bytes=OBJECT_STORE_BYTES
    )


def _missed_targets(config: BenchConfig, rows: Sequence[Mapping[str, Any]]) -> str | None:
    missed = [str(row["name"]) for row in rows if not row["ok"]]
    return f"targets missed: {', '.join(missed)}" if config.check and missed else None


JOB = Job(
    name="bench",
    summary=(__doc__ or "").splitlines()[0],
    command_line=CommandLine(BenchConfig, __doc__ or ""),
    target="pipelines.bench.run:run_bench",
    cluster=_cluster,
    verdict=_missed_targets,
)

if __name__ == "__main__":
    main(JOB)
