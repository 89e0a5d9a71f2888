"""Rate of fetching videos on Ray, against a plain loop in one process with as many connections.

Both fetch 1,000 files of 3 MB from a server on loopback, which is a process of its own. The loop
checks nothing: no addresses, types, lengths or checksums, and no limits. Files are written to
memory, where the fetch job's own work counts most, and to disk, where both wait until a file is
safe. Rates are steady-state rates: starting Ray and its workers does not count.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
from aiohttp import web

from pipelines.bench.harness import Measured, Row, end_with_parent, higher
from pipelines.fetch.config import FetchConfig
from pipelines.fetch.run import run_fetch

logger = logging.getLogger(__name__)

URLS = 1000
SIZE_BYTES = 3 * 10**6
CONNECTIONS = 32
MEMORY = Path("/dev/shm")
"""Folder in memory, on Linux. It needs room for the files, 3 GB."""


def measure(repeats: int, connect: Callable[[], None]) -> list[Row]:
    """Measure files per second of the fetch job and of the loop, in memory and on disk."""
    connect()
    memory = str(MEMORY) if MEMORY.is_dir() else None
    with _server() as address:
        _warm_up(address)
        in_memory = _compare("memory", address, memory, repeats)
        on_disk = _compare("disk", address, None, repeats)
    return [
        higher("fetch", "files/s", *in_memory),
        higher("fetch/disk", "files/s", *on_disk),
    ]


def _warm_up(address: str) -> None:
    """Let the workers start and import what they need."""
    with TemporaryDirectory() as folder:
        annotations = Path(folder) / "list.txt"
        urls = [f"{address}/{number}.mp4" for number in range(CONNECTIONS)]
        annotations.write_text("\n".join(urls), encoding="ascii")
        _fetch(annotations, Path(folder) / "videos", CONNECTIONS)


def _compare(
    where: str, address: str, parent: str | None, repeats: int
) -> tuple[Measured, Measured]:
    """Return the rates of the fetch job and of the loop, in files per second."""
    fetched, looped = [], []
    urls = [f"{address}/{number}.mp4" for number in range(URLS)]
    with TemporaryDirectory(dir=parent) as folder:
        annotations, output = Path(folder) / "list.txt", Path(folder) / "videos"
        annotations.write_text("\n".join(urls), encoding="ascii")
        for repeat in range(repeats):
            for name in ("fetch", "loop") if repeat % 2 == 0 else ("loop", "fetch"):
                if name == "loop":
                    looped.append(asyncio.run(_loop(urls, output, sync=where == "disk")))
                else:
                    fetched.append(_fetch(annotations, output, URLS))
                shutil.rmtree(output)
            logger.info(
                "run %d of %d in %s: fetch %.1f files/s, loop %.1f",
                repeat + 1,
                repeats,
                where,
                fetched[-1],
                looped[-1],
            )
    return Measured(fetched), Measured(looped)


def _fetch(annotations: Path, output: Path, count: int) -> float:
    """Return files per second of the fetch job, or 0 if it is too fast to tell."""
    summary = run_fetch(
        FetchConfig(
            annotations=(str(annotations),),
            output=str(output),
            connections=CONNECTIONS,
            connections_per_host=CONNECTIONS,
            requests_per_s=None,
            allow_http=True,
            allow_private=True,
        )
    )
    assert (summary["fetched"], summary["bytes"]) == (count, count * SIZE_BYTES), summary
    return summary["urls_per_s"] or 0.0


async def _loop(urls: list[str], output: Path, sync: bool) -> float:
    """Return files per second of a loop that only fetches and writes.

    Args:
        urls: What to fetch.
        output: Folder of the files.
        sync: Whether a file counts once it is on disk, as a file of the fetch job does.
    """
    output.mkdir()
    remaining = iter(enumerate(urls))
    started = time.perf_counter()
    async with aiohttp.ClientSession() as session:

        async def lane() -> None:
            for number, url in remaining:
                async with session.get(url) as response:
                    response.raise_for_status()
                    with (output / f"{number}.mp4").open("wb") as file:
                        async for chunk in response.content.iter_any():
                            file.write(chunk)
                        if sync:
                            file.flush()
                            await asyncio.to_thread(os.fsync, file.fileno())

        await asyncio.gather(*(lane() for _ in range(CONNECTIONS)))
    return len(urls) / (time.perf_counter() - started)


@contextmanager
def _server() -> Iterator[str]:
    """Provide the address of a server, in a process of its own, that has every file."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        file = Path(folder) / "video.mp4"
        file.write_bytes(b"\0\0\0\x18ftypisom".ljust(SIZE_BYTES, b"x"))
        child = context.Process(target=_serve, args=(sender, file), daemon=True)
        child.start()
        try:
            yield f"http://127.0.0.1:{receiver.recv()}"
        finally:
            child.terminate()
            child.join()


def _serve(sender: Connection, file: Path) -> None:
    end_with_parent()
    asyncio.run(_answer(sender, file))


async def _answer(sender: Connection, file: Path) -> None:
    async def answer(request: web.Request) -> web.FileResponse:
        return web.FileResponse(file)  # the kernel sends it, as servers of videos do

    application = web.Application()
    application.router.add_get("/{name}", answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    sender.send(runner.addresses[0][1])
    await asyncio.Event().wait()
