"""Fetches one URL after another into files, with one worker's share of all limits.

Everything a server says is checked: where it redirects to, how long the file is, which part of it
an answer contains, and what its first bytes are. Bodies are taken as they come: compression is not
asked for and not undone, so no body can be larger in memory or on disk than it was on the line.
"""

from __future__ import annotations

import asyncio
import copy
import email.utils
import errno
import logging
import re
import socket
import ssl
import time
import traceback
from collections.abc import Collection, Coroutine
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import tenacity
from yarl import URL

from pipelines.artifacts.manifest import is_web_address
from pipelines.common import storage
from pipelines.common.config import hide_credentials
from pipelines.fetch.addresses import BlockedAddressError, public_socket
from pipelines.fetch.config import FetchConfig, FetchReason
from pipelines.fetch.content import HEAD_BYTES, extension_of
from pipelines.fetch.failures import FetchError, PassingError
from pipelines.fetch.limits import HostLimits, Pace, share
from pipelines.fetch.partial import Partial, open_partial
from stgt.errors import STGTError

logger = logging.getLogger(__name__)

READ_BUFFER_BYTES = 256 * 1024
PROGRESS_BYTES = 1024**2
"""Bytes that an attempt must gain for the count of fruitless attempts to begin anew."""
FIRST_PAUSE_S = 0.5
SILENT_URLS = 20
"""URLs of one host in a row that get no answer after which its other URLs are not tried."""
UNAVAILABLE_S = 600.0
"""Time, in seconds, for which a host must answer all of `SILENT_URLS` URLs or more that it is not
available, until its other URLs are not tried."""
OUTAGE_PROBES = 5
"""URLs that are tried, each after the longest pause, when the only host that answers falls silent.
Then the run ends."""
REDIRECTS = frozenset({301, 302, 303, 307, 308})
BY_STATUS: dict[int, FetchReason] = {
    401: "forbidden",
    402: "forbidden",
    403: "forbidden",
    404: "missing",
    407: "forbidden",
    410: "missing",
    451: "forbidden",
}
UNASKED: frozenset[FetchReason] = frozenset({"invalid_url", "not_https", "blocked_address"})
"""Reasons that may be found without an answer of the host."""
PASSING_STATUSES = frozenset({408, 421, 425, 429, *range(500, 600)} - {501, 505, 511})
UNKNOWN_NAME = frozenset(
    getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA") if hasattr(socket, name)
)
MOST_SAID = 300
"""Number of characters of a message of a library or a server that are kept."""
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")


@dataclass(frozen=True)
class Fetched:
    """A video that is in its place."""

    file: str
    """Path below the output folder."""
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Failed:
    """A video that could not be fetched."""

    reason: FetchReason
    message: str
    is_silent: bool = False
    """Whether the host has not answered."""
    nothing_came: bool = False
    """Whether nothing came back, as if there were no network: not even that the name is unknown or
    that the host refuses connections."""


