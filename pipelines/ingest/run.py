"""Ingests a manifest into a clip store and a quarantine. A restart only makes missing shards.

The driver plans shards, passes their numbers to decoding workers (`worker`), and writes the
catalogue and the report when all shards are finished. It never holds all clips in memory.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, TypedDict

from pipelines.artifacts.caption_similarity import FOLDER as SIMILARITIES
from pipelines.artifacts.clip_store import (
    CATALOGUE,
    STORE,
    finished_shards,
    manifest_uri,
    members_uri,
    shard_name,
)
from pipelines.artifacts.frame_hashes import FOLDER as HASHES
from pipelines.common import storage, tracking
from pipelines.common.config import to_dict
from pipelines.common.output_folder import RUN, write_config
from pipelines.common.progress import duration
from pipelines.common.provenance import About, DatasetInput
from pipelines.common.recording import Recording
from pipelines.ingest import filters
from pipelines.ingest.claim import claim_store
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.plan import IngestPlan, plan_ingest
from pipelines.video import decoder
from stgt.errors import ClipStoreError

logger = logging.getLogger(__name__)

SHARD_FILE = re.compile(r"\.?\d+(\.r\d+)?\.(parquet|json\..*\.tmp|parquet\..*\.tmp)$")
"""Names of shards, and of temporary files left behind by a killed worker."""
MANIFEST_FILE = re.compile(r"\.?(manifest|members)(\.g\d+)?\.parquet(\..*\.tmp)?$")
"""Names of copies of the manifest, of files of members, and of their temporary files."""
FEWEST_BAD = 10
"""Number of bad clips among those added to a finished store that never fails the run."""


class IngestSummary(TypedDict):
    """Result of `run_ingest`."""

    store: str
    report: str
    clips: int
    quarantined: int
    salvaged: int
    reasons: dict[str, int]
    bytes: int
    clips_per_s: float | None
    seconds: float


def run_ingest(
    config: IngestConfig,
    parent_id: str | None = None,
    connect: Callable[[IngestConfig], None] | None = None,
) -> IngestSummary:
    """Make the clip store of a manifest, finish an interrupted one, or follow a changed manifest.

    With `verify`, only check a finished store. With `retry_quarantined`, only retry clips in
    quarantine.

    Args:
        config: What to make.
        parent_id: MLflow run that becomes the parent of this one.
        connect: Called once before Ray is needed, after all checks that do not need Ray.

    Raises:
        ManifestError: The manifest cannot be used.
        STGTError: Another process is working on the store.
        ClipStoreError: The folder holds another store, too many clips would leave it, no clip is
            usable, the fraction of bad clips exceeds the limit (finished shards are kept), or the
            store failed verification.
    """
    started = time.monotonic()
    config = replace(config, tracking=tracking.resolve(config.tracking))
    retry = _reasons_to_retry(config)
    plan = plan_ingest(config)
    if config.verify or retry is not None:
        _require_finished(plan, "verified" if config.verify else "retried")
    with storage.lock(plan.store):
        plan = claim_store(plan)
        if config.verify:
            from pipelines.ingest.verify import verify_store
            from pipelines.ingest.workers import catalogue_of_records

            if connect is not None:
                connect(config)
            expected = catalogue_of_records(plan)
            catalogue = verify_store(
                plan.store, plan.quarantine, plan.manifest, plan.rows, plan.generation, expected
            )
            logger.info(
                "verified: %d clips in %d shards, %d in quarantine; nothing is missing or changed",
                catalogue["clips"],
                plan.num_shards,
                catalogue["quarantined"],
            )
            return _summary(plan, catalogue, None, started)
        catalogue_uri = storage.join(plan.store, CATALOGUE)
        recording = Recording(
            config.tracking,
            config.name,
            storage.join(plan.store, RUN),
            to_dict(plan.config),
            parent_id,
            meanwhile=f"the ingest continues and its results are kept in {plan.store}; they will "
            "be sent once MLflow can be used",
            about=_about(plan),
        )
        finished = None
        if retry is None and storage.exists(catalogue_uri):
            catalogue = storage.read_json(catalogue_uri)
            finished = catalogue if _is_current(catalogue, plan) else None
        if finished is not None:
            if plan.generations:
                _remove_leftovers(plan, finished["shards"])
            logger.info("the store is already finished; use --verify to check it")
            if recording.is_pending:
                _deliver(plan, finished, recording)
                recording.finish_marked()
            return _summary(plan, finished, None, started)
        if retry is None:
            write_config(plan.store, "ingest", plan.config)
        recording.mark_pending()
        with recording.running(lambda: None if connect is None else connect(config)):
            catalogue, rate = _make(plan, retry, recording)
        recording.finish_marked()
    return _summary(plan, catalogue, rate, started)


def _about(plan: IngestPlan) -> About:
    """Return what MLflow is told about an ingest."""
    digest = str(storage.read_json(storage.join(plan.store, STORE))["manifest_sha256"])
    sampling = plan.config.sampling
    return About(
        job="ingest",
        summary=f"Decodes the clips of a manifest into a clip store: {plan.total:,} clips in "
        f"{plan.num_shards:,} shards, {sampling.num_frames} frames of {sampling.size} x "
        f"{sampling.size} pixels each. Clips that cannot be used are in quarantine, with reasons. "
        f"The store, its report and its settings are in `{plan.store}`.",
        datasets=(DatasetInput(plan.manifest, "manifest", digest, "ingest", plan.manifest_clips),),
        fingerprints={"manifest": digest},
    )


def _reasons_to_retry(config: IngestConfig) -> frozenset[str] | None:
    """Return the reasons to retry: those given or, if the list is empty, all except filters."""
    if config.retry_quarantined is None:
        return None
    reasons = frozenset[str](config.retry_quarantined or decoder.REASONS)
    # Which of several near duplicates stays may depend on the clips that return.
    near = config.filters.near_duplicates is not None
    return reasons | {"near_duplicate"} if near else reasons


def _require_finished(plan: IngestPlan, what: str) -> None:
    if not storage.exists(storage.join(plan.store, STORE)):
        raise ClipStoreError(
            f"{plan.store} holds no store that could be {what}; pass the same manifest, output "
            "and sampling that it was made with"
        )


def _make(
    plan: IngestPlan, retry: frozenset[str] | None, recording: Recording
) -> tuple[dict[str, Any], float | None]:
    """Do the remaining work, write catalogue and report, and return the catalogue.

    Also returns the rate in clips per second, or None if no shard was left to make.

    Raises:
        ClipStoreError: No clip is usable, or too many are bad.
    """
    # Ray Data loads slowly, so it is imported only after the settings are checked.
    from pipelines.ingest.report import RunFigures, write_report
    from pipelines.ingest.worker import ShardWork
    from pipelines.ingest.workers import catalogue_of, num_workers, run_workers, with_captions

    started = time.monotonic()
    catalogue_uri = storage.join(plan.store, CATALOGUE)
    earlier = storage.read_json(catalogue_uri) if storage.exists(catalogue_uri) else None
    was_finished = earlier is not None and _is_current(earlier, plan)
    records = finished_shards(plan.store)
    pending = [shard for shard in range(plan.num_shards) if shard not in records]
    outdated = [
        shard
        for shard, record in sorted(records.items())
        if record.get("generation", 0) < plan.due[shard]
    ]
    work = ShardWork(
        config=plan.config,
        store=plan.store,
        quarantine=plan.quarantine,
        rows=plan.rows,
        generation=plan.generation,
        again=tuple(frozenset(one["again"]) for one in plan.generations),
        listed=_revisions(earlier),
    )
    rate = None
    if pending or outdated:
        finished = {shard: records[shard] for shard in records.keys() - set(outdated)}
        if records and plan.generation == 0:
            logger.info(
                "ingest resumes: %d of %d shards are finished", len(records), plan.num_shards
            )
        shards = pending + outdated
        rate = run_workers("ingest", plan, work, shards, plan.rows_of(shards), finished)
        if outdated:
            rate = None  # rewriting a shard takes far less time per clip than decoding
    records = finished_shards(plan.store)
    if retry is not None:
        due = [shard for shard, record in records.items() if retry & record["reasons"].keys()]
        count = sum(records[shard]["reasons"].get(reason, 0) for shard in due for reason in retry)
        logger.info("retrying %d clips", count)
        # Without a catalogue the store counts as unfinished, so nobody reads outdated counts.
        storage.remove(catalogue_uri)
        work = replace(work, listed={})
        # The rate is ignored: the report keeps the figures of the run that decoded all clips.
        run_workers("retry", plan, replace(work, retry=retry), due, count, {})
        records = finished_shards(plan.store)
    asked = plan.config.filters
    if asked.min_similarity is not None:
        from pipelines.ingest.similarity import dissimilar

        # Before duplicates, so that a clip that leaves does not take another one with it.
        found = dissimilar(plan, records)
        count = sum(map(len, found.values()))
        run_workers("low similarity", plan, replace(work, rejected=found), list(found), count, {})
        records = finished_shards(plan.store)
    if asked.unique_captions or asked.unique_videos or asked.near_duplicates is not None:
        in_order = plan.generation == 0
        found = filters.duplicates(
            plan.store, records, asked, plan.config.sampling, in_order=in_order
        )
        count = sum(map(len, found.values()))
        run_workers("duplicates", plan, replace(work, rejected=found), list(found), count, {})
        records = finished_shards(plan.store)
    catalogue = catalogue_of(plan, with_captions(plan, records))
    figures = RunFigures(
        seconds=time.monotonic() - started,
        clips=plan.rows_of(pending),
        clips_per_s=rate,
        workers=num_workers(plan.config),
        manifest_clips=plan.manifest_clips,
    )
    write_report(plan.store, plan.quarantine, catalogue, plan.generations, figures)
    _deliver(plan, catalogue, recording)
    if not was_finished:
        _refuse_bad(plan, catalogue)  # a finished store has passed, and retries only improve it
    is_read = storage.exists(catalogue_uri)
    if not is_read:
        _remove_leftovers(plan, catalogue["shards"])
    storage.write_json(catalogue_uri, catalogue)
    if is_read:  # until now, readers may have needed what the old catalogue lists
        _remove_leftovers(plan, catalogue["shards"])
    return catalogue, rate


def _deliver(plan: IngestPlan, catalogue: dict[str, Any], recording: Recording) -> None:
    """Send the report and the store's fingerprint to MLflow."""
    from pipelines.ingest.report import deliver_report

    deliver_report(plan.store, recording)
    # Trainings and evaluations on the store have the same fingerprint.
    tags = {"fingerprint.store": str(catalogue["digest"]), "store": plan.store}
    recording.deliver(lambda run: run.set_tags(tags))


