"""What the answer of a server, or an error of the HTTP client, means for a URL."""

from __future__ import annotations

import email.utils
import errno
import re
import socket
import ssl
import time
from http import HTTPStatus

import aiohttp
from yarl import URL

from pipelines.common.config import hide_credentials
from pipelines.fetch.addresses import BlockedAddressError
from pipelines.fetch.config import FetchReason
from pipelines.fetch.failures import FetchError, PassingError
from pipelines.fetch.partial import Partial

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
PASSING_STATUSES = frozenset({408, 421, 425, 429, *range(500, 600)} - {501, 505, 511})
UNKNOWN_NAME = frozenset(
    getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA") if hasattr(socket, name)
)
MOST_SAID = 300
"""Number of characters of a message of a library or a server that are kept."""
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")


def check_status(response: aiohttp.ClientResponse, partial: Partial) -> None:
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
            said += f" and asks to wait {pause_s:.0f} s"
        raise PassingError("unavailable", said, pause_s)
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and partial.size:
        partial.restart(None, None)
        raise PassingError("incomplete", f"{said} to a request for the rest")
    raise FetchError("bad_response", said)


def begin_file(response: aiohttp.ClientResponse, partial: Partial, most_bytes: int) -> None:
    """Compare an answer with what was asked for and with what is there already.

    Args:
        response: The answer, which has the file or a part of it.
        partial: The file, which begins anew unless the answer has the rest of it.
        most_bytes: Largest length of the file.

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
        _continue(response, partial)
    if partial.total is not None and partial.total > most_bytes:
        raise FetchError(
            "too_large", f"it has {partial.total:,} bytes, more than max_bytes = {most_bytes:,}"
        )


def _continue(response: aiohttp.ClientResponse, partial: Partial) -> None:
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


def _validator(response: aiohttp.ClientResponse) -> str | None:
    """Return what identifies the version of a file: a strong ETag, or else its date."""
    tag = response.headers.get("ETag")
    if tag is not None and tag.startswith("W/"):
        return None
    validator = response.headers.get("Last-Modified") if tag is None else tag
    # Others cannot be sent back to the server as they came.
    return validator if validator is not None and validator.isascii() else None


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


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "(not a known status)"


def parsed(url: str) -> URL:
    """Return a URL as it is, or with what a URL cannot contain quoted.

    Raises:
        FetchError: It is not valid.
    """
    try:
        is_quoted = url.isascii() and url.isprintable() and " " not in url
        found = URL(url, encoded=is_quoted)
        _ = found.host, found.port
    except ValueError as error:  # whose text may have the password
        raise FetchError("invalid_url", "it is not a valid URL") from error
    return found


def redirected(response: aiohttp.ClientResponse, asked: URL) -> URL:
    """Return the URL that an answer redirects to.

    User and password stay with a URL of the same scheme, host and port, unless it has its own. They
    are never sent elsewhere.

    Args:
        response: The answer.
        asked: The URL that was asked for, with user and password.

    Raises:
        FetchError: It is not valid.
    """
    try:
        target = response.url.join(parsed(response.headers["Location"]))
        _ = target.host, target.port
        if target.raw_user is None and asked.raw_user is not None and is_same_host(asked, target):
            target = URL.build(
                scheme=target.scheme,
                authority=f"{asked.raw_authority.rpartition('@')[0]}@{target.raw_authority}",
                path=target.raw_path,
                query_string=target.raw_query_string,
                encoded=True,
            )
    except (FetchError, ValueError) as error:
        raise FetchError("bad_response", "it redirects to an invalid URL") from error
    return target


def is_same_host(one: URL, other: URL) -> bool:
    """Return whether two URLs have the same scheme, host and port."""
    return (one.scheme, one.host, one.port) == (other.scheme, other.host, other.port)


def cookies_of(response: aiohttp.ClientResponse, before: dict[str, str]) -> dict[str, str]:
    """Return the cookies to send to the same host next, by name.

    Args:
        response: The answer that redirects there.
        before: Cookies that were sent to it.
    """
    cookies = dict(before)
    for name, morsel in response.cookies.items():
        if morsel["max-age"] == "0" or not morsel.value:
            cookies.pop(name, None)
        else:
            cookies[name] = morsel.coded_value
    return cookies


def shown(url: URL) -> str:
    """Return a URL for a message, without user, password and query."""
    return str(url.with_user(None).with_query(None)) if url.host else f"{url.scheme}:..."


def presentable(text: str) -> str:
    """Return a text of a server or a library without credentials, as it can be written to files."""
    return hide_credentials(text.encode(errors="backslashreplace").decode())


def explained(error: aiohttp.ClientError) -> FetchError:
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
