"""Writes a manifest as webdataset tars on Ray Data."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Container
from typing import TypedDict

import pyarrow as pa

from pipelines.artifacts.manifest import check_manifest, refuse_web_addresses
from pipelines.common import storage
from pipelines.export.claim import claim_output, remove_leftovers
from pipelines.export.config import ExportConfig
from pipelines.export.plan import TarPlan, plan_tars
from pipelines.export.tar_form import CONTINUED, RECORDS, RejectedVideo, TarRecord, num_videos
from stgt.errors import STGTError

logger = logging.getLogger(__name__)

FINISHED = "tars.json"
"""File that lists all tars; without it, the export is not finished."""
REJECTED = "rejected.parquet"
REJECTED_SCHEMA = pa.schema(
    [
        ("video_uri", pa.string()),
        ("clip_ids", pa.list_(pa.string())),
        ("reason", pa.string()),
        ("message", pa.string()),
    ]
)


class TarsSummary(TypedDict):
    """Result of an export as tars."""

    output: str
    tars: int
    videos: int
    clips: int
    bytes: int
    rejected: int
    rejected_videos: str | None


def export_tars(
    config: ExportConfig, connect: Callable[[ExportConfig], None] | None = None
) -> TarsSummary:
    """Write the videos of a manifest as webdataset tars, or those that are missing.

    Raises:
        ManifestError: The manifest cannot be used.
        STGTError: The output holds something else, or too many videos cannot be read.
    """
    assert config.manifest is not None
    manifest, output = storage.resolve(config.manifest), storage.resolve(config.output)
    check_manifest(manifest)
    refuse_web_addresses(manifest)
    with storage.lock(output):
        claim = {
            "kind": "webdataset",
            "manifest_sha256": storage.digest(manifest),
            "videos_per_tar": config.videos_per_tar,
            "bytes_per_tar": config.bytes_per_tar,
        }
        claim_output(output, claim, manifest)
        plan = plan_tars(manifest, config.videos_per_tar)
        records = _records(output)
        due = [
            part
            for part in range(plan.num_parts)
            if part not in records or (config.retry_rejected and records[part]["rejected"])
        ]
        if due:
            storage.remove(storage.join(output, FINISHED))
            if connect is not None:
                connect(config)
            _write(config, plan, due, records)
            remove_leftovers(output, storage.join(output, RECORDS))
            records = _records(output)
        else:
            logger.info("all tars are already written")
        return _finish(config, output, [records[part] for part in range(plan.num_parts)])


def _records(output: str) -> dict[int, TarRecord]:
    folder = storage.join(output, RECORDS)
    names = [name for name in storage.list_names(folder) if name.endswith(".json")]
    return {record["part"]: record for record in storage.read_jsons(folder, names)}


def _write(
    config: ExportConfig, plan: TarPlan, due: list[int], records: dict[int, TarRecord]
) -> None:
    # Ray loads slowly, so it is imported only after all checks.
    from pipelines.common.progress import Progress
    from pipelines.export.tar_writer import TarWriter
    from pipelines.export.workers import run_workers

    done = sum(num_videos(record) for part, record in records.items() if part not in due)
    if records:
        logger.info("export resumes: %d of %d videos are finished", done, plan.num_videos)
    run_workers(
        TarWriter,
        (plan, storage.resolve(config.output), config.bytes_per_tar),
        due,
        Progress("export", plan.num_videos, "videos", done),
        config.num_workers,
    )


def _finish(config: ExportConfig, output: str, records: list[TarRecord]) -> TarsSummary:
    """Write the list of rejected videos and, last, the list of tars.

    Raises:
        STGTError: Too many videos cannot be read.
    """
    rejected = [video for record in records for video in record["rejected"]]
    tars = [file for record in records for file in record["files"]]
    _remove_others(output, {file["name"] for file in tars})
    listed = storage.join(output, REJECTED)
    if rejected:
        storage.write_table(listed, pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA))
    else:
        storage.remove(listed)  # the list of an earlier run
    videos = sum(file["videos"] for file in tars)
    total = videos + len(rejected)
    if rejected:
        said = ", ".join(f"{count} {reason}" for reason, count in _reasons(rejected))
        logger.warning(
            "%d of %d videos could not be read (%s); they are listed in %s, and --retry-rejected "
            "tries them again",
            len(rejected),
            total,
            said,
            listed,
        )
        if len(rejected) > config.max_bad_fraction * total:
            raise STGTError(
                f"{len(rejected)} of {total} videos cannot be read ({said}), more than "
                f"max_bad_fraction = {config.max_bad_fraction:g} allows; see {listed}, then repair "
                "the videos and run again with --retry-rejected, or raise the limit and run again"
            )
    summary = TarsSummary(
        output=output,
        tars=len(tars),
        videos=videos,
        clips=sum(file["clips"] for file in tars),
        bytes=sum(file["bytes"] for file in tars),
        rejected=len(rejected),
        rejected_videos=listed if rejected else None,
    )
    counts = {name: summary[name] for name in ("videos", "clips", "bytes", "rejected")}
    storage.write_json(storage.join(output, FINISHED), {**counts, "tars": tars})
    return summary


def _remove_others(output: str, names: Container[str]) -> None:
    """Delete tars that continued one before it was written again with fewer or smaller videos."""
    for name in storage.list_names(output):
        if name not in names and CONTINUED.fullmatch(name):
            storage.remove(storage.join(output, name))


def _reasons(rejected: list[RejectedVideo]) -> list[tuple[str, int]]:
    return Counter(video["reason"] for video in rejected).most_common()
