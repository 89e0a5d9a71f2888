"""Fetching single URLs from a server on loopback that misbehaves in many ways."""

from __future__ import annotations

import asyncio
import errno
import gzip
import hashlib
import json
import random
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pipelines.artifacts.manifest import url_key
from pipelines.fetch import addresses, hosts
from pipelines.fetch.checksums import new_checksum
from pipelines.fetch.config import FetchConfig
from pipelines.fetch.download import Downloader
from pipelines.fetch.outcomes import Failed, Fetched
from pipelines.fetch.partial import open_partial, remove_unfinished
from stgt.errors import STGTError
from tests.helpers import http_server as behave
from tests.helpers.http_server import HttpServer, http_server, mp4

MB = 1024**2


@pytest.fixture(scope="module")
def shared() -> Iterator[HttpServer]:
    with http_server() as server:
        yield server


@pytest.fixture
def server(shared: HttpServer) -> HttpServer:
    """The server, without what earlier tests have asked it."""
    shared.behaviors.clear()
    shared.requests.clear()
    shared.headers.clear()
    shared.times.clear()
    shared.most_at_once = 0
    return shared


def fetch(folder: Path, *urls: str, **settings: Any) -> list[Fetched | Failed]:
    """Fetch URLs at the same time."""
    values: dict[str, Any] = {
        "annotations": ("list.txt",), "output": str(folder), "allow_http": True,
        "allow_private": True, "max_pause_s": 2.0, "attempts": 3, "requests_per_s": None,
    }  # fmt: skip
    config = FetchConfig(**{**values, **settings})

    async def work() -> list[Fetched | Failed]:
        async with Downloader(config, str(folder), folder / ".partial") as downloader:
            return list(
                await asyncio.gather(*(downloader.fetch(url_key(url), url) for url in urls))
            )

    return asyncio.run(work())


def reason(folder: Path, url: str, **settings: Any) -> str:
    """The reason why a URL fails. Nothing of it may be left that cannot be continued."""
    (outcome,) = fetch(folder, url, **settings)
    assert isinstance(outcome, Failed), outcome
    assert [path for path in folder.rglob("*.mp4") if path.is_file()] == []
    return outcome.reason


def good(folder: Path, url: str, data: bytes, **settings: Any) -> Fetched:
    """A URL that is fetched and has this content."""
    (outcome,) = fetch(folder, url, **settings)
    assert isinstance(outcome, Fetched), outcome
    assert (folder / outcome.file).read_bytes() == data
    assert outcome.size_bytes == len(data)
    checksum = new_checksum(settings.get("checksum", "blake3"))
    checksum.update(data)
    assert outcome.checksum == checksum.hexdigest()
    assert list((folder / ".partial").iterdir()) == []
    return outcome


def test_a_file_is_put_under_the_hash_of_its_url(server: HttpServer, tmp_path: Path) -> None:
    data = mp4(1, 100_000)
    url = server.add("/a/video.mp4", behave.file(data))
    key = hashlib.sha256(url.encode()).hexdigest()[:32]
    assert good(tmp_path, url, data).file == f"{key[:2]}/{key}.mp4"
    (headers,) = server.headers["/a/video.mp4"]
    assert headers["Accept-Encoding"] == "identity"
    assert "Range" not in headers


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "an HTML page"),
        (b"\xef\xbb\xbf\n <?xml version='1.0'?><Error/>", "an XML document"),
        (b'{"error": "gone"}', "a JSON document"),
        (b"#EXTM3U\n#EXT-X-VERSION:3\n", "a playlist"),
        (b"Too many requests", "a text"),
        (b"PK\x03\x04" + b"\0" * 2000, "a zip archive"),
        (b"\0" * 5000, "something that begins with the bytes 0000000000000000"),
    ],
)
def test_what_is_not_a_video_is_told_by_its_bytes_and_not_by_its_type(
    server: HttpServer, tmp_path: Path, data: bytes, name: str
) -> None:
    url = server.add("/lie.mp4", behave.body(data, "video/mp4"))
    (outcome,) = fetch(tmp_path, url)
    assert isinstance(outcome, Failed)
    assert outcome.reason == "not_a_video"
    assert name in outcome.message
    assert server.requests["/lie.mp4"] == 1


