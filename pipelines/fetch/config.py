"""Settings for fetching videos."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pipelines.common.config import require
from stgt.field_marks import Common, Earlier, FieldMark

FetchReason = Literal[
    "missing",
    "forbidden",
    "unavailable",
    "unreachable",
    "timeout",
    "incomplete",
    "empty",
    "too_large",
    "not_a_video",
    "bad_response",
    "blocked_address",
    "not_https",
    "invalid_url",
    "too_many_redirects",
]
"""Why a video was not fetched. The README of this package says what each one means."""
ChecksumName = Literal["blake3", "sha256"]
REASONS: tuple[FetchReason, ...] = get_args(FetchReason)


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Fetch the videos of a list of URLs, and write a manifest that points to them."""

    annotations: Annotated[tuple[str, ...], Common("data"), FieldMark.LOCATION]
    """Lists of URLs: .txt with one per line, tables with a column of URLs, or one manifest of
    jobs.manifest whose videos are URLs. Local or s3://."""
    output: Annotated[str, Common("data"), FieldMark.LOCATION]
    """Folder for videos, manifest and quarantine. Local or s3://."""
    columns: Annotated[tuple[str, ...], Common("data")] = ()
    """Column names in tables, as NAME=COLUMN, such as video=link caption=text."""
    split: Annotated[str | None, Common("data")] = None
    """Split name to record with every clip. None uses the split given in the table, or train."""
    connections_per_host: Annotated[int, Common("limits")] = 8
    """Largest number of connections to one host at the same time, over all workers."""
    connections: Annotated[int, Common("limits")] = 64
    """Largest number of connections at the same time, over all workers and hosts."""
    requests_per_s: Annotated[float | None, Common("limits")] = 20.0
    """Largest number of requests per second to one host, over all workers. None sets no limit."""
    bytes_per_s: Annotated[float | None, Common("limits")] = None
    """Largest number of bytes received per second, over all workers and hosts. None sets no
    limit."""
    max_bytes: Annotated[int, Common("limits")] = 4 * 1024**3
    """Largest file to fetch, in bytes. The transfer of a larger one is cut off."""
    time_limit_s: Annotated[float, Common("limits")] = 1800.0
    """Time limit for one URL, in seconds of its requests and transfers. Pauses between attempts do
    not count."""
    idle_s: Annotated[float, Common("limits")] = 30.0
    """Time without a byte after which a request is given up and tried again, in seconds."""
    connect_s: float = 10.0
    """Time limit for one connection to a host, in seconds."""
    attempts: int = 5
    """Attempts per URL that gain nothing, for failures that may pass. Pauses between them grow."""
    max_pause_s: float = 120.0
    """Longest pause between two attempts, in seconds. If a server asks for a longer one, the URL
    counts as unavailable."""
    max_redirects: int = 5
    """Largest number of redirects to follow."""
    allow_http: Annotated[bool, Common("safety")] = False
    """Also fetch URLs that begin with http://, whose contents anyone on the way can change."""
    allow_private: Annotated[bool, Common("safety")] = False
    """Also connect to addresses that are not public: loopback, private and link-local ones."""
    user_agent: str = "stgt-ray-fetch/1.0"
    """What the requests say they come from. Some hosts ask for a contact address in it."""
    retry_failed: Annotated[tuple[FetchReason, ...] | None, Common("run")] = None
    """Also try URLs again that failed in an earlier run: those with the given reasons or, if none
    are given, all of them."""
    num_workers: Annotated[int | None, Common("run")] = None
    """Number of workers, one CPU each. None uses one per CPU of the cluster, as far as there is
    work and a connection to each host for each of them."""
    checksum: Annotated[ChecksumName, Earlier("sha256")] = "blake3"
    """Checksum to record of every file. BLAKE3 takes a quarter of the time of SHA-256."""
    scratch_dir: Annotated[str | None, FieldMark.LOCATION] = None
    """Folder on each node for unfinished files if the output is remote. None uses a folder below
    the temporary folder."""

    def __post_init__(self) -> None:
        require(len(self.annotations) > 0, "annotations", self.annotations, "give a file")
        for name in ("connections", "connections_per_host", "max_bytes", "attempts"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("requests_per_s", "bytes_per_s"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, name, value, "must be positive, or None")
        for name in ("time_limit_s", "idle_s", "connect_s", "max_pause_s"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        require(
            self.max_redirects >= 0, "max_redirects", self.max_redirects, "must not be negative"
        )
        require(
            self.user_agent.isascii() and self.user_agent.isprintable() and self.user_agent != "",
            "user_agent",
            self.user_agent,
            "must be one line of ASCII text",
        )
        if self.num_workers is not None:
            require(self.num_workers >= 1, "num_workers", self.num_workers, "must be at least 1")
            most = self.most_workers
            require(
                self.num_workers <= most,
                "num_workers",
                self.num_workers,
                f"must not exceed connections_per_host and connections ({most}), because the "
                "workers share them",
            )

    @property
    def reasons_to_retry(self) -> tuple[FetchReason, ...] | None:
        """Reasons of URLs to try again: as asked for, and those that the settings now allow.

        None means none, and an empty tuple means all.
        """
        if self.retry_failed == ():
            return ()
        asked = list(self.retry_failed or ())
        if self.allow_http:
            asked.append("not_https")
        if self.allow_private:
            asked.append("blocked_address")
        return tuple(asked) or None

    @property
    def most_workers(self) -> int:
        """Largest number of workers, each of which needs a connection to each host."""
        return min(self.connections, self.connections_per_host)