def _is_current(catalogue: dict[str, Any], plan: IngestPlan) -> bool:
    """Return whether a catalogue is that of the present manifest."""
    return catalogue.get("generation", 0) == plan.generation


def _revisions(catalogue: dict[str, Any] | None) -> dict[int, int]:
    """Return the revision of each shard that readers of a catalogue use."""
    shards = () if catalogue is None else catalogue["shards"]
    return {shard["shard"]: shard.get("revision", 0) for shard in shards}


def _refuse_bad(plan: IngestPlan, catalogue: dict[str, Any]) -> None:
    """Raise an error if no clip is usable or too many are bad, overall or among added clips."""
    from pipelines.ingest.workers import num_bad

    clips, quarantined, bad = (catalogue[name] for name in ("clips", "quarantined", "bad"))
    said = ", ".join(
        f"{count} {reason}"
        for reason, count in sorted(catalogue["reasons"].items(), key=lambda one: -one[1])
    )
    where = plan.quarantine
    if clips == 0:
        check = " and check the video paths in the manifest" if bad else ""
        raise ClipStoreError(
            f"none of {quarantined} clips can be used ({said}); see {where}{check}"
        )
    limit = plan.config.max_bad_fraction
    advice = (
        f"more than max_bad_fraction = {limit:g} allows; see {where}, then repair the videos and "
        "run again with --retry-quarantined, or raise the limit and run again"
    )
    if bad / (clips + quarantined) > limit:
        raise ClipStoreError(f"{bad} of {clips + quarantined} clips are bad ({said}), {advice}")
    if plan.generation == 0:
        return
    # Otherwise, a wrong path to the added videos would go unnoticed in a large store.
    added = catalogue["shards"][plan.generations[-2]["shards"] :]
    total = sum(shard["clips"] + shard["quarantined"] for shard in added)
    bad = sum(num_bad(shard["reasons"]) for shard in added)
    if bad >= FEWEST_BAD and bad / total > limit:
        raise ClipStoreError(
            f"{bad} of the {total} clips that were added are bad, {advice}; until then, the store "
            "can be read without the added clips"
        )


def _remove_leftovers(plan: IngestPlan, shards: Collection[dict[str, Any]]) -> None:
    """Delete what the catalogue does not list: replaced revisions, and files of killed workers."""
    kept = {shard_name(shard["shard"], shard["revision"]) for shard in shards}
    folders = [storage.join(plan.store, name) for name in ("shards", HASHES, SIMILARITIES)]
    for folder in (*folders, plan.quarantine):
        for name in storage.list_names(folder):
            if name not in kept and SHARD_FILE.match(name):
                storage.remove(storage.join(folder, name))
    kept = {
        storage.name_of(place(plan.store, plan.generation)) for place in (manifest_uri, members_uri)
    }
    for name in storage.list_names(plan.store):
        if name not in kept and MANIFEST_FILE.match(name):
            storage.remove(storage.join(plan.store, name))


def _summary(
    plan: IngestPlan, catalogue: dict[str, Any], rate: float | None, started: float
) -> IngestSummary:
    if plan.config.limit is not None and rate:
        share = plan.manifest_clips / plan.total
        logger.info(
            "the whole manifest of %s clips would take approximately %s and %.1f GB",
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
