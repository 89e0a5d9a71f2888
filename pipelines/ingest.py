"""Manifest -> Ray Data -> clip store and quarantine; restarted, it goes on with what is left.

The driver plans shards, hands their numbers to decoding workers (`ingest_worker`), and once all are
there writes the catalogue and the report. What grows with the number of clips stays in files.
"""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import ray
import ray.data
import tenacity
from ray.data import ActorPoolStrategy
from ray.util.queue import Queue

from pipelines import decode, faults, filters, histograms, storage
from pipelines.clips import (
    CATALOGUE,
    STORE,
    ShardRecord,
    default_quarantine,
    finished_shards,
    shard_name,
)
from pipelines.config import FilterConfig, IngestConfig, fingerprint, to_dict
from pipelines.ingest_report import RunFigures, write_report
from pipelines.ingest_worker import ShardIngester, ShardWork
from pipelines.manifest import check_manifest
from pipelines.progress import PartsProgress, ProgressChannel, duration
from pipelines.tracking import Run
from pipelines.verify import verify_store
from stgt.errors import ClipStoreError

logger = logging.getLogger(__name__)

LEAST_SHARDS = 16
LEAST_CLIPS_PER_SHARD = 32
MOST_BLOCKS = 1000
"""Blocks of the data set of shards: with more, Ray spends its time on keeping count of them."""
CLUSTER_ATTEMPTS = 4
MLFLOW_RUN = "mlflow_run.json"
OURS = re.compile(r"\.?\d+(\.r\d+)?\.(parquet|json\..*\.tmp|parquet\..*\.tmp)$")
"""Names of shards, and of files that were being written when their writer was killed."""


class IngestSummary(TypedDict):
    """What `run_ingest` made, or found."""

    store: str
    report: str
    clips: int
    quarantined: int
    salvaged: int
    reasons: dict[str, int]
    bytes: int
    clips_per_s: float | None
    seconds: float


@dataclass(frozen=True)
class _Plan:
    """What is to be made, and where."""

    config: IngestConfig
    manifest: str
    store: str
    quarantine: str
    total: int
    """Clips of the store and its quarantine together."""
    manifest_clips: int
    edges: npt.NDArray[np.int64]

    @property
    def num_shards(self) -> int:
        return len(self.edges) - 1

    def rows_of(self, shards: list[int]) -> int:
        """Clips of some shards."""
        return int((self.edges[1:] - self.edges[:-1])[shards].sum())


def store_uri(config: IngestConfig) -> str:
    """The folder of the store that a config makes: its name is a hash of how clips are chosen."""
    settings = to_dict(config.sampling)
    if config.filters != FilterConfig():
        settings = {"sampling": settings, "filters": to_dict(config.filters)}
    name = fingerprint(settings) + ("" if config.limit is None else f"-first-{config.limit}")
    return storage.join(storage.resolve(config.output), name)


