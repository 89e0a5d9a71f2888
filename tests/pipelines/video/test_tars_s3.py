"""Archives on S3: one fetch per node, and parts where an archive does not stay in the cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipelines.common import storage
from pipelines.video.child import Decoded
from pipelines.video.config import SamplingConfig
from pipelines.video.decoder import ClipDecoder, ClipSpan
from pipelines.video.video_cache import VideoCache
from stgt.errors import VideoDecodeError
from tests.helpers.archives import write_tar
from tests.helpers.faulty_s3 import FaultyS3
from tests.helpers.videos import encode_video, moving_pictures

pytestmark = pytest.mark.slow

NAMES = [f"{number}.mp4" for number in range(4)]
TAR = "s3://bucket/archived/x.tar"
FILLING = 3_000_000
"""Bytes of a member that nobody asks for, so that the archive is much larger than its videos."""


@pytest.fixture(scope="module")
def expected(s3: FaultyS3, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Decoded]:
    """The clips of the archive, decoded from the files themselves."""
    s3.fail(0)
    folder = tmp_path_factory.mktemp("archived")
    for seed, name in enumerate(NAMES):
        encode_video(folder / name, "libx264", moving_pictures(30, seed=seed))
    contents = {name: (folder / name).read_bytes() for name in NAMES}
    write_tar(folder / "x.tar", {**contents, "filling.bin": bytes(FILLING)})
    storage.put_file(folder / "x.tar", TAR)
    storage.write_bytes(f"{TAR}#real.mp4", contents["0.mp4"])
    found = decode(VideoCache(folder / "cache"), [str(folder / name) for name in NAMES])
    return dict(zip(NAMES, found, strict=True))  # type: ignore[arg-type]


def decode(cache: VideoCache, uris: list[str]) -> list[Decoded | VideoDecodeError]:
    with ClipDecoder(SamplingConfig(num_frames=4, size=32), cache=cache) as decoder:
        return list(decoder.decode_all([ClipSpan(uri, uri) for uri in uris]))


def same(expected: dict[str, Decoded], found: list[Decoded | VideoDecodeError]) -> bool:
    for one, other in zip(expected.values(), found, strict=True):
        assert isinstance(other, Decoded), other
        assert np.array_equal(one.frames, other.frames)
        assert one.facts == other.facts
    return True


def test_an_archive_is_fetched_once_for_all_members_and_workers(
    s3: FaultyS3, expected: dict[str, Decoded], tmp_path: Path
) -> None:
    size_bytes = storage.size_bytes(TAR)
    before = s3.bytes_read("/archived/")
    uris = [f"{TAR}#{name}" for name in NAMES]
    with ThreadPoolExecutor(2) as pool:  # two workers of a node
        found = list(pool.map(lambda _: decode(VideoCache(tmp_path), uris), range(2)))
    assert all(same(expected, outcomes) for outcomes in found)
    assert s3.bytes_read("/archived/") - before == size_bytes
    assert same(expected, decode(VideoCache(tmp_path), uris))
    assert s3.bytes_read("/archived/") - before == size_bytes

    for path in tmp_path.glob("*.video"):
        path.unlink()  # as others do that need the room
    assert same(expected, decode(VideoCache(tmp_path), uris))
    again = s3.bytes_read("/archived/") - before - size_bytes
    assert again == sum(one.facts.size_bytes for one in expected.values())


def test_of_an_archive_beyond_the_cache_only_parts_are_fetched(
    s3: FaultyS3, expected: dict[str, Decoded], tmp_path: Path
) -> None:
    before = s3.bytes_read("/archived/")
    uris = [f"{TAR}#{name}" for name in NAMES]
    assert same(expected, decode(VideoCache(tmp_path, most_bytes=FILLING), uris))
    assert s3.bytes_read("/archived/") - before < FILLING / 4
    assert not list(tmp_path.glob("*.video"))


def test_remote_members_that_cannot_be_decoded_say_why(
    expected: dict[str, Decoded], tmp_path: Path
) -> None:
    storage.write_bytes("s3://bucket/archived/page.tar", b"<html>no archive</html>")
    names = {
        f"{TAR}#real.mp4": "",
        f"{TAR}#none.mp4": "missing",
        "s3://bucket/archived/gone.tar#0.mp4": "missing",
        "s3://bucket/archived/page.tar#0.mp4": "missing",
        "s3://bucket/forbidden/x.tar#0.mp4": "forbidden",
    }
    found = decode(VideoCache(tmp_path), list(names))
    assert [one.reason if isinstance(one, VideoDecodeError) else "" for one in found] == list(
        names.values()
    )
    assert isinstance(found[0], Decoded)
    assert np.array_equal(found[0].frames, expected["0.mp4"].frames)


@pytest.mark.soak
def test_archives_survive_faults_of_s3(
    s3: FaultyS3, expected: dict[str, Decoded], tmp_path: Path
) -> None:
    uris = [f"{TAR}#{name}" for name in NAMES]
    s3.fail(0.3)
    try:
        assert same(expected, decode(VideoCache(tmp_path / "whole"), uris))
        assert same(expected, decode(VideoCache(tmp_path / "parts", most_bytes=FILLING), uris))
    finally:
        s3.fail(0)
