"""Progress of the ingest workers, in log lines and in metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.common import metrics
from pipelines.common.progress import PartsProgress


class ShardsProgress(PartsProgress):
    """Progress of work on shards. Its methods are called with what the workers send.

    A shard that is begun again, because its worker was lost, counts only from where it was before.
    """

    def __init__(
        self, work: str, total: int, done: int, bad: int, *, run: str, num_workers: int
    ) -> None:
        """Begin the progress.

        Args:
            work: Name of the work, such as `ingest` or `retry`.
            total: Number of clips of finished shards and of those to process.
            done: Number of clips of finished shards.
            bad: Number of unusable clips of finished shards.
            run: Name of the run, a label of its metrics.
            num_workers: Number of workers that do the work.
        """
        super().__init__(work, total, "clips", done, bad)
        self.has_begun = False
        """Whether a worker has begun a shard."""
        self._labels = {"run": run, "work": work}
        self._num_workers = num_workers
        self._num_started = 0
        self._counted: dict[tuple[int, str], int] = {}
        self.gauges.set(metrics.INGEST_RESTARTS, 0, **self._labels)

    def reach_shard(self, shard: int, done: int, bad: int, quarantined: Mapping[str, int]) -> None:
        """Set the numbers of finished and bad clips of a shard, and those in quarantine by reason.

        Clips that filters exclude are in quarantine without being bad.
        """
        self.has_begun = True
        self.reach_part(shard, done, bad)
        metrics.INGEST_CLIPS.add(self._rise(shard, "", done), **self._labels)
        for reason, count in quarantined.items():
            rise = self._rise(shard, reason, count)
            metrics.INGEST_QUARANTINED.add(rise, reason=reason, **self._labels)

    def wrote(self, size_bytes: int) -> None:
        """Note that a worker has written a shard of this size."""
        metrics.INGEST_STORE_BYTES.add(size_bytes, **self._labels)

    def started(self) -> None:
        """Note that a worker has started. More starts than workers are restarts."""
        self._num_started += 1
        restarts = max(0, self._num_started - self._num_workers)
        self.gauges.set(metrics.INGEST_RESTARTS, restarts, **self._labels)

    def _rise(self, shard: int, reason: str, count: int) -> int:
        """Return by how much a count of a shard exceeds its highest value so far."""
        before = self._counted.get((shard, reason), 0)
        self._counted[shard, reason] = max(before, count)
        return max(0, count - before)
