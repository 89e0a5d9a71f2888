"""A web server on loopback whose files, answers and manners a test chooses.

Each path has one of the behaviors of this module: a file as a good server sends it, with ranges and
an ETag, or one of many ways to send it badly. The server counts requests and connections.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

from pipelines.common import storage

Behavior = Callable[[web.Request], Awaitable[web.StreamResponse]]
CHUNK_BYTES = 64 * 1024


def mp4(seed: int, size: int) -> bytes:
    """Bytes that look like the beginning of an MP4 file; they contain no video."""
    body = (storage.digest_of(f"{seed}".encode()) * (size // 64 + 1)).encode()
    return b"\0\0\0\x18ftypisom\0\0\0\0" + body[: size - 16]


@dataclass
class HttpServer:
    """What a server answers, and what it was asked."""

    host: str = "127.0.0.1"
    port: int = 0
    behaviors: dict[str, Behavior] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    """Number of requests by path."""
    headers: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    """Headers of all requests by path."""
    times: list[float] = field(default_factory=list)
    """Times of all requests, in seconds of `time.monotonic`."""
    most_at_once: int = 0
    """Largest number of requests that were answered at the same time."""
    _at_once: int = 0

    def url(self, path: str) -> str:
        """The URL of a path."""
        return f"http://{self.host}:{self.port}{path}"

    def add(self, path: str, behavior: Behavior) -> str:
        """Answer a path in some way; gives its URL."""
        self.behaviors[path] = behavior
        return self.url(path)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer a request."""
        path = request.path
        self.times.append(time.monotonic())
        self.requests[path] += 1
        self.headers.setdefault(path, []).append(dict(request.headers))
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            behavior = self.behaviors.get(path)
            if behavior is None:
                return web.Response(status=404, text="not here")
            return await behavior(request)
        finally:
            self._at_once -= 1

    def number_of(self, request: web.Request) -> int:
        """How often a path was asked for, counted from 1."""
        return self.requests[request.path]


def _range_start(request: web.Request, tag: str | None) -> int:
    """The first byte that is asked for; 0 unless the version is the one that is asked for."""
    asked = request.headers.get("Range")
    if asked is None or tag is None or request.headers.get("If-Range", tag) != tag:
        return 0
    return int(asked.removeprefix("bytes=").rstrip("-"))


def file(data: bytes, content_type: str = "video/mp4", tag: str | None = '"v1"') -> Behavior:
    """A file, or the rest of it if a range is asked for."""
    return _stream(data, content_type, tag)


def slow(data: bytes, bytes_per_s: float, tag: str | None = '"v1"') -> Behavior:
    """A file that is sent slowly."""
    return _stream(data, "video/mp4", tag, pause_s=CHUNK_BYTES / bytes_per_s)


def broken(
    server: HttpServer, data: bytes, after: int, times: int, tag: str | None = '"v1"'
) -> Behavior:
    """A file whose transfer is reset after some bytes, the first few times."""
    whole, part = _stream(data, "video/mp4", tag), _stream(data, "video/mp4", tag, reset=after)

    async def answer(request: web.Request) -> web.StreamResponse:
        return await (part if server.number_of(request) <= times else whole)(request)

    return answer


def without_ranges(server: HttpServer, data: bytes, after: int, times: int) -> Behavior:
    """A file whose transfer is reset the first few times, on a server that ignores ranges."""
    whole, part = _stream(data, "video/mp4", None), _stream(data, "video/mp4", None, reset=after)

    async def answer(request: web.Request) -> web.StreamResponse:
        return await (part if server.number_of(request) <= times else whole)(request)

    return answer


def changing(server: HttpServer, versions: list[bytes], after: int) -> Behavior:
    """A file of which each answer has a new version; all but the last one break off."""

    async def answer(request: web.Request) -> web.StreamResponse:
        number = min(server.number_of(request), len(versions))
        reset = after if number < len(versions) else None
        tag = f'"v{number}"'
        return await _stream(versions[number - 1], "video/mp4", tag, reset=reset)(request)

    return answer


def wrong_range(server: HttpServer, data: bytes, after: int) -> Behavior:
    """A server that breaks off, and then claims to send the rest but sends another part."""

    async def answer(request: web.Request) -> web.StreamResponse:
        if "Range" not in request.headers:
            broke = server.number_of(request) == 1
            return await _stream(data, "video/mp4", '"v1"', reset=after if broke else None)(request)
        headers = {"Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}", "ETag": '"v1"'}
        return web.Response(status=206, body=data, headers=headers)

    return answer