@pytest.mark.parametrize(
    ("code", "expected", "requests"),
    [
        (404, "missing", 1),
        (410, "missing", 1),
        (401, "forbidden", 1),
        (403, "forbidden", 1),
        (451, "forbidden", 1),
        (429, "unavailable", 3),
        (500, "unavailable", 3),
        (503, "unavailable", 3),
        (400, "bad_response", 1),
        (204, "bad_response", 1),
    ],
)
def test_statuses_have_reasons_and_only_those_that_may_pass_are_tried_again(
    server: HttpServer, tmp_path: Path, code: int, expected: str, requests: int
) -> None:
    url = server.add("/x.mp4", behave.status(code))
    assert reason(tmp_path, url, max_pause_s=0.01) == expected
    assert server.requests["/x.mp4"] == requests


def test_a_server_that_recovers_costs_only_pauses(server: HttpServer, tmp_path: Path) -> None:
    data = mp4(2, 5000)
    url = server.add("/x.mp4", behave.status(503, then=behave.file(data), times=2))
    good(tmp_path, url, data, max_pause_s=0.01)


@pytest.mark.slow
def test_the_pause_that_a_server_asks_for_is_kept_for_all_urls_of_the_host(
    server: HttpServer, tmp_path: Path
) -> None:
    data = mp4(3, 5000)
    busy = behave.status(429, {"Retry-After": "1"}, behave.file(data), times=1)
    urls = [server.add("/busy.mp4", busy), server.add("/b.mp4", behave.file(data))]
    outcomes = fetch(tmp_path, *urls, connections=1, connections_per_host=1)
    assert all(isinstance(one, Fetched) for one in outcomes)
    assert server.requests == {"/busy.mp4": 2, "/b.mp4": 1}
    assert server.times[1] - server.times[0] >= 0.99


def test_a_server_that_asks_for_a_longer_pause_than_allowed_is_left_alone(
    server: HttpServer, tmp_path: Path
) -> None:
    url = server.add("/x.mp4", behave.status(503, {"Retry-After": "3600"}))
    started = time.monotonic()
    assert reason(tmp_path, url, max_pause_s=5) == "unavailable"
    assert server.requests["/x.mp4"] == 1
    assert time.monotonic() - started < 4


def test_a_reset_transfer_is_continued_where_it_broke_off(
    server: HttpServer, tmp_path: Path
) -> None:
    data = mp4(4, 3 * MB)
    url = server.add("/x.mp4", behave.broken(server, data, after=2 * MB, times=1))
    good(tmp_path, url, data, max_pause_s=0.01)
    first, second = server.headers["/x.mp4"]
    assert "Range" not in first
    assert second["If-Range"] == '"v1"'
    start = int(second["Range"].removeprefix("bytes=").removesuffix("-"))
    assert MB < start <= 2 * MB


def test_attempts_that_gain_nothing_are_counted_and_others_are_not(
    server: HttpServer, tmp_path: Path
) -> None:
    data = mp4(5, 9 * MB)
    url = server.add("/x.mp4", behave.broken(server, data, after=3 * MB // 2, times=6))
    good(tmp_path, url, data, attempts=2, max_pause_s=0.01)
    assert server.requests["/x.mp4"] == 6
    stuck = server.add("/stuck.mp4", behave.broken(server, data, after=1000, times=99))
    assert reason(tmp_path / "b", stuck, attempts=2, max_pause_s=0.01) == "incomplete"
    assert server.requests["/stuck.mp4"] == 2


def test_a_server_that_ignores_ranges_sends_the_file_anew(
    server: HttpServer, tmp_path: Path
) -> None:
    data = mp4(6, 3 * MB)
    url = server.add("/x.mp4", behave.without_ranges(server, data, after=2 * MB, times=1))
    good(tmp_path, url, data, max_pause_s=0.01)


def test_versions_of_a_file_are_never_mixed(server: HttpServer, tmp_path: Path) -> None:
    versions = [mp4(7, 3 * MB), mp4(8, 3 * MB)]
    url = server.add("/x.mp4", behave.changing(server, versions, after=2 * MB))
    good(tmp_path, url, versions[1], max_pause_s=0.01)


def test_a_wrong_part_is_noticed(server: HttpServer, tmp_path: Path) -> None:
    data = mp4(9, 3 * MB)
    url = server.add("/x.mp4", behave.wrong_range(server, data, after=2 * MB))
    good(tmp_path, url, data, max_pause_s=0.01)
    assert [("Range" in one) for one in server.headers["/x.mp4"]] == [False, True, False]


def test_a_later_run_continues_an_unfinished_file(server: HttpServer, tmp_path: Path) -> None:
    data = mp4(10, 4 * MB)
    url = server.add("/x.mp4", behave.slow(data, bytes_per_s=8 * MB))
    assert reason(tmp_path, url, time_limit_s=0.3) == "timeout"
    server.add("/x.mp4", behave.file(data))
    good(tmp_path, url, data)
    assert "Range" in server.headers["/x.mp4"][1]


def test_a_complete_file_that_was_not_moved_yet_is_not_fetched_again(
    server: HttpServer, tmp_path: Path
) -> None:
    data = mp4(23, 2 * MB)
    url = server.url("/x.mp4")
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / url_key(url)).write_bytes(data)
    facts = {"validator": '"v1"', "total": len(data)}
    (tmp_path / ".partial" / f"{url_key(url)}.json").write_text(json.dumps(facts))
    good(tmp_path, url, data)
    assert server.requests["/x.mp4"] == 0


def test_an_unfinished_file_without_a_version_is_overwritten_as_a_whole(
    server: HttpServer, tmp_path: Path
) -> None:
    data = mp4(27, 5000)
    url = server.add("/x.mp4", behave.file(data))
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / url_key(url)).write_bytes(mp4(28, 9000))
    good(tmp_path, url, data)