class _Budget:
    """Time that one URL has left.

    Pauses, waits for a connection, and waits that a limit of this job imposes do not count.
    """

    def __init__(self, seconds: float) -> None:
        self._limit_s = self._left_s = seconds

    def prolong(self, seconds: float) -> None:
        """Give some time back that the work is going to wait for a limit of this job."""
        self._left_s += seconds

    async def run(self, work: Coroutine[Any, Any, URL | None]) -> URL | None:
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
            task.cancel()
            await asyncio.wait({task})


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
        rate = config.requests_per_s
        self.connections = share(config.connections, part, parts)
        self.connections_per_host = share(config.connections_per_host, part, parts)
        self._limits = HostLimits(
            self.connections,
            self.connections_per_host,
            None if rate is None else rate / parts,
        )
        self._bytes = Pace(None if config.bytes_per_s is None else config.bytes_per_s / parts)
        self._session: aiohttp.ClientSession | None = None
        self._silent: dict[str, int] = {}
        self._unavailable: dict[str, tuple[int, float]] = {}
        """Number of URLs in a row for which a host was not available, and since when."""
        self._answered = set(answered)
        self._answers = 0
        self._answers_before: dict[str, int] = {}
        """Number of answers of all hosts when a host fell silent."""
        self._probe = asyncio.Lock()
        self.received_bytes = 0
        """Bytes received so far, complete or not."""

    async def __aenter__(self) -> Downloader:
        self._scratch.mkdir(parents=True, exist_ok=True)
        connector = aiohttp.TCPConnector(
            limit=0,  # `HostLimits` counts connections, before the time limit of a URL begins
            socket_factory=None if self._config.allow_private else public_socket,
            happy_eyeballs_delay=None,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers={
                "User-Agent": self._config.user_agent,
                "Accept": "*/*",
                "Accept-Encoding": "identity",
            },
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,  # no proxy, whose address nobody checks, and no passwords of .netrc
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=self._config.connect_s, sock_read=self._config.idle_s
            ),
            read_bufsize=READ_BUFFER_BYTES,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._session is not None
        await self._session.close()

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
            target = _parsed(url)
        except FetchError as error:
            return Failed(error.reason, error.message)
        host = host_of(url)
        if self._is_outage(host):
            async with self._probe:
                outcome = await self._probed(key, target, host)
            if outcome is not None:
                return outcome
        if self._silent.get(host, 0) >= SILENT_URLS:
            return Failed(
                "unreachable",
                f"it was not tried, since the {SILENT_URLS} URLs of {target.host} before it got no "
                "answer",
                is_silent=True,
            )
        count, since = self._unavailable.get(host, (0, 0.0))
        if count >= SILENT_URLS and time.monotonic() - since >= UNAVAILABLE_S:
            return Failed(
                "unavailable",
                f"it was not tried, since {target.host} was not available for the {count} URLs "
                f"before it, during {time.monotonic() - since:.0f} s",
            )
        return await self._noted(key, target, host)

    async def _noted(self, key: str, url: URL, host: str) -> Fetched | Failed:
        """Fetch a URL, and remember whether its host answers."""
        started = time.monotonic()
        outcome = await self._patiently(key, url)
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
        return outcome

    def _is_outage(self, host: str) -> bool:
        """Return whether a host that has answered is silent now, and no other answered since."""
        return (
            self._silent.get(host, 0) >= SILENT_URLS
            and host in self._answered
            and self._answers == self._answers_before[host]
        )

    async def _probed(self, key: str, url: URL, host: str) -> Fetched | Failed | None:
        """Wait until a silent host answers again; return None if that is no longer needed.

        Raises:
            STGTError: It does not.
        """
        for _ in range(OUTAGE_PROBES):
            if not self._is_outage(host):
                return None
            await asyncio.sleep(self._config.max_pause_s)
            outcome = await self._noted(key, url, host)
            if not isinstance(outcome, Failed) or not outcome.is_silent:
                return outcome
        if not self._is_outage(host):
            return None
        raise STGTError(
            f"{url.host} has answered before but no longer does, and no other host answers; check "
            "the network and the host, then run the same command again; what has been fetched is "
            "kept"
        )

    async def _patiently(self, key: str, url: URL) -> Fetched | Failed:
        """Fetch a URL in several attempts if need be."""
        budget = _Budget(self._config.time_limit_s)
        fruitless, largest = 0, 0

        async def attempt() -> Fetched:
            nonlocal fruitless, largest
            fruitless += 1
            partial, keep = await open_partial(str(self._scratch), key), True
            try:
                return await self._fetched(key, url, partial, budget)
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
            message = _presentable(error.message)[:MOST_SAID]
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

    async def _fetched(self, key: str, url: URL, partial: Partial, budget: _Budget) -> Fetched:
        """Fetch a URL and move the complete file to its place.

        Raises:
            FetchError: It cannot be fetched.
        """
        try:
            await self._received(url, partial, budget)
        except (FetchError, STGTError, OSError, MemoryError):
            raise
        except Exception as error:
            # Whatever a URL or a server has caused here must not end the run, since it would end
            # every other run with this list as well.
            logger.warning(
                "an unexpected error of one URL: %s",
                _presentable("".join(traceback.format_exception(error))),
            )
            raise FetchError(
                "bad_response", f"an unexpected error: {type(error).__name__}: {error}"
            ) from error
        extension = extension_of(partial.head, _extension(url))
        file = f"{key[:2]}/{key}.{extension}"
        await partial.move_to(storage.join(self._output, file))
        return Fetched(file, partial.size, partial.sha256())

    async def _received(self, url: URL, partial: Partial, budget: _Budget) -> None:
        """Receive the whole file of a URL; follow redirects.

        Raises:
            FetchError: It cannot be fetched.
        """
        at: URL | None = url
        if partial.size and partial.size == partial.total:
            at = None  # the run was killed before it could move the file
        for _ in range(self._config.max_redirects + 1):
            if at is None:
                break
            self._refuse_scheme(at, url)
            name = f"{at.host}:{at.port}"
            async with self._limits.connection(name):
                at = await budget.run(self._request(at, url, name, partial, budget))
        if at is not None:
            raise FetchError(
                "too_many_redirects", f"it redirects more than {self._config.max_redirects} times"
            )

    def _refuse_scheme(self, url: URL, first: URL) -> None:
        """Raise a FetchError if a URL, or where it redirects to, is not to be fetched."""
        what = "it" if url == first else f"it redirects to {_shown(url)}, which"
        if not is_web_address(str(url)) or not url.host:
            raise FetchError("invalid_url", f"{what} is not a URL that begins with https://")
        if url.scheme == "http" and not self._config.allow_http:
            raise FetchError(
                "not_https", f"{what} begins with http://; pass --allow-http to fetch it anyway"
            )

    async def _request(
        self, url: URL, first: URL, name: str, partial: Partial, budget: _Budget
    ) -> URL | None:
        """Send one request and receive its body; return the URL that it redirects to, if any.

        Args:
            url: What to ask for.
            first: The URL of the list, which has led here.
            name: Name of the host and its port.
            partial: The file.
            budget: The time that is left.

        Raises:
            FetchError: The answer is not the file.
        """
        assert self._session is not None
        headers = {}
        if partial.size and partial.validator is not None:
            headers = {"Range": f"bytes={partial.size}-", "If-Range": partial.validator}
        try:
            async with self._session.get(url, headers=headers, allow_redirects=False) as response:
                if response.status in REDIRECTS and "Location" in response.headers:
                    return _redirected(response)
                self._check_status(response, name, partial)
                self._begin(response, partial)
                await self._receive(response, partial, _extension(url), budget)
        except FetchError:
            raise
        except aiohttp.ClientError as error:
            raise _explained(error) from error
        except asyncio.TimeoutError as error:
            raise PassingError("timeout", "it did not answer in time") from error
        except ValueError as error:  # such as a name of a host that cannot be looked up
            if url == first:
                raise FetchError("invalid_url", "it is not a valid URL") from error
            raise FetchError("bad_response", "it redirects to an invalid URL") from error
        except (ConnectionError, ssl.SSLError) as error:
            raise PassingError("unreachable", f"the connection broke: {error}") from error
        return None

    def _check_status(self, response: aiohttp.ClientResponse, name: str, partial: Partial) -> None:
        """Raise a FetchError unless the answer has the file or the asked part of it."""
        status = response.status
        if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            return
        said = f"the server answers {status} {_phrase(status)}"
        if status in BY_STATUS:
            raise FetchError(BY_STATUS[status], said)
        if status in PASSING_STATUSES:
            pause_s = _retry_after_s(response.headers.get("Retry-After"))
            if pause_s is not None:
                self._limits.be_quiet(name, min(pause_s, self._config.max_pause_s))
                said += f" and asks to wait {pause_s:.0f} s"
            raise PassingError("unavailable", said, pause_s)
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and partial.size:
            partial.restart(None, None)
            raise PassingError("incomplete", f"{said} to a request for the rest")
        raise FetchError("bad_response", said)

    def _begin(self, response: aiohttp.ClientResponse, partial: Partial) -> None:
        """Compare an answer with what was asked for and with what is there already.

        Raises:
            FetchError: They contradict each other, or the file is too large.
        """
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise FetchError(
                "not_a_video",
                f"the server sends it compressed ({encoding[:20]}), which was not asked for",
            )
        if response.status == HTTPStatus.OK:
            partial.restart(_validator(response), response.content_length)
        else:
            self._continue(response, partial)
        if partial.total is not None and partial.total > self._config.max_bytes:
            raise FetchError(
                "too_large",
                f"it has {partial.total:,} bytes, more than max_bytes = {self._config.max_bytes:,}",
            )

    def _continue(self, response: aiohttp.ClientResponse, partial: Partial) -> None:
        """Check that an answer is the rest of the version that is there already."""
        told = response.headers.get("Content-Range", "")
        match = _CONTENT_RANGE.fullmatch(told.strip())
        validator = _validator(response)
        if (
            not partial.size
            or match is None
            or int(match[1]) != partial.size
            or (validator is not None and validator != partial.validator)
            or (match[3] != "*" and partial.total not in (None, int(match[3])))
        ):
            size = partial.size
            partial.restart(None, None)
            raise PassingError(
                "bad_response",
                f"the server sends another part ({told[:60] or 'not named'}) than the bytes from "
                f"{size} of the same file",
            )
        if match[3] != "*":
            partial.total = int(match[3])

    async def _receive(
        self, response: aiohttp.ClientResponse, partial: Partial, named: str, budget: _Budget
    ) -> None:
        """Receive a body into a file.

        Raises:
            FetchError: It is too long, too short, empty, or not a video.
        """
        is_checked = False
        async for chunk in response.content.iter_any():
            if (wait_s := self._bytes.reserve(len(chunk))) > 0:
                budget.prolong(wait_s)
                await asyncio.sleep(wait_s)
            partial.write(chunk)
            self.received_bytes += len(chunk)
            if partial.size > self._config.max_bytes:
                raise FetchError(
                    "too_large", f"it has more than max_bytes = {self._config.max_bytes:,} bytes"
                )
            if not is_checked and partial.size >= HEAD_BYTES:
                extension_of(partial.head, named)  # no need to receive the rest
                is_checked = True
        if partial.total is not None and partial.size != partial.total:
            raise PassingError(
                "incomplete", f"{partial.size:,} of {partial.total:,} bytes were received"
            )
        if partial.size == 0:
            raise FetchError("empty", "the server sends no bytes")