def endless(pause_s: float = 0.0) -> Behavior:
    """A video that never ends."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "video/mp4"})
        await response.prepare(request)
        await response.write(mp4(0, CHUNK_BYTES))
        while True:
            await response.write(b"\0" * CHUNK_BYTES)
            await asyncio.sleep(pause_s)

    return answer


def silent() -> Behavior:
    """A server that takes a request and never answers."""

    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(3600)
        return web.Response()

    return answer


def stalling(data: bytes, after: int, tag: str | None = None) -> Behavior:
    """A server that stops amid a file without closing the connection."""

    async def answer(request: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": "video/mp4", "Content-Length": f"{len(data)}"}
        if tag is not None:
            headers |= {"ETag": tag, "Accept-Ranges": "bytes"}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        await response.write(data[:after])
        await asyncio.sleep(3600)
        return response

    return answer


def stalling_once(server: HttpServer, data: bytes, after: int) -> Behavior:
    """A file whose first transfer stops after some bytes, with the connection left open."""
    whole, stalls = _stream(data, "video/mp4", '"v1"'), stalling(data, after, '"v1"')

    async def answer(request: web.Request) -> web.StreamResponse:
        return await (stalls if server.number_of(request) == 1 else whole)(request)

    return answer


def too_short(data: bytes, announced: int) -> Behavior:
    """A server that announces more bytes than it sends, and closes the connection."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": f"{announced}"})
        await response.prepare(request)
        await response.write(data)
        assert request.transport is not None
        request.transport.close()
        return response

    return answer


def status(
    code: int, headers: dict[str, str] | None = None, then: Behavior | None = None, times: int = 0
) -> Behavior:
    """A status, every time or only the first few times."""
    count = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal count
        count += 1
        if then is not None and count > times:
            return await then(request)
        return web.Response(status=code, headers=headers, text="an error")

    return answer


def redirect(target: str, code: int = 302) -> Behavior:
    """A redirect."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=code, headers={"Location": target})

    return answer


def body(data: bytes, content_type: str = "video/mp4", **headers: str) -> Behavior:
    """Some bytes under a content type that may be a lie."""

    async def answer(request: web.Request) -> web.StreamResponse:
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(body=data, headers={"Content-Type": content_type, **told})

    return answer


def raw(answer: bytes) -> Behavior:
    """Bytes instead of an answer of this server, after which the connection is closed."""

    async def send(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        assert isinstance(request.transport, asyncio.WriteTransport)
        request.transport.write(answer)
        request.transport.close()
        return web.Response()

    return send


def _stream(
    data: bytes,
    content_type: str,
    tag: str | None,
    *,
    pause_s: float = 0.0,
    reset: int | None = None,
) -> Behavior:
    async def answer(request: web.Request) -> web.StreamResponse:
        start = _range_start(request, tag)
        if start >= len(data) > 0:
            return web.Response(status=416)
        headers = {"Content-Type": content_type, "Content-Length": f"{len(data) - start}"}
        if tag is not None:
            headers |= {"ETag": tag, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        response = web.StreamResponse(status=206 if start else 200, headers=headers)
        await response.prepare(request)
        end = len(data) if reset is None else min(len(data), start + reset)
        for place in range(start, end, CHUNK_BYTES):
            await response.write(data[place : min(place + CHUNK_BYTES, end)])
            await asyncio.sleep(pause_s)
        if end < len(data):
            _reset(request)
        return response

    return answer


def _reset(request: web.Request) -> None:
    """Break the connection off. What was written before is sent first."""
    assert request.transport is not None
    request.transport.close()


@contextmanager
def http_server(host: str = "127.0.0.1") -> Iterator[HttpServer]:
    """A server in a thread of this process."""
    server, loop = HttpServer(host), asyncio.new_event_loop()
    ready, over = threading.Event(), asyncio.Event()

    async def serve() -> None:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", server.answer)
        runner = web.AppRunner(
            application, access_log=None, shutdown_timeout=0.1, handler_cancellation=True
        )
        await runner.setup()
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, 0))
            listener.listen(256)
            server.port = listener.getsockname()[1]
            await web.SockSite(runner, listener).start()
            ready.set()
            await over.wait()
            await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(30)