def test_no_version_of_an_earlier_file_stays_beside_a_new_one(tmp_path: Path) -> None:
    facts = tmp_path / "key.json"
    facts.write_text('{"validator": "\\"v1\\"", "total": 5000000}')

    async def begin() -> None:
        partial = await open_partial(str(tmp_path), "key", "blake3")
        partial.restart(None, None)
        assert not facts.exists()
        partial.close(keep=True)

    asyncio.run(begin())
    assert list(tmp_path.iterdir()) == []


def test_a_transfer_that_stalls_can_be_continued_by_a_later_run(tmp_path: Path) -> None:
    async def begin() -> None:
        partial = await open_partial(str(tmp_path), "key", "blake3")
        partial.restart('"v1"', 5 * MB)
        partial.write(mp4(1, 2 * MB))
        while not (tmp_path / "key.json").exists():  # a process that is killed now leaves both
            await asyncio.sleep(0.01)
        for ending in ("", ".json"):
            shutil.copy(tmp_path / f"key{ending}", tmp_path / f"later{ending}")
        later = await open_partial(str(tmp_path), "later", "blake3")
        assert (later.size, later.validator, later.total) == (2 * MB, '"v1"', 5 * MB)
        for one in (later, partial):
            one.close(keep=False)

    asyncio.run(asyncio.wait_for(begin(), 60))


def test_a_version_that_cannot_be_written_down_ends_the_transfer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def receive() -> None:
        partial = await open_partial(str(tmp_path), "key", "blake3")
        partial.restart('"v1"', 5 * MB)
        monkeypatch.setattr(Path, "write_text", full)
        try:
            while True:
                partial.write(b"x")
                await asyncio.sleep(0.01)
        finally:
            partial.close(keep=True)  # of which nothing comes: it could not be continued

    with pytest.raises(OSError, match="No space left"):
        asyncio.run(asyncio.wait_for(receive(), 60))
    assert list(tmp_path.iterdir()) == []


def test_unfinished_files_are_not_written_through_links(server: HttpServer, tmp_path: Path) -> None:
    url = server.add("/x.mp4", behave.file(mp4(29, 5000)))
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / url_key(url)).symlink_to(mine)
    with pytest.raises(STGTError, match=r"is a symbolic link; remove it"):
        fetch(tmp_path, url)
    assert mine.read_text() == "mine"


def test_a_damaged_record_of_an_unfinished_file_means_a_new_beginning(
    server: HttpServer, tmp_path: Path
) -> None:
    data = mp4(11, 4 * MB)
    url = server.add("/x.mp4", behave.slow(data, bytes_per_s=8 * MB))
    assert reason(tmp_path, url, time_limit_s=0.3) == "timeout"
    server.add("/x.mp4", behave.file(data))
    (facts,) = (tmp_path / ".partial").glob("*.json")
    facts.write_text('{"validator": ')
    good(tmp_path, url, data)
    assert "Range" not in server.headers["/x.mp4"][1]


def test_a_server_that_announces_more_than_it_sends_is_noticed(
    server: HttpServer, tmp_path: Path
) -> None:
    url = server.add("/x.mp4", behave.too_short(mp4(12, 5000), announced=9000))
    assert reason(tmp_path, url, max_pause_s=0.01) == "incomplete"
    assert server.requests["/x.mp4"] == 3


def test_an_empty_body_has_its_own_reason(server: HttpServer, tmp_path: Path) -> None:
    assert reason(tmp_path, server.add("/x.mp4", behave.body(b""))) == "empty"


