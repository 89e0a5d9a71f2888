"""Hands out the URLs of a list, so that those of one slow host do not keep others waiting."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterator

from pipelines.fetch.hosts import host_of

MOST_WAITING = 10_000
"""URLs of busy hosts that are put aside at most, while others further on in the list are taken."""


class UrlQueue:
    """URLs of a list, of which a limited number per host are at work at the same time."""

    def __init__(self, todo: Iterator[tuple[str, str]], per_host: int) -> None:
        """Begin with the first URL.

        Args:
            todo: Keys and URLs.
            per_host: Largest number of URLs of one host at work.
        """
        self._todo = todo
        self._per_host = per_host
        self._at_work: Counter[str] = Counter()
        self._waiting: dict[str, deque[tuple[str, str]]] = {}
        self._num_waiting = 0
        self._is_read = False
        self._free: deque[str] = deque()
        """Hosts of URLs that wait and may be taken now."""
        self._changed = asyncio.Event()

    async def take(self) -> tuple[str, str] | None:
        """Return key and URL of one that may be fetched now; None when no more are left."""
        while True:
            if (found := self._next()) is not None:
                self._at_work[host_of(found[1])] += 1
                return found
            if self._is_read and not self._num_waiting:
                return None
            self._changed.clear()
            await self._changed.wait()

    def finish(self, url: str) -> None:
        """Note that a URL that was taken is done."""
        host = host_of(url)
        self._at_work[host] -= 1
        if not self._at_work[host]:
            del self._at_work[host]
        if host in self._waiting:
            self._free.append(host)
        self._changed.set()

    def _next(self) -> tuple[str, str] | None:
        while self._free:
            host = self._free.popleft()
            if host in self._waiting and self._at_work[host] < self._per_host:
                return self._taken(host)
        while not self._is_read and self._num_waiting < MOST_WAITING:
            one = next(self._todo, None)
            if one is None:
                self._is_read = True
                self._changed.set()  # the others may find that nothing is left for them
                return None
            host = host_of(one[1])
            if self._at_work[host] < self._per_host and host not in self._waiting:
                return one
            self._waiting.setdefault(host, deque()).append(one)
            self._num_waiting += 1
        return None

    def _taken(self, host: str) -> tuple[str, str]:
        urls = self._waiting[host]
        one = urls.popleft()
        self._num_waiting -= 1
        if not urls:
            del self._waiting[host]
        return one