def _plan(config: IngestConfig) -> _Plan:
    manifest, store = storage.resolve(config.manifest), store_uri(config)
    manifest_clips = check_manifest(manifest)
    total = min(manifest_clips, config.limit or manifest_clips)
    # Few clips are divided further, so that all workers have some.
    fewest = min(LEAST_SHARDS, total // LEAST_CLIPS_PER_SHARD)
    num_shards = max(1, fewest, round(total / config.clips_per_shard))
    return _Plan(
        config=config,
        manifest=manifest,
        store=store,
        quarantine=default_quarantine(store)
        if config.quarantine is None
        else storage.join(storage.resolve(config.quarantine), storage.name_of(store)),
        total=total,
        manifest_clips=manifest_clips,
        edges=np.linspace(0, total, num_shards + 1).astype(np.int64),
    )


def run_ingest(config: IngestConfig, parent_id: str | None = None) -> IngestSummary:
    """Make the clip store of a manifest, or finish one that was begun.

    With `verify` a finished store is checked, with `retry_quarantined` clips in quarantine are
    tried again; nothing else is done then.

    Args:
        config: what to make.
        parent_id: MLflow run that this one is shown under.

    Raises:
        ManifestError: the manifest cannot be used.
        STGTError: another process is at work on the store.
        ClipStoreError: the folder holds another store, no clip is usable, the share of bad clips is
            above the limit (finished shards are kept), or a store that is verified is not right.
    """
    started = time.monotonic()
    retry = _reasons_to_retry(config)
    plan = _plan(config)
    if config.verify or retry is not None:
        _require_finished(plan, "verified" if config.verify else "retried")
    with storage.lock(plan.store):
        _claim_store(plan)
        if config.verify:
            expected = _catalogue_of_records(plan)
            catalogue = verify_store(
                plan.store, plan.quarantine, plan.manifest, plan.edges, expected
            )
            logger.info(
                "verified: %d clips in %d shards, %d in quarantine; nothing missing or changed",
                catalogue["clips"],
                plan.num_shards,
                catalogue["quarantined"],
            )
            return _summary(plan, catalogue, None, started)
        catalogue_uri = storage.join(plan.store, CATALOGUE)
        if retry is None and storage.exists(catalogue_uri):
            logger.info("the store is finished already; --verify checks it")
            return _summary(plan, storage.read_json(catalogue_uri), None, started)
        record = storage.join(plan.store, MLFLOW_RUN)
        run = Run.open(config.tracking, config.name, record, parent_id)
        try:
            run.log_config(to_dict(config))
            catalogue, rate = _make(plan, retry, run)
        except BaseException:
            run.finish(succeeded=False)
            raise
        run.finish(succeeded=True)
    return _summary(plan, catalogue, rate, started)


def _reasons_to_retry(config: IngestConfig) -> frozenset[str] | None:
    """Reasons whose clips are tried again; without names, all that are not a filter's."""
    if config.retry_quarantined is None:
        return None
    return frozenset(config.retry_quarantined or decode.REASONS)


def _require_finished(plan: _Plan, what: str) -> None:
    if not storage.exists(storage.join(plan.store, STORE)):
        raise ClipStoreError(
            f"{plan.store} holds no store that could be {what}; give the manifest, output and "
            "sampling that it was made with"
        )


def _claim_store(plan: _Plan) -> None:
    """Write what the store is made of, or check that it is the same as before."""
    identity = {
        "sampling": to_dict(plan.config.sampling),
        "filters": to_dict(plan.config.filters),
        "manifest_sha256": storage.digest(plan.manifest),
        "clips": plan.total,
        "shards": plan.num_shards,
        "quarantine": None if plan.config.quarantine is None else plan.quarantine,
    }
    uri = storage.join(plan.store, STORE)
    if not storage.exists(uri):
        storage.write_json(uri, identity)
        return
    found = storage.read_json(uri)
    differing = [name for name in identity if found.get(name) != identity[name]]
    if "manifest_sha256" in differing:
        differing = ["manifest"]  # what follows from it need not be named
    if differing:
        raise ClipStoreError(
            f"{plan.store} holds a store of another {', '.join(differing)}; "
            "choose another output folder, or delete this one"
        )


def _make(
    plan: _Plan, retry: frozenset[str] | None, run: Run
) -> tuple[dict[str, Any], float | None]:
    """Do what is left to do, and write catalogue and report; gives the former and clips a second.

    Raises:
        ClipStoreError: no clip is usable, or too many are bad.
    """
    started = time.monotonic()
    catalogue_uri = storage.join(plan.store, CATALOGUE)
    was_finished = storage.exists(catalogue_uri)
    records = finished_shards(plan.store)
    pending = [shard for shard in range(plan.num_shards) if shard not in records]
    work = ShardWork(
        config=plan.config, store=plan.store, quarantine=plan.quarantine, edges=plan.edges
    )
    rate = None
    if pending:
        if records:
            logger.info(
                "ingest goes on: %d of %d shards are finished", len(records), plan.num_shards
            )
        rate = _run_workers("ingest", plan, work, pending, plan.rows_of(pending), records)
    if retry is not None:
        due = [shard for shard, record in records.items() if retry & record["reasons"].keys()]
        count = sum(records[shard]["reasons"].get(reason, 0) for shard in due for reason in retry)
        logger.info("%d clips are tried again", count)
        # Until all is done the store is unfinished: nobody reads it with another's counts.
        storage.remove(catalogue_uri)
        # Its rate is not the ingest's: the report keeps the figures of the run that decoded all.
        _run_workers("retry", plan, replace(work, retry=retry), due, count, {})
    records = finished_shards(plan.store)
    if plan.config.filters.unique_captions or plan.config.filters.unique_videos:
        found = filters.duplicates(plan.store, records, plan.config.filters)
        count = sum(map(len, found.values()))
        _run_workers("duplicates", plan, replace(work, duplicates=found), list(found), count, {})
        records = finished_shards(plan.store)
    catalogue = _catalogue(plan, records)
    _remove_leftovers(plan, records)
    figures = RunFigures(
        seconds=time.monotonic() - started,
        clips=plan.rows_of(pending),
        clips_per_s=rate,
        workers=_num_workers(plan.config),
        manifest_clips=plan.manifest_clips,
    )
    write_report(plan.store, plan.quarantine, catalogue, figures, run)
    if not was_finished:
        _refuse_bad(plan, catalogue)  # a finished store was accepted, and can only get better
    storage.write_json(catalogue_uri, catalogue)
    return catalogue, rate


def _num_workers(config: IngestConfig) -> int:
    return config.num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))