def test_bodies_that_are_too_large_are_cut(server: HttpServer, tmp_path: Path) -> None:
    announced = server.add("/announced.mp4", behave.file(mp4(13, MB)))
    assert reason(tmp_path, announced, max_bytes=500_000) == "too_large"
    endless = server.add("/endless.mp4", behave.endless())
    assert reason(tmp_path, endless, max_bytes=500_000) == "too_large"
    assert list((tmp_path / ".partial").iterdir()) == []


@pytest.mark.slow
def test_a_body_that_never_ends_slowly_runs_out_of_time(server: HttpServer, tmp_path: Path) -> None:
    url = server.add("/x.mp4", behave.endless(pause_s=0.02))
    started = time.monotonic()
    assert reason(tmp_path, url, time_limit_s=0.4) == "timeout"
    assert time.monotonic() - started < 5


@pytest.mark.slow
def test_servers_that_stop_or_never_answer_are_given_up(server: HttpServer, tmp_path: Path) -> None:
    silent = server.add("/silent.mp4", behave.silent())
    stalling = server.add("/stalling.mp4", behave.stalling(mp4(14, 9000), after=4000))
    for url in (silent, stalling):
        assert reason(tmp_path, url, idle_s=0.2, attempts=2, max_pause_s=0.01) == "timeout"
    assert server.requests["/silent.mp4"] == 2


def test_a_host_that_refuses_connections_is_unreachable(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/x.mp4"
    assert reason(tmp_path, url, attempts=2, max_pause_s=0.01) == "unreachable"


def test_a_host_that_accepts_no_connection_is_unreachable(tmp_path: Path) -> None:
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for one in (first, second):  # nobody takes these up, so there is no room for another
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.mp4"
        assert reason(tmp_path, url, attempts=1, connect_s=0.3) == "unreachable"


@pytest.mark.slow
def test_after_many_urls_without_an_answer_a_host_is_not_asked_again(
    server: HttpServer, tmp_path: Path
) -> None:
    dead = [f"http://127.0.0.1:9/{number}.mp4" for number in range(30)]
    alive = server.add("/x.mp4", behave.file(mp4(15, 5000)))
    config = FetchConfig(
        annotations=("list.txt",), output=str(tmp_path), allow_http=True, allow_private=True,
        attempts=1,
    )  # fmt: skip

    async def work() -> list[Fetched | Failed]:
        async with Downloader(config, str(tmp_path), tmp_path / ".partial") as downloader:
            return [await downloader.fetch(url_key(url), url) for url in (*dead, alive)]

    *failed, last = asyncio.run(work())
    assert isinstance(last, Fetched)
    messages = [one.message for one in failed if isinstance(one, Failed)]
    assert sum("not tried" in message for message in messages) == 10
    assert {one.reason for one in failed if isinstance(one, Failed)} == {"unreachable"}


def test_compressed_bodies_are_refused_and_never_unpacked(
    server: HttpServer, tmp_path: Path
) -> None:
    bomb = gzip.compress(mp4(0, 1000) + b"\0" * 10 * MB)
    told = server.add("/told.mp4", behave.body(bomb, Content_Encoding="gzip"))
    untold = server.add("/untold.mp4", behave.body(bomb))
    for url in (told, untold):
        assert reason(tmp_path, url, max_bytes=MB) == "not_a_video"


def test_redirects_are_followed_up_to_a_number(server: HttpServer, tmp_path: Path) -> None:
    data = mp4(16, 5000)
    server.add("/end.mp4", behave.file(data))
    server.add("/2", behave.redirect("/end.mp4", 307))
    url = server.add("/1", behave.redirect(server.url("/2")))
    good(tmp_path, url, data, max_redirects=2)
    assert reason(tmp_path / "b", url, max_redirects=1) == "too_many_redirects"
    around = server.add("/around", behave.redirect("/around"))
    assert reason(tmp_path / "b", around) == "too_many_redirects"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("file:///etc/passwd", "invalid_url"),
        ("ftp://127.0.0.1/x.mp4", "invalid_url"),
        ("https://[::1", "bad_response"),
    ],
)
def test_redirects_to_other_things_than_urls_are_refused(
    server: HttpServer, tmp_path: Path, target: str, expected: str
) -> None:
    assert reason(tmp_path, server.add("/x.mp4", behave.redirect(target))) == expected


@pytest.mark.parametrize(
    "host",
    ["www..b", ".a", "a" * 64 + ".example", "xn--", "xn--a.example", "a.xn--.example"],
)
def test_hosts_whose_names_cannot_be_looked_up_fail_alone(
    server: HttpServer, tmp_path: Path, host: str
) -> None:
    assert reason(tmp_path, f"http://{host}/x.mp4") == "invalid_url"
    url = server.add("/x.mp4", behave.redirect(f"http://{host}/x.mp4"))
    assert reason(tmp_path, url) == "bad_response"


