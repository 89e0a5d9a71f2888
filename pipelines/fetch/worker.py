"""A worker of the fetch job: fetches its part of the URLs in one event loop.

A URL belongs to a part by its hash, so each URL is fetched by one worker, and the URLs of every
host are divided among all workers as the limits on the host are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.util.queue import Queue

from pipelines.artifacts.manifest import ManifestRows, url_key
from pipelines.common import ray_errors, storage
from pipelines.common.config import fingerprint, without_credentials
from pipelines.fetch import records
from pipelines.fetch.config import FetchConfig
from pipelines.fetch.download import Downloader, Failed, Fetched, host_of
from pipelines.fetch.queue import UrlQueue
from stgt.errors import STGTError

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
"""Folder of unfinished files below a local output folder."""
ROWS_AT_A_TIME = 10_000
LANES_PER_CONNECTION = 4
"""URLs that are at work per connection. Those of hosts that must wait do not hold up the others."""
SAVE_EVERY_S = 5.0
SAVE_URLS = 1000
REPORT_EVERY_S = 1.0
SILENT_HOSTS = 10
"""Number of different hosts in a row from which nothing comes after which the run ends, because
then the network is the problem and not the URLs. Hosts that are gone do not count: once any host
has answered, only those count that have answered before."""
THREADS = 32
"""Threads for looking up names, and for moving files to their places."""


@dataclass(frozen=True, kw_only=True)
class FetchWork:
    """The work of all workers."""

    config: FetchConfig
    output: str
    source: str
    """Manifest whose videos are URLs."""
    parts: int
    answered: frozenset[str] = frozenset()
    """Hosts that have answered in earlier runs, as `host_of` gives them."""


def scratch_folder(config: FetchConfig, output: str) -> Path:
    """Return the local folder of unfinished files: the same in every run with this output."""
    if storage.is_local(output):
        return Path(storage.join(output, PARTIAL))
    base = config.scratch_dir or storage.join(tempfile.gettempdir(), f"stgt-fetch-{os.getuid()}")
    return Path(storage.join(storage.resolve(base), fingerprint(output)))


def make_scratch_folder(config: FetchConfig, output: str) -> Path:
    """Create the folder of unfinished files, and return it.

    Beside a remote output, the folder and the default one above it are this user's alone. Others
    could otherwise put a link there and have any file of this user overwritten.

    Raises:
        STGTError: There is something of this name that is not a folder of this user.
        OSError: The folder cannot be created.
    """
    folder = scratch_folder(config, output)
    if storage.is_local(output):
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    if config.scratch_dir is None:
        _make_private(folder.parent)
    else:
        folder.parent.mkdir(exist_ok=True)
    _make_private(folder)
    return folder


def _make_private(folder: Path) -> None:
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise STGTError(
            f"{folder} is not a folder of this user; choose another folder for unfinished files "
            "with --scratch-dir"
        )


@ray_errors.errors_as_rows
def fetch_part(batch: Any, work: FetchWork, progress: Queue | None) -> dict[str, np.ndarray]:
    """Fetch parts of the URLs (a Ray Data task).

    Reads:
        part: Number of the part.
    Adds:
        Nothing. A returned row means that all URLs of the part are in the tables of `records`.
    """
    for part in batch["part"].tolist():
        asyncio.run(_Part(work, part, progress).run())
    return {"part": batch["part"]}


class _Part:
    """One part of the URLs while it is fetched."""

    def __init__(self, work: FetchWork, part: int, progress: Queue | None) -> None:
        self._work, self._part, self._progress = work, part, progress
        known = records.read_downloads(work.output, ("key", "reason", "attempts"))
        is_due = records.is_due(known, work.config.reasons_to_retry)
        self._attempts: dict[str, int] = {}
        self._seen: set[bytes] = set()
        names = known["key"].to_pylist()
        for key, again, attempts in zip(names, is_due, known["attempts"].to_pylist(), strict=True):
            if again:
                self._attempts[key] = attempts
            else:
                self._seen.add(bytes.fromhex(key))
        self._rows: list[dict[str, Any]] = []
        self._held_back: list[dict[str, Any]] = []
        """Failures that are not recorded if it turns out that the network is down."""
        self._silent: set[str] = set()
        self._answered = set(work.answered)
        self._saved_at = time.monotonic()
        self._done = self._bad = 0
        self._leftovers: dict[str, dict[str, str]] = {}

    async def run(self) -> None:
        """Fetch all URLs of the part.

        Raises:
            STGTError: The network seems to be down.
            OSError: The output cannot be written.
        """
        work = self._work
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
        scratch = make_scratch_folder(work.config, work.output)
        todo = self._todo()
        downloader = Downloader(
            work.config, work.output, scratch, self._part, work.parts, work.answered
        )
        async with downloader:
            num_lanes = downloader.connections * LANES_PER_CONNECTION
            per_host = downloader.connections_per_host
            # A host that has to wait can then take up some of the lanes, but never all of them.
            most = max(per_host, min(per_host * LANES_PER_CONNECTION, num_lanes // 4))
            queue = UrlQueue(todo, most)
            lanes = [asyncio.ensure_future(self._lane(downloader, queue)) for _ in range(num_lanes)]
            reports = asyncio.ensure_future(self._report(downloader))
            try:
                await asyncio.gather(*lanes)
            finally:
                for one in (*lanes, reports):
                    one.cancel()
                await asyncio.gather(*lanes, reports, return_exceptions=True)
                await self._save()
        self._rows += self._held_back
        await self._save()
        await self._tell(downloader)

    def _todo(self) -> Iterator[tuple[str, str]]:
        """Yield key and URL of each URL of this part that is not done."""
        rows = ManifestRows(self._work.source)
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            table = rows.table(start, start + ROWS_AT_A_TIME, ["video_uri"])
            for url in table["video_uri"].to_pylist():
                key = url_key(url)
                # Folders are named after the first characters, so others say which part it is.
                if int(key[-8:], 16) % self._work.parts != self._part:
                    continue
                if (short := bytes.fromhex(key)) not in self._seen:
                    self._seen.add(short)
                    yield key, url

    async def _lane(self, downloader: Downloader, queue: UrlQueue) -> None:
        while (taken := await queue.take()) is not None:
            key, url = taken
            outcome = await self._leftover(key) or await downloader.fetch(key, url)
            queue.finish(url)
            self._note(key, url, outcome)
            if len(self._rows) >= SAVE_URLS or time.monotonic() - self._saved_at > SAVE_EVERY_S:
                await self._save()

    async def _leftover(self, key: str) -> Fetched | None:
        """Return the complete file that a killed run or worker has left, if there is one."""
        folder = key[:2]
        if folder not in self._leftovers:
            uri = storage.join(self._work.output, folder)
            names = await asyncio.to_thread(storage.list_names, uri)
            self._leftovers[folder] = {name.partition(".")[0]: name for name in names}
        name = self._leftovers[folder].get(key)
        if name is None:
            return None
        file = f"{folder}/{name}"
        uri = storage.join(self._work.output, file)
        size = await asyncio.to_thread(storage.size_bytes, uri)
        return Fetched(file, size, await asyncio.to_thread(storage.digest, uri))

    def _note(self, key: str, url: str, outcome: Fetched | Failed) -> None:
        row = {
            "key": key,
            "url": without_credentials(url),
            "attempts": self._attempts.get(key, 0) + 1,
        }
        self._done += 1
        if isinstance(outcome, Fetched):
            row |= {
                "file": outcome.file,
                "bytes": outcome.size_bytes,
                "sha256": outcome.sha256,
            }
        else:
            self._bad += 1
            row |= {"reason": outcome.reason, "message": outcome.message}
        host = host_of(url)
        if isinstance(outcome, Failed) and outcome.nothing_came:
            self._held_back.append(row)
            if not self._answered or host in self._answered:
                self._silent.add(host)
            if len(self._silent) >= SILENT_HOSTS:
                raise STGTError(
                    f"{SILENT_HOSTS} hosts in a row gave no answer (the last one: {row['url']}: "
                    f"{outcome.message}); check the network, then run the same command again; what "
                    "has been fetched is kept"
                )
            return
        if not isinstance(outcome, Failed) or not outcome.is_silent:
            self._answered.add(host)
        self._rows += [*self._held_back, row]
        self._held_back.clear()
        self._silent.clear()

    async def _save(self) -> None:
        rows, self._rows = self._rows, []
        self._saved_at = time.monotonic()
        if rows:
            await asyncio.to_thread(records.write_piece, self._work.output, rows)

    async def _report(self, downloader: Downloader) -> None:
        while True:
            await self._tell(downloader)
            await asyncio.sleep(REPORT_EVERY_S)

    async def _tell(self, downloader: Downloader) -> None:
        if self._progress is None:
            return
        told = {
            "part": self._part,
            "done": self._done,
            "bad": self._bad,
            "received_bytes": downloader.received_bytes,
        }
        try:
            await asyncio.to_thread(self._progress.put, {"fetched": told})
        except RayActorError as error:
            logger.warning("progress is no longer reported: %s", error)
            self._progress = None