def _parsed(url: str) -> URL:
    """Return a URL as it is, or with what a URL cannot contain quoted.

    Raises:
        FetchError: It is not valid.
    """
    try:
        is_quoted = url.isascii() and url.isprintable() and " " not in url
        parsed = URL(url, encoded=is_quoted)
        _ = parsed.host, parsed.port
    except ValueError as error:  # whose text may have the password
        raise FetchError("invalid_url", "it is not a valid URL") from error
    return parsed


def host_of(url: str) -> str:
    """Return the host of a URL with its port; empty for what is no URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return ""
    return f"{parts.hostname}:{port or (80 if parts.scheme == 'http' else 443)}"


def _redirected(response: aiohttp.ClientResponse) -> URL:
    """Return the URL that an answer redirects to, without the credentials of the first one."""
    location = response.headers["Location"]
    try:
        target = response.url.join(_parsed(location))
        _ = target.host, target.port
    except (FetchError, ValueError) as error:
        raise FetchError("bad_response", "it redirects to an invalid URL") from error
    # Each request takes its user and password from its own URL, so none are sent elsewhere.
    return target


def _shown(url: URL) -> str:
    """Return a URL for a message, without user, password and query."""
    return str(url.with_user(None).with_query(None)) if url.host else f"{url.scheme}:..."


def _extension(url: URL) -> str:
    return url.name.rpartition(".")[2].lower()


def _validator(response: aiohttp.ClientResponse) -> str | None:
    """Return what identifies the version of a file: a strong ETag, or else its date."""
    tag = response.headers.get("ETag")
    if tag is not None and tag.startswith("W/"):
        return None
    validator = response.headers.get("Last-Modified") if tag is None else tag
    # Others cannot be sent back to the server as they came.
    return validator if validator is not None and validator.isascii() else None


def _asked_pause_s(state: tenacity.RetryCallState) -> float | None:
    error = state.outcome.exception() if state.outcome is not None else None
    return error.pause_s if isinstance(error, PassingError) else None


def _retry_after_s(value: str | None) -> float | None:
    """Return the pause that a header Retry-After asks for: seconds, or a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        at_s = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):
        return None
    return max(0.0, at_s - time.time())