def test_a_user_name_that_cannot_be_sent_fails_alone(server: HttpServer, tmp_path: Path) -> None:
    server.add("/x.mp4", behave.file(mp4(1, 5000)))
    for user in ("a%3Ab", "%E4%B8%AD"):
        url = f"http://{user}:hunter22@127.0.0.1:{server.port}/x.mp4"
        assert reason(tmp_path, url) == "invalid_url"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (b"200 OK\r\nContent-Encoding: \xff", "not_a_video"),
        (b"200 OK\r\nContent-Length: " + b"9" * 5000, "bad_response"),
        (b"206 Partial\r\nContent-Range: bytes \xff", "bad_response"),
        (b"206 Partial\r\nContent-Range: bytes 0-1/" + b"9" * 5000, "bad_response"),
        (b"206 Partial\r\nContent-Range: bytes 0-" + b"9" * 5000 + b"/5", "bad_response"),
        (b"302 \xff\r\nLocation: http://\xff\xfe/", "bad_response"),
        (b"302 Found\r\nLocation: http://a.example:" + b"9" * 5000, "bad_response"),
        (b"302 Found\r\nLocation: http://" + b"a" * 5000 + b"/", "bad_response"),
        (b"302 Found\r\nLocation: \xff:\xff", "missing"),
        (b"299 \xff", "bad_response"),
        (b"503 Busy\r\nRetry-After: " + b"9" * 5000, "unavailable"),
        (b"503 Busy\r\nRetry-After: Mon, 01 Jan 9999999999999999999 00:00:00", "unavailable"),
        (b"503 Busy\r\nRetry-After: Mon, 01 Jan 2024 00:00:00 +9999999999999", "unavailable"),
        (b"503 Busy\r\nRetry-After: \xff", "unavailable"),
        (b"\xff\xff", "bad_response"),
        (b"200 OK\r\nContent-Length: 9\r\nETag: \xff\r\nLast-Modified: \xff", "not_a_video"),
    ],
)
def test_no_header_of_a_server_does_more_than_fail_its_url(
    server: HttpServer, tmp_path: Path, headers: bytes, expected: str
) -> None:
    answer = b"HTTP/1.1 " + headers + b"\r\nConnection: close\r\n\r\n" + b"x" * 9
    (outcome,) = fetch(
        tmp_path, server.add("/x.mp4", behave.raw(answer)), attempts=2, max_pause_s=0.01
    )
    assert isinstance(outcome, Failed)
    assert outcome.reason == expected, outcome
    outcome.message.encode()  # it can be written to a table


def test_a_length_of_thousands_of_digits_is_no_length(server: HttpServer, tmp_path: Path) -> None:
    data = mp4(26, 3 * MB)
    broken = behave.broken(server, data, after=2 * MB, times=1)
    url = server.url("/x.mp4")

    async def answer(request: web.Request) -> web.StreamResponse:
        if "Range" not in request.headers:
            return await broken(request)
        start = request.headers["Range"].removeprefix("bytes=")
        told = f"Content-Range: bytes {start}{'9' * 9}/{'9' * 5000}"
        return await behave.raw(f"HTTP/1.1 206 Partial\r\n{told}\r\n\r\n".encode())(request)

    server.add("/x.mp4", answer)
    good(tmp_path, url, data, max_pause_s=0.01)
    assert [("Range" in one) for one in server.headers["/x.mp4"]] == [False, True, False]


def test_a_version_that_cannot_be_asked_for_means_a_new_beginning(
    server: HttpServer, tmp_path: Path
) -> None:
    data = mp4(24, 3 * MB)
    head = f'HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\nETag: "'.encode()
    part, whole = behave.raw(head + b'\xff"\r\n\r\n' + data[: 2 * MB]), behave.file(data)

    async def answer(request: web.Request) -> web.StreamResponse:
        return await (part if server.number_of(request) == 1 else whole)(request)

    url = server.add("/x.mp4", answer)
    good(tmp_path, url, data, max_pause_s=0.01)
    assert "Range" not in server.headers["/x.mp4"][1]


