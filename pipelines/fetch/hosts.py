"""Which hosts answer, so that the URLs of those that do not are not tried one by one."""

from __future__ import annotations

import functools
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from pipelines.fetch.config import FetchReason
from pipelines.fetch.outcomes import Failed, Fetched

SILENT_URLS = 20
"""URLs of one host in a row that get no answer after which its other URLs are not tried."""
UNAVAILABLE_S = 600.0
"""Time, in seconds, for which a host must answer all of `SILENT_URLS` URLs or more that it is not
available, until its other URLs are not tried."""
UNASKED: frozenset[FetchReason] = frozenset({"invalid_url", "not_https", "blocked_address"})
"""Reasons that may be found without an answer of the host."""


@functools.lru_cache(1024)
def host_of(url: str) -> str:
    """Return the host of a URL with its port; empty for what is no URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return ""
    return f"{parts.hostname}:{port or (80 if parts.scheme == 'http' else 443)}"


class HostHistory:
    """How the hosts have answered so far. Hosts are named as `host_of` names them."""

    def __init__(self, answered: Collection[str]) -> None:
        """Begin with the hosts that have answered in earlier runs."""
        self._answered = set(answered)
        self._answers = 0
        self._answers_before: dict[str, int] = {}
        """Number of answers of all hosts when a host fell silent."""
        self._silent: dict[str, int] = {}
        """Number of URLs in a row that got no answer."""
        self._unavailable: dict[str, tuple[int, float]] = {}
        """Number of URLs in a row for which a host was not available, and since when."""

    def note(self, host: str, outcome: Fetched | Failed, started: float) -> None:
        """Remember what became of a URL.

        Args:
            host: Its host.
            outcome: What became of it.
            started: When it was begun, in seconds of `time.monotonic`.
        """
        if isinstance(outcome, Failed) and outcome.reason == "unavailable":
            count, since = self._unavailable.get(host, (0, started))
            self._unavailable[host] = (count + 1, since)
        else:
            self._unavailable.pop(host, None)
        if isinstance(outcome, Failed) and outcome.is_silent:
            self._answers_before.setdefault(host, self._answers)
            self._silent[host] = self._silent.get(host, 0) + 1
        elif not isinstance(outcome, Failed) or outcome.reason not in UNASKED:
            self._silent.pop(host, None)
            self._answers_before.pop(host, None)
            self._answered.add(host)
            self._answers += 1

    def is_outage(self, host: str) -> bool:
        """Return whether a host that has answered is silent now, and no other answered since."""
        return (
            self._is_silent(host)
            and host in self._answered
            and self._answers == self._answers_before[host]
        )

    def why_not_tried(self, host: str, shown: str | None) -> Failed | None:
        """Return why no further URL of a host is tried; None if they are.

        Args:
            host: The host.
            shown: Its name in the message.
        """
        if self._is_silent(host):
            return Failed(
                "unreachable",
                f"it was not tried, since the {SILENT_URLS} URLs of {shown} before it got no "
                "answer",
                is_silent=True,
            )
        count, since = self._unavailable.get(host, (0, 0.0))
        for_s = time.monotonic() - since
        if count >= SILENT_URLS and for_s >= UNAVAILABLE_S:
            return Failed(
                "unavailable",
                f"it was not tried, since {shown} was not available for the {count} URLs before "
                f"it, during {for_s:.0f} s",
            )
        return None

    def _is_silent(self, host: str) -> bool:
        return self._silent.get(host, 0) >= SILENT_URLS
