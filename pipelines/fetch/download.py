"""Fetches URLs into their places: tries again what may pass, and spares hosts that are silent."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Collection
from pathlib import Path
from types import TracebackType

import tenacity
from yarl import URL

from pipelines.common import storage
from pipelines.fetch import answers
from pipelines.fetch.config import FetchConfig
from pipelines.fetch.failures import FetchError, PassingError
from pipelines.fetch.hosts import HostHistory, host_of
from pipelines.fetch.limits import TimeLimit
from pipelines.fetch.outcomes import Failed, Fetched
from pipelines.fetch.partial import open_partial
from pipelines.fetch.transfer import Transfers
from stgt.errors import STGTError

PROGRESS_BYTES = 1024**2
"""Bytes that an attempt must gain for the count of fruitless attempts to begin anew."""
FIRST_PAUSE_S = 0.5
OUTAGE_PROBES = 5
"""URLs that are tried, each after the longest pause, when the only host that answers falls silent.
Then the run ends."""


class Downloader:
    """Fetches URLs at the same time, in one event loop. An asynchronous context manager."""

    def __init__(
        self,
        config: FetchConfig,
        output: str,
        scratch: Path,
        part: int = 0,
        parts: int = 1,
        answered: Collection[str] = (),
    ) -> None:
        """Set the limits; `async with` opens the connections.

        Args:
            config: Settings and limits, those of all workers together.
            output: Folder of the videos.
            scratch: Local folder of unfinished files.
            part: Number of this worker.
            parts: Number of workers.
            answered: Hosts that have answered in earlier runs, as `host_of` gives them.
        """
        self._config = config
        self._output = output
        self._scratch = scratch
        self._hosts = HostHistory(answered)
        self._probe = asyncio.Lock()
        self.transfers = Transfers(config, part, parts)

    async def __aenter__(self) -> Downloader:
        self._scratch.mkdir(parents=True, exist_ok=True)
        await self.transfers.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.transfers.__aexit__(kind, error, trace)

    async def fetch(self, key: str, url: str) -> Fetched | Failed:
        """Fetch one URL.

        Args:
            key: The name of its file, without extension.
            url: The URL.

        Raises:
            STGTError: The host has fallen silent, and no other one answers.
            OSError: The disk or the object storage cannot be written.
        """
        try:
            target = answers.parsed(url)
        except FetchError as error:
            return Failed(error.reason, error.message)
        host = host_of(url)
        if self._hosts.is_outage(host):
            async with self._probe:
                outcome = await self._probed(key, target, host)
            if outcome is not None:
                return outcome
        if (failed := self._hosts.why_not_tried(host, target.host)) is not None:
            return failed
        return await self._noted(key, target, host)

    async def _noted(self, key: str, url: URL, host: str) -> Fetched | Failed:
        """Fetch a URL, and remember whether its host answers."""
        started = time.monotonic()
        outcome = await self._patiently(key, url)
        self._hosts.note(host, outcome, started)
        return outcome

    async def _probed(self, key: str, url: URL, host: str) -> Fetched | Failed | None:
        """Wait until a silent host answers again; return None if that is no longer needed.

        Raises:
            STGTError: It does not.
        """
        for _ in range(OUTAGE_PROBES):
            if not self._hosts.is_outage(host):
                return None
            await asyncio.sleep(self._config.max_pause_s)
            outcome = await self._noted(key, url, host)
            if not isinstance(outcome, Failed) or not outcome.is_silent:
                return outcome
        if not self._hosts.is_outage(host):
            return None
        raise STGTError(
            f"{url.host} has answered before but no longer does, and no other host answers; check "
            "the network and the host, then run the same command again; what has been fetched is "
            "kept"
        )

    async def _patiently(self, key: str, url: URL) -> Fetched | Failed:
        """Fetch a URL in several attempts if need be."""
        time_limit = TimeLimit(self._config.time_limit_s)
        fruitless, largest = 0, 0

        async def attempt() -> Fetched:
            nonlocal fruitless, largest
            fruitless += 1
            keep = True
            partial = await open_partial(str(self._scratch), key, self._config.checksum)
            try:
                extension = await self.transfers.receive(url, partial, time_limit)
                file = f"{key[:2]}/{key}.{extension}"
                await partial.move_to(storage.join(self._output, file))
                return Fetched(file, partial.size, partial.checksum())
            except FetchError as error:
                keep = isinstance(error, PassingError) or error.reason == "timeout"
                raise
            finally:
                if partial.size >= largest + PROGRESS_BYTES:
                    fruitless = 0
                largest = max(largest, partial.size)
                partial.close(keep)

        patience = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(PassingError),
            wait=lambda state: self._pause_s(state, fruitless),
            stop=lambda state: fruitless >= self._config.attempts or self._is_too_long(state),
            reraise=True,
        )
        try:
            return await patience(attempt)
        except FetchError as error:
            tried = " (1 attempt)" if fruitless == 1 else f" ({fruitless} attempts)"
            message = answers.presentable(error.message)[: answers.MOST_SAID]
            return Failed(
                error.reason,
                message + (tried if isinstance(error, PassingError) else ""),
                is_silent=error.reason == "unreachable"
                or (error.reason == "timeout" and largest == 0),
                nothing_came=isinstance(error, PassingError) and error.nothing_came,
            )

    def _pause_s(self, state: tenacity.RetryCallState, fruitless: int) -> float:
        """Return the pause before the next attempt: as the server asks, or random.

        Random ones grow with the number of attempts in a row that gained nothing.
        """
        state = copy.copy(state)
        state.attempt_number = max(1, fruitless)
        growing = tenacity.wait_random_exponential(FIRST_PAUSE_S, max=self._config.max_pause_s)
        asked = _asked_pause_s(state)
        return growing(state) if asked is None else max(asked, 0.0)

    def _is_too_long(self, state: tenacity.RetryCallState) -> bool:
        return (_asked_pause_s(state) or 0.0) > self._config.max_pause_s


def _asked_pause_s(state: tenacity.RetryCallState) -> float | None:
    error = state.outcome.exception() if state.outcome is not None else None
    return error.pause_s if isinstance(error, PassingError) else None