def test_an_error_that_nobody_has_thought_of_fails_its_url_alone(
    server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def is_public(address: str) -> bool:
        raise LookupError("unforeseen, at http://h/?token=hunter22")

    monkeypatch.setattr(addresses, "is_public", is_public)
    url = server.add("/x.mp4", behave.file(mp4(25, 5000)))
    (outcome,) = fetch(tmp_path, url, allow_private=False)
    assert isinstance(outcome, Failed)
    assert (outcome.reason, outcome.is_silent) == ("bad_response", False)
    assert "LookupError" in outcome.message
    assert "in is_public" in caplog.text
    assert "hunter22" not in caplog.text + outcome.message


def test_pauses_do_not_grow_while_attempts_gain(
    server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest: list[float] = []

    def uniform(low: float, high: float) -> float:
        longest.append(high)
        return 0.0

    monkeypatch.setattr(random, "uniform", uniform)
    data = mp4(32, 9 * MB)
    url = server.add("/x.mp4", behave.broken(server, data, after=3 * MB // 2, times=5))
    good(tmp_path, url, data, max_pause_s=60.0)
    assert longest == [0.5] * 5
    stuck = server.add("/stuck.mp4", behave.status(500))
    longest.clear()
    assert reason(tmp_path / "b", stuck, attempts=4, max_pause_s=1.5) == "unavailable"
    assert longest[:3] == [0.5, 1.0, 1.5]


@pytest.mark.slow
def test_waiting_for_the_limit_on_bytes_takes_no_time_of_a_url(
    server: HttpServer, tmp_path: Path
) -> None:
    data = mp4(33, 256 * 1024)
    urls = [server.add(f"/{number}.mp4", behave.slow(data, 64 * MB)) for number in range(3)]
    outcomes = fetch(tmp_path, *urls, bytes_per_s=MB, time_limit_s=0.4)
    assert all(isinstance(one, Fetched) for one in outcomes), outcomes


def test_a_host_that_is_never_available_is_not_asked_again(
    server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [server.add(f"/{number}.mp4", behave.status(503)) for number in range(24)]
    settings = {"attempts": 1, "connections_per_host": 1, "connections": 1}
    outcomes = fetch(tmp_path, *urls, **settings)
    assert len(server.requests) == 24  # it may have been a short outage
    monkeypatch.setattr(hosts, "UNAVAILABLE_S", 0.0)
    server.requests.clear()

    async def one_after_another() -> None:
        config = FetchConfig(
            annotations=("list.txt",), output=str(tmp_path), allow_http=True, allow_private=True,
            attempts=1, requests_per_s=None,
        )  # fmt: skip
        async with Downloader(config, str(tmp_path), tmp_path / ".partial") as downloader:
            outcomes[:] = [await downloader.fetch(url_key(url), url) for url in urls]

    asyncio.run(one_after_another())
    assert {one.reason for one in outcomes if isinstance(one, Failed)} == {"unavailable"}
    assert len(server.requests) == 20
    assert isinstance(outcomes[-1], Failed)
    assert "was not tried, since 127.0.0.1 was not available" in outcomes[-1].message


@pytest.mark.slow
def test_the_only_host_is_waited_for_when_it_falls_silent(
    server: HttpServer, tmp_path: Path
) -> None:
    first = server.add("/first.mp4", behave.file(mp4(30, 5000)))
    silent = [server.add(f"/{number}.mp4", behave.silent()) for number in range(20)]
    last = server.add("/last.mp4", behave.file(mp4(31, 5000)))
    settings = FetchConfig(
        annotations=("list.txt",), output=str(tmp_path), allow_http=True, allow_private=True,
        attempts=1, max_pause_s=0.05, idle_s=0.05, requests_per_s=None,
    )  # fmt: skip

    async def begin(downloader: Downloader) -> None:
        assert isinstance(await downloader.fetch(url_key(first), first), Fetched)
        await asyncio.gather(*(downloader.fetch(url_key(url), url) for url in silent))

    async def work(other: HttpServer) -> None:
        async with Downloader(settings, str(tmp_path), tmp_path / ".partial") as downloader:
            await begin(downloader)
            assert isinstance(await downloader.fetch(url_key(last), last), Fetched)
        async with Downloader(settings, str(tmp_path), tmp_path / ".partial") as downloader:
            await begin(downloader)
            # Another host answers, so the network is not the problem.
            assert isinstance(await downloader.fetch("0" * 32, other.url("/gone")), Failed)
            outcome = await downloader.fetch(url_key(last), last)
            assert isinstance(outcome, Failed)
            assert "was not tried" in outcome.message
        server.add("/last.mp4", behave.silent())
        async with Downloader(settings, str(tmp_path), tmp_path / ".partial") as downloader:
            await begin(downloader)
            with pytest.raises(STGTError, match=r"127\.0\.0\.1 has answered before but no longer"):
                await downloader.fetch(url_key(last), last)

    with http_server() as other:
        asyncio.run(work(other))


def test_credentials_of_a_url_are_sent_to_its_host_and_not_to_another(
    server: HttpServer, tmp_path: Path
) -> None:
    data = mp4(17, 5000)
    with http_server() as other:
        other.add("/x.mp4", behave.file(data))
        server.add("/x.mp4", behave.redirect(other.url("/x.mp4")))
        url = f"http://user:hunter22@127.0.0.1:{server.port}/x.mp4"
        good(tmp_path, url, data)
        assert server.headers["/x.mp4"][0]["Authorization"].startswith("Basic ")
        assert "Authorization" not in other.headers["/x.mp4"][0]
        assert "Referer" not in other.headers["/x.mp4"][0]
    (failed,) = fetch(tmp_path, "http://user:hunter22@127.0.0.1:9/x?token=hunter22", attempts=1)
    assert isinstance(failed, Failed)
    assert "hunter22" not in failed.message


def test_credentials_and_cookies_stay_with_redirects_on_the_same_host(
    server: HttpServer, tmp_path: Path
) -> None:
    data = mp4(34, 5000)

    async def set_cookie(request: web.Request) -> web.StreamResponse:
        answer = web.Response(status=302, headers={"Location": "/second?a=b"})
        answer.set_cookie("session", "one")
        answer.set_cookie("other", "two")
        return answer

    async def change_cookie(request: web.Request) -> web.StreamResponse:
        answer = web.Response(status=302, headers={"Location": server.url("/end.mp4")})
        answer.set_cookie("session", "three")
        answer.del_cookie("other")
        return answer

    server.add("/first", set_cookie)
    server.add("/second", change_cookie)
    server.add("/end.mp4", behave.file(data))
    good(tmp_path, f"http://user:hunter22@127.0.0.1:{server.port}/first", data)
    asked = [server.headers[path][0] for path in ("/first", "/second", "/end.mp4")]
    assert len({headers["Authorization"] for headers in asked}) == 1
    assert [headers.get("Cookie") for headers in asked] == [
        None, "session=one; other=two", "session=three"
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["port", "name", "user"])
def test_credentials_and_cookies_do_not_follow_to_another_host(
    server: HttpServer, tmp_path: Path, kind: str
) -> None:
    data = mp4(35, 5000)
    with http_server() as other:
        other.add("/end.mp4", behave.redirect(server.url("/back.mp4")))
        server.add("/back.mp4", behave.file(data))
        server.add("/end.mp4", behave.file(data))
        target = {
            "port": other.url("/end.mp4"),
            "name": f"http://localhost:{server.port}/end.mp4",
            "user": f"http://another:one@127.0.0.1:{server.port}/end.mp4",
        }[kind]

        async def answer(request: web.Request) -> web.StreamResponse:
            found = web.Response(status=302, headers={"Location": target})
            found.set_cookie("session", "hunter22")
            return found

        server.add("/first.mp4", answer)
        good(tmp_path, f"http://user:hunter22@127.0.0.1:{server.port}/first.mp4", data)
        later = [*other.headers.get("/end.mp4", ()), *server.headers.get("/back.mp4", ())]
        later += server.headers.get("/end.mp4", ())
        mine = server.headers["/first.mp4"][0]["Authorization"]
        assert mine not in [headers.get("Authorization") for headers in later]
        if kind == "user":  # the host is the same, but the redirect names another user
            assert later[0]["Authorization"].startswith("Basic ")
        else:
            assert all("Authorization" not in headers for headers in later)
            assert all("Cookie" not in headers for headers in later)


@pytest.mark.parametrize("secret", ["?key=hunter22", "?a=1;token=hunter22", ";token=hunter22"])
def test_secrets_of_a_url_are_not_told_with_what_its_server_has_done(
    server: HttpServer, tmp_path: Path, secret: str
) -> None:
    server.add("/x.mp4", behave.raw(b"no HTTP at all\r\n\r\n"))
    server.add("/x.mp4;token=hunter22", behave.raw(b"HTTP/1.1 200 OK\r\n: \0\r\n\r\n"))
    (failed,) = fetch(tmp_path, server.url(f"/x.mp4{secret}"))
    assert isinstance(failed, Failed)
    assert failed.reason == "bad_response"
    assert "hunter22" not in failed.message


def test_http_is_refused_unless_allowed_also_in_redirects(
    server: HttpServer, tmp_path: Path
) -> None:
    url = server.add("/x.mp4", behave.file(mp4(18, 5000)))
    assert reason(tmp_path, url, allow_http=False) == "not_https"
    assert server.requests["/x.mp4"] == 0


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
def test_addresses_of_this_machine_are_refused_however_they_are_written(
    server: HttpServer, tmp_path: Path, host: str
) -> None:
    server.add("/x.mp4", behave.file(mp4(19, 5000)))
    url = f"http://{host}:{server.port}/x.mp4"
    assert reason(tmp_path, url, allow_private=False) == "blocked_address"
    assert server.requests["/x.mp4"] == 0


def test_every_redirect_is_checked_where_it_connects(
    server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # There is no public address here, so one of this machine stands for it.
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1")
    data = mp4(22, 5000)
    server.add("/end.mp4", behave.file(data))
    fine = server.add("/fine.mp4", behave.redirect("/end.mp4"))
    good(tmp_path, fine, data, allow_private=False)
    away = server.add("/away.mp4", behave.redirect(f"http://127.0.0.2:{server.port}/end.mp4"))
    assert reason(tmp_path / "b", away, allow_private=False) == "blocked_address"
    assert server.requests["/end.mp4"] == 1


def test_a_name_server_that_changes_its_answer_leads_to_no_private_address(
    server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Addresses of this machine stand for a public one and for one of a private network.
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1")
    answers, asked = [["127.0.0.1"], ["127.0.0.2"], ["127.0.0.2", "127.0.0.1"]], []

    def getaddrinfo(host: str, port: int, *wanted: Any) -> list[tuple[Any, ...]]:
        assert host == "rebinding.example"
        asked.append(answers[len(asked)])
        return [
            (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port))
            for address in asked[-1]
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    data = mp4(36, 5000)
    server.add("/x.mp4", behave.file(data))
    url = f"http://rebinding.example:{server.port}/x.mp4"
    good(tmp_path / "a", url, data, allow_private=False)
    assert reason(tmp_path / "b", url, allow_private=False) == "blocked_address"
    assert server.requests["/x.mp4"] == 1
    # Of several addresses, the public one is used.
    good(tmp_path / "c", url, data, allow_private=False)
    assert len(asked) == 3


def test_the_checksum_may_be_that_of_another_algorithm(server: HttpServer, tmp_path: Path) -> None:
    data = mp4(37, 3 * MB)
    url = server.add("/x.mp4", behave.broken(server, data, after=2 * MB, times=1))
    outcome = good(tmp_path, url, data, checksum="sha256", max_pause_s=0.01)
    assert outcome.checksum == hashlib.sha256(data).hexdigest()


def test_unfinished_files_that_nobody_will_continue_are_removed(tmp_path: Path) -> None:
    wanted, unwanted, busy = ("a" * 32, "b" * 32, "c" * 32)
    for key in (wanted, unwanted, busy, "d" * 32):
        (tmp_path / f"{key}.json").write_text("{}")
    for name in (wanted, unwanted, busy, "another.file"):
        (tmp_path / name).write_text("x")
    (tmp_path / ("e" * 32)).symlink_to(tmp_path / "another.file")

    async def work() -> None:
        partial = await open_partial(str(tmp_path), busy, "blake3")
        partial.restart('"v1"', 5 * MB)
        partial.write(b"x")
        remove_unfinished(tmp_path, lambda key: key == wanted)
        partial.close(keep=True)

    asyncio.run(work())
    kept = {wanted, f"{wanted}.json", busy, f"{busy}.json", "another.file", "e" * 32}
    assert {path.name for path in tmp_path.iterdir()} == kept
    remove_unfinished(tmp_path / "missing", lambda key: False)


def test_connections_at_the_same_time_are_bounded(server: HttpServer, tmp_path: Path) -> None:
    data = mp4(20, 64 * 1024)
    urls = [
        server.add(f"/{number}.mp4", behave.slow(data, bytes_per_s=640 * 1024))
        for number in range(9)
    ]
    fetch(tmp_path, *urls, connections_per_host=3)
    assert server.most_at_once == 3


@pytest.mark.slow
def test_requests_and_bytes_per_second_are_bounded(server: HttpServer, tmp_path: Path) -> None:
    data = mp4(21, 50_000)
    urls = [server.add(f"/{number}.mp4", behave.file(data)) for number in range(6)]
    started = time.monotonic()
    fetch(tmp_path / "a", *urls, requests_per_s=10)
    assert time.monotonic() - started >= 0.5
    started = time.monotonic()
    fetch(tmp_path / "b", *urls, bytes_per_s=500_000)
    assert time.monotonic() - started >= 0.5  # 300 kB, of which the last file may pass at once
