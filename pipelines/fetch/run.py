"""Fetches the videos of a list of URLs with Ray Data. A restart only fetches what is missing."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifacts.manifest import SCHEMA, ManifestRows, check_manifest, url_key
from pipelines.common import lease, storage
from pipelines.common.digest_set import Digests, digests_of_hex
from pipelines.common.output_folder import CONFIG, JOB, claim_folder, config_record, settings_of
from pipelines.fetch import records
from pipelines.fetch.config import FetchConfig
from pipelines.fetch.result import MANIFEST, QUARANTINE, Counts, write_results
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.formats import opening
from pipelines.manifest.run import run_manifest
from stgt.errors import ManifestError, STGTError
from stgt.field_marks import with_earlier_values

logger = logging.getLogger(__name__)

NAME = "fetch"
LIST = "urls.parquet"
"""Manifest of the URLs while the job runs, below the output folder."""
ROWS_AT_A_TIME = 100_000


class FetchSummary(TypedDict):
    """Result of `run_fetch`."""

    manifest: str | None
    clips: int
    urls: int
    fetched: int
    bytes: int
    quarantine: str | None
    quarantined: int
    reasons: dict[str, int]
    rejected: int
    rejected_rows: str | None
    urls_per_s: float | None
    seconds: float


def run_fetch(
    config: FetchConfig, connect: Callable[[FetchConfig], None] | None = None
) -> FetchSummary:
    """Fetch the videos of a list of URLs, or what is missing of them, and write a manifest.

    Args:
        config: What to fetch.
        connect: Called once before Ray is needed; not called if nothing is left to fetch.

    Raises:
        ManifestError: The list cannot be used, or contains no URL.
        STGTError: Another process uses the output folder, it belongs to another job, the network is
            down, or no video could be fetched.
    """
    started = time.monotonic()
    output = storage.resolve(config.output)
    with lease.exclusive(output), contextlib.ExitStack() as stack:
        config, resumed = _claim(config, output)
        if storage.join(output, LIST) not in map(storage.resolve, config.annotations):
            stack.callback(_remove_list, output)
        source, rejected, rejected_rows = _source(config, output)
        keys = _distinct(source)
        downloads = records.forget_gone(output, records.read_downloads(output))
        again = records.is_due(downloads, config.reasons_to_retry)
        known = _short(downloads.filter(pa.array(~again)))
        pending = int(np.setdiff1d(keys, known, assume_unique=True).size)
        done = len(keys) - pending
        if resumed and done:
            logger.info("fetch resumes: %d of %d URLs are done", done, len(keys))
        rate = None
        if pending:
            from pipelines.fetch.workers import run_workers

            if connect is not None:
                connect(config)
            bad = int(np.isin(known, keys).sum()) - _num_fetched(downloads, keys)
            rate = run_workers(
                config, output, source, pending, done, bad, records.answering_hosts(downloads)
            )
            downloads = records.read_downloads(output)
        counts = write_results(output, source, downloads)
        records.finish_downloads(output, downloads)
        _clean_up(config, output, downloads, keys)
    summary = _summary(output, downloads, keys, counts, rejected, rejected_rows, rate, started)
    _say(summary)
    return summary


def _claim(config: FetchConfig, output: str) -> tuple[FetchConfig, bool]:
    """Record the settings in the output folder.

    Returns:
        The settings, under the rules of the version that began the folder, and whether a fetch was
        there before.

    Raises:
        STGTError: The folder belongs to another job.
    """

    def refuse(found: Mapping[str, Any], differing: list[str]) -> Exception:
        job = found.get(JOB)
        owner = "another job" if job is None else f"jobs.{job}"
        return STGTError(f"{output} is the output of {owner}; choose another output folder")

    uri = storage.join(output, CONFIG)
    resumed = storage.exists(uri)
    if resumed:
        config = with_earlier_values(config, settings_of(storage.read_json(uri)))
    claim_folder(
        output,
        CONFIG,
        config_record(NAME, config),
        refuse,
        compared=lambda record: {JOB: record.get(JOB)},
    )
    return config, resumed


def _source(config: FetchConfig, output: str) -> tuple[str, int, str | None]:
    """Return a manifest of the URLs, the number of unusable rows, and the file that lists them."""
    first = storage.resolve(config.annotations[0])
    if len(config.annotations) == 1 and _is_manifest(first):
        for name, value in (("columns", config.columns), ("split", config.split)):
            if value:
                raise ManifestError(
                    f"{first} is a manifest, for which {name} has no meaning; leave --{name} out"
                )
        check_manifest(first)
        return first, 0, None
    summary = run_manifest(
        ManifestConfig(
            annotations=config.annotations,
            columns=config.columns,
            split=config.split,
            output=storage.join(output, LIST),
            format="urls",
        )
    )
    if storage.is_local(output):
        Path(summary["manifest"]).chmod(0o600)  # it has the complete URLs, with their secrets
    return summary["manifest"], summary["rejected"], summary["rejected_rows"]


def _remove_list(output: str) -> None:
    """Remove the manifest of the URLs. The next run writes it anew if it needs it."""
    for name in (LIST, LIST.replace(".parquet", f".{CONFIG}")):
        storage.remove(storage.join(output, name))


@storage.patient
def _is_manifest(uri: str) -> bool:
    """Return whether a file is a manifest, and not another table in Parquet."""
    if opening.extension(uri) != "parquet" or not storage.is_file(uri):
        return False
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as file:
        try:
            names = pq.ParquetFile(file).schema_arrow.names
        except pa.ArrowInvalid:
            return False  # reading it as a table says what is wrong
    return set(SCHEMA.names) <= set(names)


def _distinct(source: str) -> npt.NDArray[np.uint64]:
    """Return the first 64 bits of the keys of all URLs, sorted. They are only counted."""
    rows, parts = ManifestRows(source), [np.empty(0, dtype=np.uint64)]
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        urls = rows.table(start, start + ROWS_AT_A_TIME, ["video_uri"])["video_uri"]
        parts.append(_bits(digests_of_hex(map(url_key, urls.unique().to_pylist()))))
    return np.unique(np.concatenate(parts))


def _short(downloads: pa.Table) -> npt.NDArray[np.uint64]:
    """Return the first 64 bits of the keys of a table of downloads, sorted."""
    return np.unique(_bits(records.digests_of(downloads)))


def _bits(digests: Digests) -> npt.NDArray[np.uint64]:
    return digests.view(">u8")[::2].astype(np.uint64)


def _num_fetched(downloads: pa.Table, keys: npt.NDArray[np.uint64]) -> int:
    fetched = downloads.filter(downloads["file"].is_valid())
    return int(np.isin(_short(fetched), keys).sum())


def _clean_up(
    config: FetchConfig, output: str, downloads: pa.Table, keys: npt.NDArray[np.uint64]
) -> None:
    """Remove the unfinished files of this node that no later run of this list would continue."""
    from pipelines.fetch.partial import remove_unfinished
    from pipelines.fetch.worker import scratch_folder

    scratch = scratch_folder(config, output)
    if not scratch.is_dir():
        return
    failed = _short(downloads.filter(downloads["file"].is_null()))
    wanted = frozenset(np.intersect1d(failed, keys).tolist())
    remove_unfinished(scratch, lambda key: int(key[:16], 16) in wanted)
    if not any(scratch.iterdir()):
        scratch.rmdir()


def _summary(
    output: str,
    downloads: pa.Table,
    keys: npt.NDArray[np.uint64],
    counts: Counts,
    rejected: int,
    rejected_rows: str | None,
    rate: float | None,
    started: float,
) -> FetchSummary:
    fetched = downloads.filter(downloads["file"].is_valid())
    fetched = fetched.filter(pa.array(np.isin(_bits(records.digests_of(fetched)), keys)))
    quarantine = storage.join(output, QUARANTINE)
    return FetchSummary(
        manifest=storage.join(output, MANIFEST) if counts.clips else None,
        clips=counts.clips,
        urls=len(keys),
        fetched=len(fetched),
        bytes=sum(fetched["bytes"].to_pylist()),
        quarantine=quarantine if counts.quarantined else None,
        quarantined=counts.quarantined,
        reasons=dict(sorted(counts.reasons.items())),
        rejected=rejected,
        rejected_rows=rejected_rows,
        urls_per_s=None if rate is None else round(rate, 2),
        seconds=round(time.monotonic() - started, 1),
    )


def _say(summary: FetchSummary) -> None:
    """Log how many clips have no video.

    Raises:
        STGTError: None of them has one.
    """
    if not summary["quarantined"]:
        return
    said = ", ".join(
        f"{count} {reason}"
        for reason, count in sorted(summary["reasons"].items(), key=lambda one: -one[1])
    )
    if not summary["clips"]:
        raise STGTError(
            f"none of the {summary['urls']} URLs could be fetched ({said}); see "
            f"{summary['quarantine']}, and run again with --retry-failed once the cause is removed"
        )
    logger.warning(
        "%d of %d clips have no video (%s); see %s, and run again with --retry-failed to try them "
        "again",
        summary["quarantined"],
        summary["clips"] + summary["quarantined"],
        said,
        summary["quarantine"],
    )
