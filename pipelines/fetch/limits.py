"""Limits on connections, requests and bytes, divided among the workers, and on time.

No worker asks another before it sends a request: each has an equal share of every limit, so that
all of them together keep it, also on hosts that only redirects lead to.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from pipelines.fetch.failures import FetchError

Result = TypeVar("Result")


def share(limit: int, part: int, parts: int) -> int:
    """Return the share of one of several workers in a limit. All shares add up to the limit."""
    return limit // parts + (part < limit % parts)


class Pace:
    """Spaces events evenly in time, by the rate that is allowed."""

    def __init__(self, per_s: float | None) -> None:
        self._per_s = per_s
        self._free_at = 0.0

    async def take(self, amount: float = 1.0) -> None:
        """Wait until an amount may pass, and let it pass."""
        if (wait_s := self.reserve(amount)) > 0:
            await asyncio.sleep(wait_s)

    def reserve(self, amount: float) -> float:
        """Let an amount pass, and return the time after which it may, in seconds."""
        if self._per_s is None:
            return 0.0
        now = time.monotonic()
        starts = max(now, self._free_at)
        self._free_at = starts + amount / self._per_s
        return starts - now


class _Host:
    def __init__(self, connections: int, requests_per_s: float | None) -> None:
        self.slots = asyncio.Semaphore(connections)
        self.pace = Pace(requests_per_s)
        self.quiet_until = 0.0


class HostLimits:
    """One worker's share of the limits on hosts."""

    def __init__(
        self, connections: int, connections_per_host: int, requests_per_s: float | None
    ) -> None:
        self._slots = asyncio.Semaphore(connections)
        self._per_host = connections_per_host
        self._requests_per_s = requests_per_s
        self._hosts: dict[str, _Host] = {}

    def _host(self, name: str) -> _Host:
        return self._hosts.setdefault(name, _Host(self._per_host, self._requests_per_s))

    def be_quiet(self, name: str, pause_s: float) -> None:
        """Send no request to a host for a while, because it asked for that."""
        host = self._host(name)
        host.quiet_until = max(host.quiet_until, time.monotonic() + pause_s)

    @asynccontextmanager
    async def connection(self, name: str) -> AsyncIterator[None]:
        """Wait until a request to a host may be sent, and hold the connection meanwhile."""
        host = self._host(name)
        async with host.slots:
            while (wait_s := host.quiet_until - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            await host.pace.take()
            # Last, so that waiting for one host does not keep a connection from the others.
            async with self._slots:
                yield


class TimeLimit:
    """Time that one URL has left.

    Pauses, waits for a connection, and waits that a limit of this job imposes do not count.
    """

    def __init__(self, seconds: float) -> None:
        self._limit_s = self._left_s = seconds

    def prolong(self, seconds: float) -> None:
        """Give some time back that the work is going to wait for a limit of this job."""
        self._left_s += seconds

    async def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do some work within the time that is left.

        Raises:
            FetchError: The time is over.
        """
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                if self._left_s <= 0:
                    raise FetchError("timeout", f"it took longer than {self._limit_s:g} s")
                started = time.monotonic()
                await asyncio.wait({task}, timeout=self._left_s)
                self._left_s -= time.monotonic() - started
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