def _presentable(text: str) -> str:
    """Return a text of a server or a library without credentials, as it can be written to files."""
    return hide_credentials(text.encode(errors="backslashreplace").decode())


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "(not a known status)"


def _explained(error: aiohttp.ClientError) -> FetchError:
    """Return what an error of the HTTP client means for a URL."""
    # The text of an error about an answer has the URL with all that is in it.
    is_about_answer = isinstance(error, aiohttp.ClientResponseError)
    said = (error.message if is_about_answer else str(error))[:MOST_SAID]
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        found = error.os_error
        if isinstance(found, socket.gaierror) and found.errno in UNKNOWN_NAME:
            return FetchError("unreachable", f"the name {error.host} is unknown")
        return PassingError(
            "unreachable", f"the name {error.host} cannot be resolved: {found}", nothing_came=True
        )
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        cause: object = error.certificate_error
        if isinstance(cause, ssl.SSLCertVerificationError):
            cause = cause.verify_message
        return FetchError("unreachable", f"its certificate is not accepted: {cause}")
    if isinstance(error, aiohttp.ClientConnectorError):
        if isinstance(error.os_error, BlockedAddressError):
            return FetchError(
                "blocked_address",
                f"{error.host} is not a public address; pass --allow-private to connect anyway",
            )
        return PassingError(
            "unreachable",
            f"no connection to {error.host}: {error.os_error}",
            nothing_came=error.os_error.errno != errno.ECONNREFUSED,
        )
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return PassingError("unreachable", "no connection in time", nothing_came=True)
    if isinstance(error, aiohttp.ServerTimeoutError):
        return PassingError("timeout", "it did not answer in time")
    if isinstance(error, aiohttp.ClientPayloadError):
        return PassingError("incomplete", f"the transfer broke off: {said}")
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError):
        return PassingError("unreachable", f"the connection broke: {said}")
    if isinstance(error, aiohttp.InvalidURL):
        return FetchError("invalid_url", "it is not a valid URL")
    return FetchError("bad_response", f"the answer is not valid HTTP: {said}")
