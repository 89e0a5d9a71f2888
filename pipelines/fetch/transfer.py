"""Receives the file of one URL: requests, redirects and the body, with all that is checked of them.

Everything a server says is checked: where it redirects to, how long the file is, which part of it
an answer contains, and what its first bytes are. Bodies are taken as they come: compression is not
asked for and not undone, so no body can be larger in memory or on disk than it was on the line.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import traceback
from dataclasses import dataclass, field
from types import TracebackType

import aiohttp
from yarl import URL

from pipelines.artifacts.manifest import is_web_address
from pipelines.fetch import answers
from pipelines.fetch.addresses import public_socket
from pipelines.fetch.config import FetchConfig
from pipelines.fetch.content import HEAD_BYTES, extension_of
from pipelines.fetch.failures import FetchError, PassingError
from pipelines.fetch.limits import HostLimits, Pace, TimeLimit, share
from pipelines.fetch.partial import Partial
from stgt.errors import STGTError

logger = logging.getLogger(__name__)

READ_BUFFER_BYTES = 256 * 1024


@dataclass
class _Request:
    """A request for a URL of the list, or for one that it redirects to."""

    url: URL
    first: URL
    """The URL of the list, which has led here."""
    cookies: dict[str, str] = field(default_factory=dict)
    """Cookies that the host has set in the answers that have led here."""

    @property
    def host(self) -> str:
        """Name of the host and its port."""
        return f"{self.url.host}:{self.url.port}"

    def headers(self, partial: Partial) -> dict[str, str]:
        """Return the headers that ask for what is missing of a file."""
        headers = {}
        if partial.size and partial.validator is not None:
            headers = {"Range": f"bytes={partial.size}-", "If-Range": partial.validator}
        if self.cookies:
            headers["Cookie"] = "; ".join(f"{name}={self.cookies[name]}" for name in self.cookies)
        return headers


class Transfers:
    """One worker's connections and its share of all limits. An asynchronous context manager."""

    def __init__(self, config: FetchConfig, part: int, parts: int) -> None:
        """Set the limits; `async with` opens the connections.

        Args:
            config: Settings and limits, those of all workers together.
            part: Number of this worker.
            parts: Number of workers.
        """
        self._config = config
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
        self.received_bytes = 0
        """Bytes received so far, complete or not."""

    async def __aenter__(self) -> Transfers:
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

    async def receive(self, url: URL, partial: Partial, time_limit: TimeLimit) -> str:
        """Receive the whole file of a URL, and return the extension that its contents show.

        Args:
            url: The URL.
            partial: The file, of which an earlier attempt may have received a part.
            time_limit: The time that is left.

        Raises:
            FetchError: It cannot be fetched.
            OSError: The disk cannot be written.
        """
        try:
            await self._follow(url, partial, time_limit)
        except (FetchError, STGTError, OSError, MemoryError):
            raise
        except Exception as error:
            # Whatever a URL or a server has caused here must not end the run, since it would end
            # every other run with this list as well.
            logger.warning(
                "an unexpected error of one URL: %s",
                answers.presentable("".join(traceback.format_exception(error))),
            )
            raise FetchError(
                "bad_response", f"an unexpected error: {type(error).__name__}: {error}"
            ) from error
        return extension_of(partial.head, _extension(url))

    async def _follow(self, url: URL, partial: Partial, time_limit: TimeLimit) -> None:
        """Receive the whole file of a URL; follow redirects."""
        request: _Request | None = _Request(url, url)
        if partial.size and partial.size == partial.total:
            request = None  # the run was killed before it could move the file
        for _ in range(self._config.max_redirects + 1):
            if request is None:
                return
            self._refuse_scheme(request)
            async with self._limits.connection(request.host):
                request = await time_limit.run(self._ask(request, partial, time_limit))
        if request is not None:
            raise FetchError(
                "too_many_redirects", f"it redirects more than {self._config.max_redirects} times"
            )

    def _refuse_scheme(self, request: _Request) -> None:
        """Raise a FetchError if a URL, or where it redirects to, is not to be fetched."""
        url = request.url
        what = "it" if url == request.first else f"it redirects to {answers.shown(url)}, which"
        if not is_web_address(str(url)) or not url.host:
            raise FetchError("invalid_url", f"{what} is not a URL that begins with https://")
        if url.scheme == "http" and not self._config.allow_http:
            raise FetchError(
                "not_https", f"{what} begins with http://; pass --allow-http to fetch it anyway"
            )

    async def _ask(
        self, request: _Request, partial: Partial, time_limit: TimeLimit
    ) -> _Request | None:
        """Send one request and receive its body; return the one that follows a redirect, if any.

        Raises:
            FetchError: The answer is not the file.
        """
        assert self._session is not None
        headers = request.headers(partial)
        try:
            async with self._session.get(
                request.url, headers=headers, allow_redirects=False
            ) as response:
                if response.status in answers.REDIRECTS and "Location" in response.headers:
                    return _redirected(request, response)
                answers.check_status(response, partial)
                answers.begin_file(response, partial, self._config.max_bytes)
                await self._receive_body(response, partial, _extension(request.url), time_limit)
        except PassingError as error:
            if error.pause_s is not None:
                pause_s = min(error.pause_s, self._config.max_pause_s)
                self._limits.be_quiet(request.host, pause_s)
            raise
        except FetchError:
            raise
        except aiohttp.ClientError as error:
            raise answers.explained(error) from error
        except asyncio.TimeoutError as error:
            raise PassingError("timeout", "it did not answer in time") from error
        except ValueError as error:  # such as a name of a host that cannot be looked up
            if request.url == request.first:
                raise FetchError("invalid_url", "it is not a valid URL") from error
            raise FetchError("bad_response", "it redirects to an invalid URL") from error
        except (ConnectionError, ssl.SSLError) as error:
            raise PassingError("unreachable", f"the connection broke: {error}") from error
        return None

    async def _receive_body(
        self, response: aiohttp.ClientResponse, partial: Partial, named: str, time_limit: TimeLimit
    ) -> None:
        """Receive a body into a file.

        Raises:
            FetchError: It is too long, too short, empty, or not a video.
        """
        is_checked = False
        while chunk := await response.content.readany():
            if (wait_s := self._bytes.reserve(len(chunk))) > 0:
                time_limit.prolong(wait_s)
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


def _redirected(request: _Request, response: aiohttp.ClientResponse) -> _Request:
    """Return the request that follows a redirect. What a host may know goes to no other host."""
    target = answers.redirected(response, request.url)
    cookies = {}
    if answers.is_same_host(request.url, target):
        cookies = answers.cookies_of(response, request.cookies)
    return _Request(target, request.first, cookies)


def _extension(url: URL) -> str:
    return url.name.rpartition(".")[2].lower()
