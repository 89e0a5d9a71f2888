"""Remote videos that the decoders of a node share."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.common import storage
from pipelines.video.child import Decoded
from pipelines.video.config import SamplingConfig
from pipelines.video.decoder import ClipDecoder, ClipSpan
from pipelines.video.video_cache import TooLargeError, VideoCache
from stgt.errors import VideoDecodeError
from tests.helpers.faulty_s3 import FaultyS3
from tests.helpers.videos import encode_video, moving_pictures
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.slow

SPANS = 8
SECONDS = 8.0


@pytest.fixture(scope="module")
def remote(s3: FaultyS3, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A video on S3, with the name of this module's own."""
    folder = tmp_path_factory.mktemp("remote")
    path = encode_video(folder / "a.mp4", "libx264", moving_pictures(200), g="50")
    storage.put_file(path, "s3://bucket/shared/a.mp4")
    return "s3://bucket/shared/a.mp4"


def spans(uri: str) -> list[ClipSpan]:
    return [
        ClipSpan(str(n), uri, n * SECONDS / SPANS, (n + 1) * SECONDS / SPANS) for n in range(SPANS)
    ]


@pytest.fixture
def downloads(s3: FaultyS3, remote: str) -> list[int]:
    """How often the video was downloaded, by the bytes that were sent, each time it is asked."""
    before = s3.bytes_read("/shared/")

    class Downloads(list[int]):
        def __len__(self) -> int:
            return round((s3.bytes_read("/shared/") - before) / storage.size_bytes(remote))

    return Downloads()


def test_a_video_is_fetched_once_for_all_its_clips_and_workers(
    remote: str, downloads: list[int], tmp_path: Path
) -> None:
    found = []
    for name in ("pyav", "decord"):
        sampling = SamplingConfig(num_frames=2, size=32, decoder=name)
        with ClipDecoder(sampling, cache=VideoCache(tmp_path)) as one:
            found.append(list(one.decode_all(spans(remote))))
    for outcomes in found:
        for number, outcome in enumerate(outcomes):
            assert isinstance(outcome, Decoded), outcome
            assert outcome.frame_indices == [25 * number, 25 * number + 12]
    assert len(downloads) == 1


def test_a_video_beyond_the_cache_is_fetched_once_per_shard(
    remote: str, downloads: list[int], tmp_path: Path
) -> None:
    """Clips of one video follow each other, and their results come in the given order."""
    storage.write_bytes("s3://bucket/other/b.mp4", storage.read_bytes(remote))
    others = spans("s3://bucket/other/b.mp4")
    clips = [clip for pair in zip(spans(remote), others, strict=True) for clip in pair]
    asked = len(downloads)
    with ClipDecoder(
        SamplingConfig(num_frames=2, size=32), cache=VideoCache(tmp_path, most_bytes=1)
    ) as one:
        outcomes = list(one.decode_all(clips))
    assert [outcome.frame_indices for outcome in outcomes if isinstance(outcome, Decoded)] == [
        [25 * number, 25 * number + 12] for number in range(SPANS) for _ in range(2)
    ]
    assert len(downloads) == asked + 1
    assert len(list(tmp_path.glob("*.video"))) == 1


def test_concurrent_workers_fetch_a_video_once(
    remote: str, downloads: list[int], tmp_path: Path
) -> None:
    def fetched(_: int) -> bytes:
        with VideoCache(tmp_path).opened(remote, 10**9) as video:
            return Path(video.path).read_bytes()

    with ThreadPoolExecutor(8) as pool:
        contents = set(pool.map(fetched, range(8)))
    assert len(downloads) == 1
    assert contents == {storage.read_bytes(remote)}


def test_a_changed_video_is_fetched_again(s3: FaultyS3, tmp_path: Path) -> None:
    cache, uri = VideoCache(tmp_path), "s3://bucket/changing/a.mp4"
    for content in (b"first", b"later"):
        storage.write_bytes(uri, content)
        with cache.opened(uri, 100) as video:
            assert Path(video.path).read_bytes() == content


def test_a_video_that_a_stop_of_the_machine_cut_short_is_fetched_again(
    s3: FaultyS3, tmp_path: Path
) -> None:
    cache, uri = VideoCache(tmp_path), "s3://bucket/short/a.mp4"
    storage.write_bytes(uri, b"content")
    cache.open(uri, 100).close()
    (kept,) = tmp_path.glob("*.video")
    os.truncate(kept, 0)
    with cache.opened(uri, 100) as video:
        assert Path(video.path).read_bytes() == b"content"
    assert kept.read_bytes() == b"content"