def _run_workers(
    label: str,
    plan: _Plan,
    work: ShardWork,
    shards: list[int],
    count: int,
    finished: dict[int, ShardRecord],
) -> float | None:
    """Have workers do some shards, `count` clips of them; gives clips a second."""
    if not shards:
        return None
    done = sum(record["clips"] + record["quarantined"] for record in finished.values())
    bad = sum(_num_bad(record["reasons"]) for record in finished.values())
    progress = PartsProgress(label, done + count, "clips", done, bad)
    # Ray replaces lost workers by itself; what a lost node took along with it (results that were
    # not read yet, say) may all the same end its data set. Shards are in storage by then.
    patience = tenacity.Retrying(
        retry=tenacity.retry_if_exception(faults.is_of_the_cluster),
        stop=tenacity.stop_after_attempt(CLUSTER_ATTEMPTS),
        wait=tenacity.wait_random(1, 5),
        before_sleep=tenacity.before_sleep_log(logger, logging.WARNING),
        reraise=True,
    )
    with ProgressChannel(progress) as channel:
        patience(_work_through, plan, work, shards, channel.queue)
    return progress.rate()


def _work_through(plan: _Plan, work: ShardWork, shards: list[int], progress: Queue) -> None:
    """One data set of Ray's over some shards; workers pass over those that are made already."""
    made = ray.data.from_items(
        [{"shard": shard} for shard in shards],
        override_num_blocks=min(len(shards), MOST_BLOCKS),
    ).map_batches(
        ShardIngester,
        fn_constructor_args=(work, progress),
        batch_size=1,
        compute=ActorPoolStrategy(size=min(_num_workers(plan.config), len(shards))),
        num_cpus=1,
    )
    for _ in faults.rows(made):
        pass  # shards are written by the workers; rows only say that they are


def _num_bad(reasons: dict[str, int]) -> int:
    """Clips that cannot be used; those that a filter left out are not among them."""
    return sum(count for reason, count in reasons.items() if reason not in filters.REASONS)


def _catalogue_of_records(plan: _Plan) -> dict[str, Any] | None:
    """What the catalogue has to be; None when a shard has no record."""
    records = finished_shards(plan.store)
    if set(range(plan.num_shards)) - records.keys():
        return None
    return _catalogue(plan, records)


def _catalogue(plan: _Plan, records: dict[int, ShardRecord]) -> dict[str, Any]:
    shards = [records[shard] for shard in range(plan.num_shards)]
    reasons: Counter[str] = Counter()
    for record in shards:
        reasons.update(record["reasons"])
    return {
        "sampling": to_dict(plan.config.sampling),
        "filters": to_dict(plan.config.filters),
        "clips": sum(record["clips"] for record in shards),
        "quarantined": sum(record["quarantined"] for record in shards),
        "bad": _num_bad(reasons),
        "salvaged": sum(record["salvaged"] for record in shards),
        "bytes": sum(record["bytes"] for record in shards),
        "reasons": dict(sorted(reasons.items())),
        "histograms": histograms.add([record["histograms"] for record in shards]),
        "digest": storage.digest_of("".join(record["sha256"] for record in shards).encode()),
        "shards": [
            {name: value for name, value in record.items() if name != "histograms"}
            for record in shards
        ],
    }


def _refuse_bad(plan: _Plan, catalogue: dict[str, Any]) -> None:
    """Fail when nothing is usable or too much is not."""
    clips, quarantined, bad = (catalogue[name] for name in ("clips", "quarantined", "bad"))
    said = ", ".join(
        f"{count} {reason}"
        for reason, count in sorted(catalogue["reasons"].items(), key=lambda one: -one[1])
    )
    where = plan.quarantine
    if clips == 0:
        check = " and check that the videos are where the manifest says" if bad else ""
        raise ClipStoreError(
            f"none of {quarantined} clips can be used ({said}); see {where}{check}"
        )
    limit = plan.config.max_bad_fraction
    if bad / (clips + quarantined) > limit:
        raise ClipStoreError(
            f"{bad} of {clips + quarantined} clips are bad ({said}), more than max_bad_fraction = "
            f"{limit:g} allows; see {where}, mend the videos and run again with "
            "--retry-quarantined, or raise the limit and run again"
        )


def _remove_leftovers(plan: _Plan, records: dict[int, ShardRecord]) -> None:
    """Delete what killed workers and replaced shards left behind."""
    kept = {shard_name(shard, record["revision"]) for shard, record in records.items()}
    for folder in (storage.join(plan.store, "shards"), plan.quarantine):
        for name in storage.list_names(folder):
            if name not in kept and OURS.match(name):
                storage.remove(storage.join(folder, name))


def _summary(
    plan: _Plan, catalogue: dict[str, Any], rate: float | None, started: float
) -> IngestSummary:
    if plan.config.limit is not None and rate:
        share = plan.manifest_clips / plan.total
        logger.info(
            "the whole manifest, %s clips, would take about %s and %.1f GB",
            f"{plan.manifest_clips:,}",
            duration(plan.manifest_clips / rate),
            catalogue["bytes"] * share / 1e9,
        )
    return IngestSummary(
        store=plan.store,
        report=storage.join(plan.store, "report.html"),
        clips=catalogue["clips"],
        quarantined=catalogue["quarantined"],
        salvaged=catalogue["salvaged"],
        reasons=catalogue["reasons"],
        bytes=catalogue["bytes"],
        clips_per_s=None if rate is None else round(rate, 2),
        seconds=round(time.monotonic() - started, 1),
    )
