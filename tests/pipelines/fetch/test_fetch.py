"""Whole runs: a list of URLs becomes files, a manifest and a quarantine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from blake3 import blake3

from pipelines.artifacts.manifest import check_manifest, url_key, whole_videos_table
from pipelines.common import storage
from pipelines.common.ray_errors import ERROR, raise_packed
from pipelines.fetch.config import FetchConfig
from pipelines.fetch.records import answering_hosts, read_downloads, write_piece
from pipelines.fetch.run import FetchSummary, run_fetch
from pipelines.fetch.worker import FetchWork, fetch_part, make_scratch_folder
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.run import run_manifest
from pipelines.video.child import Decoded, DecodeRequest, decode_file
from stgt.errors import ManifestError, STGTError
from tests.helpers import http_server as behave
from tests.helpers.data import PROJECT
from tests.helpers.faulty_s3 import FaultyS3
from tests.helpers.http_server import HttpServer, http_server, mp4
from tests.helpers.kills import processes
from tests.helpers.waiting import wait_until

MB = 1024**2


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with http_server() as one:
        yield one


def config(annotations: Path, output: str | Path, **settings: Any) -> FetchConfig:
    values: dict[str, Any] = {
        "allow_http": True, "allow_private": True, "max_pause_s": 0.05, "attempts": 2,
        "num_workers": 2, "requests_per_s": None,
    }  # fmt: skip
    return FetchConfig(
        annotations=(str(annotations),), output=str(output), **{**values, **settings}
    )


def write_table(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    lines = ["clip_id,url,caption", *(",".join(row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def rows_of(uri: str | None) -> dict[str, dict[str, Any]]:
    assert uri is not None
    return {row["clip_id"]: row for row in storage.read_table(uri).to_pylist()}


def busy_port(stack: contextlib.ExitStack, number: int) -> int:
    """A port of 127.0.0.NUMBER at which nothing answers."""
    listener = stack.enter_context(socket.socket())
    listener.bind((f"127.0.0.{number}", 0))
    listener.listen(0)
    for _ in range(2):  # nobody takes these up, so there is no room for another
        first = stack.enter_context(socket.socket())
        first.setblocking(False)
        first.connect_ex(listener.getsockname())
    return listener.getsockname()[1]


def no_ray(config: FetchConfig) -> None:
    raise AssertionError("Ray is not needed")


def run_here(settings: FetchConfig, parts: int = 2) -> FetchSummary:
    """Fetch in this process, without Ray: the parts that its workers would fetch at once."""
    output = storage.resolve(settings.output)
    manifest = settings.annotations[0]
    if not manifest.endswith(".parquet"):
        manifest = f"{manifest}.{uuid.uuid4().hex}.parquet"
        run_manifest(
            ManifestConfig(annotations=settings.annotations, output=manifest, format="urls")
        )
    settings = replace(settings, annotations=(manifest,))
    answered = answering_hosts(read_downloads(output))
    work = FetchWork(
        config=settings, output=output, source=manifest, parts=parts, answered=answered
    )
    for part in range(parts):
        for error in fetch_part({"part": np.array([part])}, work, None).get(ERROR, ()):
            raise_packed(error)
    return run_fetch(replace(settings, retry_failed=None), no_ray)


@pytest.mark.ray
def test_every_url_becomes_a_file_or_one_row_with_its_reason(
    ray_cluster: None, server: HttpServer, tmp_path: Path
) -> None:
    data = {f"good{number}": mp4(number, 20_000 + number) for number in range(6)}
    rows = [
        (name, server.add(f"/{name}.mp4", behave.file(one)), f"caption of {name}")
        for name, one in data.items()
    ]
    rows.append(("again", server.url("/good0.mp4"), "another clip of the same video"))
    large = mp4(7, 3 * MB)
    rows.append(
        ("reset", server.add("/reset.mp4", behave.broken(server, large, 2 * MB, times=1)), "x")
    )
    bad = {
        "missing": behave.status(404),
        "forbidden": behave.status(403),
        "unavailable": behave.status(500),
        "timeout": behave.silent(),
        "incomplete": behave.too_short(mp4(8, 5000), announced=6000),
        "empty": behave.body(b""),
        "too_large": behave.endless(),
        "not_a_video": behave.body(b"<html>an error</html>", "video/mp4"),
        "bad_response": behave.status(400),
        "invalid_url": behave.redirect("file:///etc/passwd"),
        "too_many_redirects": behave.redirect("/too_many_redirects.mp4"),
    }
    rows += [
        (name, server.add(f"/{name}.mp4", behavior), f"caption of {name}")
        for name, behavior in bad.items()
    ]
    rows.append(("unreachable", "http://127.0.0.1:9/x.mp4", "x"))
    rows.append(("no URL", "not-a-url", "x"))
    output = tmp_path / "videos"
    summary = run_fetch(
        config(write_table(tmp_path / "t.csv", rows), output, idle_s=0.5, max_bytes=4 * MB)
    )
    assert summary["clips"] == len(data) + 2
    assert summary["fetched"] == len(data) + 1
    assert summary["reasons"] == dict.fromkeys(sorted([*bad, "unreachable"]), 1)
    assert summary["rejected"] == 1
    clips = rows_of(summary["manifest"])
    check_manifest(str(summary["manifest"]))
    for name, content in {**data, "again": data["good0"], "reset": large}.items():
        assert Path(clips[name]["video_uri"]).read_bytes() == content
        download = json.loads(clips[name]["extras"])["download"]
        assert download["bytes"] == len(content)
        assert download["blake3"] == blake3(content).hexdigest()
        assert "sha256" not in download
    assert clips["good1"]["captions"] == ["caption of good1"]
    assert clips["again"]["video_uri"] == clips["good0"]["video_uri"]
    assert server.requests["/good0.mp4"] == 1
    assert {name: row["reason"] for name, row in rows_of(summary["quarantine"]).items()} == {
        name: name for name in [*bad, "unreachable"]
    }
    # Nothing else is left, and nothing is outside of the output.
    files = {path.name for path in output.rglob("*") if path.is_file()}
    assert {name for name in files if not name.endswith(".mp4")} == {
        "manifest.parquet", "quarantine.parquet", "downloads.parquet", "urls.rejected.parquet",
        "config.json", ".lock",
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv", "videos"]

    # Started again, it has nothing to do, and says the same.
    before = dict(server.requests)
    again = run_fetch(config(tmp_path / "t.csv", output), no_ray)
    of_the_run = {"seconds": 0.0, "urls_per_s": None}
    assert {**again, **of_the_run} == {**summary, **of_the_run}
    assert rows_of(again["manifest"]) == clips
    assert dict(server.requests) == before

    # What failed may be tried again, all of it or by its reason.
    server.add("/missing.mp4", behave.file(mp4(9, 5000)))
    server.add("/forbidden.mp4", behave.file(mp4(10, 5000)))
    retried = run_here(config(tmp_path / "t.csv", output, retry_failed=("missing",)))
    assert retried["clips"] == summary["clips"] + 1
    assert server.requests["/forbidden.mp4"] == before["/forbidden.mp4"]
    assert rows_of(retried["quarantine"])["forbidden"]["attempts"] == 1
    server.add("/empty.mp4", behave.body(b""))
    retried = run_here(
        config(tmp_path / "t.csv", output, retry_failed=("forbidden", "empty"), idle_s=0.5)
    )
    assert retried["clips"] == summary["clips"] + 2
    assert rows_of(retried["quarantine"])["empty"]["attempts"] == 2

    # A longer list fetches only what is new.
    rows.append(("new", server.add("/new.mp4", behave.file(mp4(11, 5000))), "x"))
    longer = run_here(config(write_table(tmp_path / "t.csv", rows), output))
    assert longer["clips"] == summary["clips"] + 3
    assert server.requests["/good0.mp4"] == 1


KILLED = 12


def receiving(partial: Path) -> psutil.Process:
    """The worker that is receiving a file."""
    for worker in processes("(fetch_part)"):
        with contextlib.suppress(psutil.NoSuchProcess):  # another one that has just ended
            if str(partial) in (file.path for file in worker.open_files()):
                return worker
    raise AssertionError(f"no worker is receiving {partial}")


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_run_is_continued_and_ends_with_the_same_manifest(
    server: HttpServer, joining: dict[str, str], tmp_path: Path
) -> None:
    data = {f"v{number:02d}": mp4(number, MB + number) for number in range(KILLED)}
    rows = [
        (name, server.add(f"/{name}.mp4", behave.slow(one, 8 * MB)), f"caption of {name}")
        for name, one in data.items()
    ]
    rows.append(("gone", server.url("/gone.mp4"), "x"))
    large = mp4(99, 6 * MB)
    # Its first transfer never ends, so that it is incomplete at the kill.
    held = behave.stalling_once(server, large, after=3 * MB)
    rows.append(("large", server.add("/large.mp4", held), "x"))
    table, output = write_table(tmp_path / "t.csv", rows), tmp_path / "videos"
    command = [
        sys.executable, "-m", "jobs.fetch", "--annotations", str(table), "--output", str(output),
        "--allow-http", "--allow-private", "--connections-per-host=4", "--requests-per-s=None",
        "--num-workers=2", "--idle-s=600",
    ]  # fmt: skip
    run = subprocess.Popen(
        command, cwd=PROJECT, env=joining, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    key = url_key(server.url("/large.mp4"))
    partial = output / ".partial" / key

    def far_enough() -> bool:
        assert run.poll() is None, run.communicate()[0]
        can_be_continued = partial.with_name(f"{key}.json").exists()
        return (
            can_be_continued
            and partial.stat().st_size > 2 * MB
            and len(list(output.glob("??/*.mp4"))) >= 4
        )

    wait_until(far_enough, every_s=0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    assert not (output / "manifest.parquet").exists()
    complete = {path.stem: path.stat().st_mtime_ns for path in output.glob("??/*.mp4")}
    done = subprocess.run(
        command, cwd=PROJECT, env=joining, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    summary: FetchSummary = json.loads(done.stdout)
    assert (summary["clips"], summary["reasons"]) == (KILLED + 1, {"missing": 1})
    # What was complete was not fetched again, and the large file was continued.
    assert (
        complete.items()
        <= {path.stem: path.stat().st_mtime_ns for path in output.glob("??/*.mp4")}.items()
    )
    for name in data:
        url = server.url(f"/{name}.mp4")
        if url_key(url) in complete:
            assert server.requests[f"/{name}.mp4"] == 1
    assert "Range" in server.headers["/large.mp4"][-1]
    undisturbed = run_here(config(table, tmp_path / "other"))
    for name in ("manifest", "quarantine"):
        mine, theirs = (
            [
                {**row, "video_uri": row["video_uri"].removeprefix(str(folder))}
                for row in pq.read_table(folder / f"{name}.parquet").to_pylist()
            ]
            for folder in (output, tmp_path / "other")
        )
        assert mine == theirs
    assert undisturbed["bytes"] == summary["bytes"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_fetches_what_is_missing(
    server: HttpServer, joining: dict[str, str], tmp_path: Path
) -> None:
    data = {f"v{number:02d}": mp4(number, MB + number) for number in range(KILLED)}
    rows = [
        (name, server.add(f"/{name}.mp4", behave.slow(one, 2 * MB)), "x")
        for name, one in data.items()
    ]
    # Its first transfer never ends, so that there is a worker which is receiving it.
    held = server.add("/v00.mp4", behave.stalling_once(server, data["v00"], after=MB // 2))
    output = tmp_path / "videos"
    partial = output / ".partial" / url_key(held)
    command = [
        sys.executable, "-m", "jobs.fetch", "--annotations",
        str(write_table(tmp_path / "t.csv", rows)), "--output", str(output), "--allow-http",
        "--allow-private", "--connections-per-host=4", "--requests-per-s=None", "--num-workers=2",
    ]  # fmt: skip
    run = subprocess.Popen(
        command, cwd=PROJECT, env=joining, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    def far_enough() -> bool:
        assert run.poll() is None, run.communicate()
        held_begun = partial.exists() and partial.stat().st_size > 0
        return held_begun and len(list(output.glob("??/*.mp4"))) >= 3

    wait_until(far_enough, every_s=0.01)
    complete = {path.stem: path.stat().st_mtime_ns for path in output.glob("??/*.mp4")}
    receiving(partial).kill()
    told, log = run.communicate()
    assert run.returncode == 0, log
    summary: FetchSummary = json.loads(told)
    assert (summary["clips"], summary["reasons"]) == (KILLED, {})
    clips = rows_of(summary["manifest"])
    for name, content in data.items():
        assert Path(clips[name]["video_uri"]).read_bytes() == content
        if url_key(server.url(f"/{name}.mp4")) in complete:
            assert server.requests[f"/{name}.mp4"] == 1
    assert server.requests["/v00.mp4"] == 2
    assert not (output / ".partial").exists()


def test_folders_for_unfinished_files_are_of_this_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    settings = config(tmp_path / "t.csv", "s3://bucket/x")
    folder = make_scratch_folder(settings, settings.output)
    assert folder == make_scratch_folder(settings, settings.output)
    assert f"-{os.getuid()}" in folder.parent.name
    for one in (folder, folder.parent):
        assert one.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(STGTError, match=r"is not a folder; choose .*--scratch-dir"):
        make_scratch_folder(settings, settings.output)
    folder.unlink()
    own = replace(settings, scratch_dir=str(tmp_path / "own"))
    make_scratch_folder(own, own.output)
    uid = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: uid)  # those above are another user's now
    with pytest.raises(STGTError, match=r"belongs to another user; choose .*--scratch-dir"):
        make_scratch_folder(own, own.output)


@pytest.mark.slow
def test_videos_go_to_object_storage(s3: FaultyS3, server: HttpServer, tmp_path: Path) -> None:
    output = f"s3://bucket/{uuid.uuid4().hex}"
    rows = [
        (f"v{number}", server.add(f"/{number}.mp4", behave.file(mp4(number, 5000))), "x")
        for number in range(3)
    ]
    rows.append(("gone", server.url("/gone.mp4"), "x"))
    table = write_table(tmp_path / "t.csv", rows)
    scratch = tmp_path / "scratch"
    settings = config(table, output, scratch_dir=str(scratch))
    (make_scratch_folder(settings, output) / ("0" * 32)).write_bytes(b"of another list")
    summary = run_here(settings)
    assert summary["reasons"] == {"missing": 1}
    for number in range(3):
        uri = rows_of(summary["manifest"])[f"v{number}"]["video_uri"]
        assert uri.startswith(f"{output}/")
        assert storage.read_bytes(uri) == mp4(number, 5000)
    assert [path for path in scratch.rglob("*") if path.is_file()] == []
    names = {name.partition(".")[0] for name in storage.list_names(output)}
    assert {"manifest", "quarantine", "downloads", "config"} <= names
    assert names & {"urls", "in_use"} == set()


def test_lists_without_urls_and_folders_of_others_are_refused_in_one_sentence(
    tmp_path: Path,
) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ManifestError, match=r"empty\.txt: none of the rows is usable"):
        run_fetch(config(tmp_path / "empty.txt", tmp_path / "a"), no_ray)
    (tmp_path / "list.txt").write_text("https://a.example/1.mp4\n")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text('{"job": "ingest"}')
    with pytest.raises(STGTError, match=r"is the output of jobs\.ingest; choose another"):
        run_fetch(config(tmp_path / "list.txt", tmp_path / "b"), no_ray)


def test_a_run_without_any_video_fails_and_says_why(server: HttpServer, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", [("a", server.url("/a.mp4"), "x")])
    with pytest.raises(STGTError, match=r"none of the 1 URLs could be fetched \(1 missing\); see"):
        run_here(config(table, tmp_path / "a"))
    assert not (tmp_path / "a" / "manifest.parquet").exists()


def test_what_the_settings_allow_now_is_tried_again(server: HttpServer, tmp_path: Path) -> None:
    url = server.add("/a.mp4", behave.file(mp4(1, 5000)))
    table = write_table(tmp_path / "t.csv", [("a", url, "x")])
    with pytest.raises(STGTError, match="1 not_https"):
        run_here(config(table, tmp_path / "a", allow_private=False, allow_http=False))
    with pytest.raises(STGTError, match="1 blocked_address"):
        run_here(config(table, tmp_path / "a", allow_private=False))
    assert server.requests["/a.mp4"] == 0
    assert run_here(config(table, tmp_path / "a"))["clips"] == 1


def test_a_network_that_is_down_ends_the_run_and_fails_no_url(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        rows = [
            (f"{number}", f"http://127.0.0.1:{busy_port(stack, 1)}/x", "x") for number in range(12)
        ]
        table = write_table(tmp_path / "t.csv", rows)
        settings = config(table, tmp_path / "c", attempts=1, connect_s=0.3)
        with pytest.raises(STGTError, match="10 hosts in a row gave no answer .* check the netw"):
            run_here(settings, parts=1)
    assert len(read_downloads(str(tmp_path / "c"))) == 0


@pytest.mark.slow
def test_hosts_of_earlier_runs_show_that_the_network_is_up(
    server: HttpServer, tmp_path: Path
) -> None:
    rows = [("good", server.add("/a.mp4", behave.file(mp4(1, 5000))), "x")]
    run_here(config(write_table(tmp_path / "t.csv", rows), tmp_path / "c"), parts=1)
    with contextlib.ExitStack() as stack:
        rows += [(f"{n}", f"http://127.0.0.{n}:{busy_port(stack, n)}/x", "x") for n in range(2, 14)]
        table = write_table(tmp_path / "t.csv", rows)
        summary = run_here(config(table, tmp_path / "c", attempts=1, connect_s=0.3), parts=1)
    assert summary["reasons"] == {"unreachable": 12}


def test_hosts_that_are_gone_do_not_look_like_a_network_that_is_down(tmp_path: Path) -> None:
    hosts = [(f"{n}", f"http://127.0.0.1:{n}/x.mp4", "x") for n in range(2, 16)]
    table = write_table(tmp_path / "t.csv", hosts)
    with pytest.raises(STGTError, match="14 unreachable"):
        run_here(config(table, tmp_path / "c", attempts=1), parts=1)
    assert len(read_downloads(str(tmp_path / "c"))) == 14


def test_videos_of_a_manifest_that_are_no_urls_are_quarantined(
    server: HttpServer, tmp_path: Path
) -> None:
    url = server.add("/a.mp4", behave.file(mp4(1, 5000)))
    uris = {"good": url, "local": "/etc/passwd", "file": "file:///etc/passwd", "odd": "http://[::1"}
    table = whole_videos_table(uris, dict.fromkeys(uris, "x"), "test")
    storage.write_table(str(tmp_path / "m.parquet"), table)
    summary = run_here(config(tmp_path / "m.parquet", tmp_path / "videos"), parts=1)
    assert summary["clips"] == 1
    assert summary["reasons"] == {"invalid_url": 3}


def test_a_part_of_the_columns_of_downloads_can_be_read(tmp_path: Path) -> None:
    output = str(tmp_path)
    row = {"key": "a" * 32, "url": "https://a.example/1", "attempts": 1}
    write_piece(output, [{**row, "reason": "missing", "message": "x"}])
    write_piece(output, [{**row, "file": "aa/a.mp4", "bytes": 1, "sha256": "0", "attempts": 2}])
    found = read_downloads(output, ("key", "reason", "attempts"))
    assert found.to_pylist() == [{"key": "a" * 32, "reason": None, "attempts": 2}]
    assert read_downloads(output).select(found.schema.names) == found


def test_an_output_of_an_earlier_version_goes_on_with_its_checksums(
    server: HttpServer, tmp_path: Path
) -> None:
    rows = [("v0", server.add("/0.mp4", behave.file(mp4(0, 5000))), "x")]
    output, table = tmp_path / "a", write_table(tmp_path / "t.csv", rows)
    clips = rows_of(run_here(config(table, output, checksum="sha256"))["manifest"])
    download = json.loads(clips["v0"]["extras"])["download"]
    assert download["sha256"] == storage.digest_of(mp4(0, 5000))
    # This is how that version left the folder.
    downloads = pq.read_table(output / "downloads.parquet").drop_columns(["blake3"])
    pq.write_table(downloads, output / "downloads.parquet")
    settings = json.loads((output / "config.json").read_text())
    del settings["checksum"]
    (output / "config.json").write_text(json.dumps(settings))
    assert rows_of(run_fetch(config(table, output), no_ray)["manifest"]) == clips

    used: list[str] = []

    def stop(settings: FetchConfig) -> None:
        used.append(settings.checksum)
        raise STGTError("far enough")

    rows.append(("v1", server.add("/1.mp4", behave.file(mp4(1, 5000))), "x"))
    with pytest.raises(STGTError, match="far enough"):
        run_fetch(config(write_table(tmp_path / "t.csv", rows), output), stop)
    with pytest.raises(STGTError, match="far enough"):
        run_fetch(config(table, tmp_path / "new"), stop)
    assert used == ["sha256", "blake3"]


def test_unfinished_files_of_urls_that_are_done_or_gone_do_not_stay(
    server: HttpServer, tmp_path: Path
) -> None:
    rows = [
        ("good", server.add("/good.mp4", behave.file(mp4(1, 5000))), "x"),
        ("gone", server.url("/gone.mp4"), "x"),
    ]
    settings = config(write_table(tmp_path / "t.csv", rows), tmp_path / "a")
    run_here(settings)
    scratch = tmp_path / "a" / ".partial"
    scratch.mkdir()
    for path in ("/good.mp4", "/gone.mp4", "/no longer in the list.mp4"):
        (scratch / url_key(server.url(path))).write_bytes(b"x")
    run_fetch(settings, no_ray)
    assert [path.name for path in scratch.iterdir()] == [url_key(server.url("/gone.mp4"))]


def test_a_url_in_two_splits_is_fetched_once(server: HttpServer, tmp_path: Path) -> None:
    url = server.add("/a.mp4", behave.file(mp4(1, 5000)))
    (tmp_path / "t.csv").write_text(f"url,split,caption\n{url},train,x\n{url},test,y\n")
    summary = run_here(config(tmp_path / "t.csv", tmp_path / "a"))
    assert (summary["clips"], summary["urls"], summary["fetched"]) == (2, 1, 1)
    clips = rows_of(summary["manifest"]).values()
    assert {row["split"]: row["captions"] for row in clips} == {"train": ["x"], "test": ["y"]}
    assert len({row["video_uri"] for row in clips}) == 1
    assert server.requests["/a.mp4"] == 1


def test_complete_files_that_no_table_lists_are_not_fetched_again(
    server: HttpServer, tmp_path: Path
) -> None:
    rows = [
        (f"v{number}", server.add(f"/{number}.mp4", behave.file(mp4(number, 5000))), "x")
        for number in range(6)
    ]
    settings = config(write_table(tmp_path / "t.csv", rows), tmp_path / "a")
    clips = rows_of(run_here(settings)["manifest"])
    listed = tmp_path / "a" / "downloads.parquet"
    pq.write_table(pq.read_table(listed).slice(0, 2), listed)  # a kill came before the others
    (tmp_path / "a" / f"{clips['v0']['video_uri'].split('/')[-2]}" / "notes.txt").touch()
    assert rows_of(run_here(settings)["manifest"]) == clips
    assert set(server.requests.values()) == {1}


def test_a_file_that_was_deleted_is_fetched_again(server: HttpServer, tmp_path: Path) -> None:
    rows = [
        (f"v{number}", server.add(f"/{number}.mp4", behave.file(mp4(number, 5000))), "x")
        for number in range(3)
    ]
    settings = config(write_table(tmp_path / "t.csv", rows), tmp_path / "a")
    clips = rows_of(run_here(settings)["manifest"])
    Path(clips["v1"]["video_uri"]).unlink()
    with pytest.raises(AssertionError, match="Ray is not needed"):
        run_fetch(settings, no_ray)  # it is no longer done
    assert rows_of(run_here(settings)["manifest"]) == clips
    assert Path(clips["v1"]["video_uri"]).read_bytes() == mp4(1, 5000)
    assert server.requests == {"/0.mp4": 1, "/1.mp4": 2, "/2.mp4": 1}


@pytest.mark.parametrize("settings", [{"columns": ("video=url",)}, {"split": "test"}])
def test_settings_of_lists_are_refused_for_a_manifest(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    table = whole_videos_table({"a": "https://a.example/1.mp4"}, {"a": "x"}, "test")
    storage.write_table(str(tmp_path / "m.parquet"), table)
    (name,) = settings
    with pytest.raises(ManifestError, match=rf"m\.parquet is a manifest.* leave --{name} out"):
        run_fetch(config(tmp_path / "m.parquet", tmp_path / "a", **settings), no_ray)


def test_an_unfinished_retry_keeps_what_was_known(server: HttpServer, tmp_path: Path) -> None:
    rows = [
        ("good", server.add("/good.mp4", behave.file(mp4(1, 5000))), "x"),
        ("gone", server.url("/gone.mp4"), "x"),
    ]
    table = write_table(tmp_path / "t.csv", rows)
    assert run_here(config(table, tmp_path / "a"))["reasons"] == {"missing": 1}
    server.add("/gone.mp4", behave.status(403))
    again = config(table, tmp_path / "a", retry_failed=())
    assert run_here(again)["reasons"] == {"forbidden": 1}
    downloads = read_downloads(str(tmp_path / "a")).to_pylist()
    assert sorted(row["attempts"] for row in downloads) == [1, 2]
    assert server.requests["/good.mp4"] == 1


def test_clips_from_urls_are_those_from_files(
    server: HttpServer, videos_dir: Path, tmp_path: Path
) -> None:
    names = ["mmaction_test.avi", "decord_video_90.mov", "made_vfr_320x240.webm"]
    lines = [["clip_id,url,caption,start_s,end_s"], ["clip_id,video,caption,start_s,end_s"]]
    for number, name in enumerate(names):
        path = videos_dir / "good" / name
        url = server.add(f"/{number}", behave.file(path.read_bytes()))
        for one, place in zip(lines, (url, str(path)), strict=True):
            one.append(f"clip {number},{place},caption {number},0,{number + 1}")
    for name, one in zip(("urls.csv", "files.csv"), lines, strict=True):
        (tmp_path / name).write_text("\n".join(one))
    local = str(tmp_path / "files.parquet")
    run_manifest(
        ManifestConfig(
            annotations=(str(tmp_path / "files.csv"),),
            videos=(str(videos_dir / "good"),),
            output=local,
            format="generic",
        )
    )
    fetched = run_here(config(tmp_path / "urls.csv", tmp_path / "videos"))
    assert fetched["clips"] == len(names) == 3
    same = ("clip_hash", "clip_id", "captions", "start_s", "end_s", "split")
    mine, theirs = rows_of(fetched["manifest"]), rows_of(local)
    for clip_id, row in theirs.items():
        assert {name: mine[clip_id][name] for name in same} == {name: row[name] for name in same}
        decoded = [
            decode_file(
                DecodeRequest(
                    path=one["video_uri"], start_s=one["start_s"], end_s=one["end_s"],
                    num_frames=4, frame_choice="uniform", size=32, resize="squash",
                    decoder="pyav", max_pixels=10**8, max_bytes=10**9,
                )
            )
            for one in (mine[clip_id], row)
        ]  # fmt: skip
        frames = [one.frames for one in decoded if isinstance(one, Decoded)]
        assert len(frames) == 2
        assert np.array_equal(frames[0], frames[1])


def test_other_processes_are_kept_out(server: HttpServer, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", [("a", server.url("/a.mp4"), "x")])
    with (
        storage.lock(str(tmp_path / "a")),
        pytest.raises(STGTError, match="another run is using"),
    ):
        run_fetch(config(table, tmp_path / "a"), no_ray)


def test_the_list_with_complete_urls_is_not_left_for_others(
    server: HttpServer, tmp_path: Path
) -> None:
    def fail(config: FetchConfig) -> None:
        (path,) = (tmp_path / "a").glob("urls.parquet")
        assert path.stat().st_mode & 0o777 == 0o600
        raise STGTError("no cluster")

    table = write_table(tmp_path / "t.csv", [("a", server.url("/a.mp4?token=hunter22"), "x")])
    with pytest.raises(STGTError, match="no cluster"):
        run_fetch(config(table, tmp_path / "a"), fail)
    assert not any(b"hunter22" in path.read_bytes() for path in (tmp_path / "a").iterdir())


def test_secrets_of_urls_are_in_no_file_of_the_output(server: HttpServer, tmp_path: Path) -> None:
    server.add("/a.mp4", behave.file(mp4(1, 5000)))
    address = f"http://user:hunter22@127.0.0.1:{server.port}"
    rows = [
        ("a", f"{address}/a.mp4?token=hunter22", "x"),
        ("b", f"{address}/gone.mp4?token=hunter22", "x"),
    ]
    run_here(config(write_table(tmp_path / "t.csv", rows), tmp_path / "a"))
    assert server.headers["/a.mp4"][0]["Authorization"].startswith("Basic ")
    names = ["downloads", "manifest", "quarantine"]
    for name in names:
        assert "hunter22" not in str(pq.read_table(tmp_path / "a" / f"{name}.parquet").to_pylist())
    others = [path for path in (tmp_path / "a").rglob("*") if path.stem not in names]
    assert not any(b"hunter22" in path.read_bytes() for path in others if path.is_file())
