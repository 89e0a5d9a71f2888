"""A worker of the fetch job: fetches its part of the URLs in one event loop.

A URL belongs to a part by its hash, so each URL is fetched by one worker, and the URLs of every
host are divided among all workers as the limits on the host are.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from ray.exceptions import RayActorError
from ray.util.queue import Queue

from pipelines.artifacts.manifest import ManifestRows, url_key
from pipelines.common import ray_errors, storage
from pipelines.common.config import fingerprint, without_credentials
from pipelines.common.digest_set import Digests, DigestSet, digests_of_hex
from pipelines.common.private_folder import ForeignFolderError, make_private_folder
from pipelines.fetch import partial, records
from pipelines.fetch.checksums import checksum_of_file
from pipelines.fetch.config import FetchConfig
from pipelines.fetch.download import Downloader
from pipelines.fetch.hosts import host_of
from pipelines.fetch.outcomes import Failed, Fetched
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
    try:
        if config.scratch_dir is None:
            make_private_folder(folder.parent, may_be_link=False)
        return make_private_folder(folder, may_be_link=False)
    except ForeignFolderError as error:
        raise STGTError(
            f"{error}; choose another folder for unfinished files with --scratch-dir"
        ) from error


def part_of(digests: Digests, parts: int) -> npt.NDArray[np.int64]:
    """Return [count] int64: which of the parts each URL belongs to, by the digest of its key.

    Folders are named after the first characters of a key, so the last ones decide.
    """
    return digests.view(">u4")[3::4].astype(np.int64) % parts


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
        known = records.read_downloads(
            work.output,
            ("key", "reason", "attempts"),
            lambda digests: part_of(digests, work.parts) == part,
        )
        digests = records.digests_of(known)
        is_due = records.is_due(known, work.config.reasons_to_retry)
        has_failed = known["reason"].is_valid().to_numpy(zero_copy_only=False).astype(bool)
        due = known.filter(pa.array(is_due))
        self._attempts = dict(zip(due["key"].to_pylist(), due["attempts"].to_pylist(), strict=True))
        self._known = DigestSet(digests[~is_due])
        """URLs that are not tried in this run."""
        self._known_failed = DigestSet(digests[~is_due & has_failed])
        self._failed = DigestSet()
        """URLs of the list without a file, whose unfinished files may be continued."""
        self._seen = DigestSet()
        self._rows: list[dict[str, Any]] = []
        self._held_back: list[dict[str, Any]] = []
        """Failures that are not recorded if it turns out that the network is down."""
        self._silent: set[str] = set()
        self._answered = set(work.answered)
        self._saved_at = time.monotonic()
        self._done = self._bad = 0
        self._folders: frozenset[str] = frozenset()
        """Folders of the output that were there when this worker began."""
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
        self._folders = frozenset(await asyncio.to_thread(storage.list_names, work.output))
        todo = self._todo()
        downloader = Downloader(
            work.config, work.output, scratch, self._part, work.parts, work.answered
        )
        async with downloader:
            num_lanes = downloader.transfers.connections * LANES_PER_CONNECTION
            per_host = downloader.transfers.connections_per_host
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
        if not storage.is_local(work.output):
            # The driver does this for a local output, but cannot see the folders of other nodes.
            await asyncio.to_thread(partial.remove_unfinished, scratch, self._may_be_continued)
        await self._tell(downloader)

    def _may_be_continued(self, key: str) -> bool:
        """Return whether an unfinished file is another part's, or its URL may be tried again."""
        digest = digests_of_hex([key])
        is_mine = part_of(digest, self._work.parts)[0] == self._part
        return not is_mine or bool(self._failed.contains(digest)[0])

    def _todo(self) -> Iterator[tuple[str, str]]:
        """Yield key and URL of each URL of this part that is not done."""
        rows = ManifestRows(self._work.source)
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            table = rows.table(start, start + ROWS_AT_A_TIME, ["video_uri"])
            urls = list(dict.fromkeys(table["video_uri"].to_pylist()))
            keys = [url_key(url) for url in urls]
            digests = digests_of_hex(keys)
            is_mine = part_of(digests, self._work.parts) == self._part
            self._failed.add(digests[is_mine & self._known_failed.contains(digests)])
            is_new = is_mine & ~self._known.contains(digests)
            is_new[is_new] = self._seen.add(digests[is_new])
            for place in np.flatnonzero(is_new):
                yield keys[place], urls[place]

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
        if folder not in self._folders:
            return None  # there was nothing in it when this worker began
        if folder not in self._leftovers:
            self._leftovers[folder] = await self._left_in(folder)
        name = self._leftovers[folder].get(key)
        if name is None:
            return None
        file = f"{folder}/{name}"
        uri = storage.join(self._work.output, file)
        size = await asyncio.to_thread(storage.size_bytes, uri)
        checksum = await asyncio.to_thread(checksum_of_file, uri, self._work.config.checksum)
        return Fetched(file, size, checksum)

    async def _left_in(self, folder: str) -> dict[str, str]:
        """Return the files of this part in a folder that no table lists, by the keys of URLs."""
        uri = storage.join(self._work.output, folder)
        names = await asyncio.to_thread(storage.list_names, uri)
        found = {name.partition(".")[0]: name for name in names}
        keys = [key for key in found if partial.KEY.fullmatch(key)]
        digests = digests_of_hex(keys)
        is_left = part_of(digests, self._work.parts) == self._part
        is_left &= ~self._known.contains(digests)
        return {keys[place]: found[keys[place]] for place in np.flatnonzero(is_left)}

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
                self._work.config.checksum: outcome.checksum,
            }
        else:
            self._bad += 1
            self._failed.add(digests_of_hex([key]))
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
            "received_bytes": downloader.transfers.received_bytes,
        }
        try:
            await asyncio.to_thread(self._progress.put, {"fetched": told})
        except RayActorError as error:
            logger.warning("progress is no longer reported: %s", error)
            self._progress = None