def test_an_open_video_outlives_its_place_in_the_cache(s3: FaultyS3, tmp_path: Path) -> None:
    cache = VideoCache(tmp_path, most_bytes=10)
    for name in ("a", "b"):
        storage.write_bytes(f"s3://bucket/small/{name}", 8 * name.encode())
    with cache.opened("s3://bucket/small/a", 100) as first:
        with cache.opened("s3://bucket/small/b", 100):
            assert len(list(tmp_path.glob("*.video"))) == 1
        assert Path(first.path).read_bytes() == b"aaaaaaaa"
    with pytest.raises(TooLargeError, match="the file has 8 bytes"):
        cache.open("s3://bucket/small/a", 7)


def fetch_slowly(folder: str, uri: str) -> None:
    """Begin to fetch a video, and stay at it until killed."""

    def fetch(uri: str, path: Path) -> None:
        path.write_bytes(b"part of it")
        time.sleep(600)

    storage.fetch_file = fetch
    VideoCache(folder).open(uri, 10**9)


def test_a_killed_fetch_leaves_the_video_to_the_next(remote: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=fetch_slowly, args=(str(tmp_path), remote))
    process.start()
    wait_until(lambda: list(tmp_path.glob(".*.tmp")))
    process.kill()
    process.join()
    (partial,) = tmp_path.glob(".*.tmp")
    os.utime(partial, (0, 0))  # as an hour later
    with VideoCache(tmp_path).opened(remote, 10**9) as video:
        assert Path(video.path).read_bytes() == storage.read_bytes(remote)
    assert not partial.exists()


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://bucket/absent.mp4", "missing"),
        ("s3://bucket/shared", "missing"),
        ("s3://bucket/forbidden/a.mp4", "forbidden"),
        ("nothing://bucket/a.mp4", "unreachable"),
        ("s3://bucket/a::b.mp4", "missing"),
        ("s3://", "missing"),
    ],
)
def test_a_strange_uri_costs_its_clip_only(
    uri: str, reason: str, remote: str, tmp_path: Path
) -> None:
    with ClipDecoder(SamplingConfig(num_frames=2, size=32), cache=VideoCache(tmp_path)) as one:
        bad, good = one.decode_all([ClipSpan("bad", uri), ClipSpan("good", remote)])
    assert isinstance(bad, VideoDecodeError)
    assert bad.reason == reason
    assert uri in bad.message
    assert isinstance(good, Decoded)


def test_whatever_fetching_raises_costs_its_clip_only(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(uri: str) -> tuple[int, str]:
        raise TypeError("unexpected")

    monkeypatch.setattr(storage, "size_and_version", fail)
    with ClipDecoder(SamplingConfig(num_frames=2, size=32), cache=VideoCache(tmp_path)) as one:
        with pytest.raises(VideoDecodeError, match="unreachable: s3://bucket/.*: unexpected"):
            one.decode(ClipSpan("bad", remote))
        outcomes = list(one.decode_all(spans(remote)))
    assert [getattr(outcome, "reason", "fine") for outcome in outcomes] == SPANS * ["unreachable"]


def test_a_full_disk_first_empties_the_cache_and_then_ends_the_run(
    s3: FaultyS3, small_disk: Callable[[str], Path]
) -> None:
    """The cache keeps to half of the disk, so others must have filled it."""
    folder = small_disk("256k")
    uris = [f"s3://bucket/full/{name}" for name in "abc"]
    for uri in uris:
        storage.write_bytes(uri, 60_000 * b"x")
    cache = VideoCache(folder)
    with cache.opened(uris[0], 10**6):
        pass
    (folder / "other").write_bytes(160_000 * b"x")
    with cache.opened(uris[1], 10**6) as video:
        assert len(Path(video.path).read_bytes()) == 60_000
    (left,) = folder.glob("*.video")
    left.unlink()
    (folder / "other").write_bytes(220_000 * b"x")
    with (
        ClipDecoder(SamplingConfig(num_frames=2, size=32), cache=cache) as one,
        pytest.raises(OSError, match="No space left"),
    ):
        list(one.decode_all([ClipSpan("c", uris[2])]))
    assert not list(folder.glob(".*.tmp"))
