"""Clips of videos that are members of tar archives."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.video.child import Decoded
from pipelines.video.config import DecodeLimits, SamplingConfig
from pipelines.video.decoder import ClipDecoder, ClipSpan
from pipelines.video.tar_members import TarMembers
from pipelines.video.video_cache import VideoCache
from stgt.errors import VideoDecodeError
from tests.helpers.archives import write_tar
from tests.helpers.videos import encode_video, moving_pictures

NAMES = ("a.mp4", "deep/b#1.mkv", "c.avi")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos, and an archive with the same three, a page, and a member that is cut off."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "deep").mkdir()
    for seed, name in enumerate(NAMES):
        codec = "mpeg4" if name.endswith("avi") else "libx264"
        encode_video(folder / name, codec, moving_pictures(30, seed=seed))
    entries = {name: (folder / name).read_bytes() for name in NAMES}
    write_tar(folder / "x.tar", {**entries, "page.mp4": "<html>404</html>", "cut.mp4": b"0" * 5000})
    with (folder / "x.tar").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 10240)
    (folder / "x.tar#real.mp4").write_bytes(entries["a.mp4"])
    return folder


def decode(folder: Path, cache: Path, *names: str, **limits: int) -> list[object]:
    clips = [ClipSpan(name, f"{folder}/{name}", 0.2, 1.0) for name in names]
    sampling = SamplingConfig(num_frames=4, size=32)
    with ClipDecoder(
        sampling, limits=DecodeLimits(**limits), hash_files=True, cache=VideoCache(cache)
    ) as decoder:
        return list(decoder.decode_all(clips))


@pytest.mark.slow
def test_members_give_what_the_files_give(folder: Path, tmp_path: Path) -> None:
    members = [f"x.tar#{name}" for name in NAMES]
    files = decode(folder, tmp_path, *NAMES)
    found = decode(folder, tmp_path, *members, members[0], "x.tar#real.mp4")
    for one, other in zip([*files, files[0], files[0]], found, strict=True):
        assert isinstance(one, Decoded)
        assert isinstance(other, Decoded)
        assert np.array_equal(one.frames, other.frames)
        assert one.frame_indices == other.frame_indices
        assert one.facts == other.facts
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".members"]


@pytest.mark.slow
def test_missing_members_of_many_clips_leave_the_others_readable(
    folder: Path, tmp_path: Path
) -> None:
    """Each clip of a missing member looks for it anew, while others read the archive."""
    missing = [f"x.tar#gone{number % 3}.mp4" for number in range(30)]
    members = [f"x.tar#{name}" for name in NAMES]
    files = decode(folder, tmp_path, *NAMES)
    found = decode(folder, tmp_path, *missing[:15], *members, *missing[15:], *members)
    good = [one for one in found if isinstance(one, Decoded)]
    assert len(good) == 2 * len(NAMES)
    for one, other in zip([*files, *files], good, strict=True):
        assert isinstance(one, Decoded)
        assert np.array_equal(one.frames, other.frames)


def test_a_single_member_is_decoded(folder: Path, tmp_path: Path) -> None:
    sampling = SamplingConfig(num_frames=4, size=32)
    with ClipDecoder(sampling, cache=VideoCache(tmp_path)) as decoder:
        one, other = (
            decoder.decode(ClipSpan("a", f"{folder}/{name}")) for name in ("a.mp4", "x.tar#a.mp4")
        )
    assert np.array_equal(one.frames, other.frames)


@pytest.mark.soak
@pytest.mark.slow
def test_real_videos_give_the_same_frames_and_reasons(videos_dir: Path, tmp_path: Path) -> None:
    """In every container, and also if they are damaged or no videos."""
    names = [
        f"{kind}/{path.name}"
        for kind in ("good", "damaged", "bad")
        for path in sorted((videos_dir / kind).iterdir())
    ]
    write_tar(tmp_path / "x.tar", {name: (videos_dir / name).read_bytes() for name in names})
    clips = [ClipSpan(name, f"{videos_dir}/{name}") for name in names]
    clips += [ClipSpan(name, f"{tmp_path}/x.tar#{name}") for name in names]
    sampling = SamplingConfig(num_frames=4, size=64)
    with ClipDecoder(sampling, cache=VideoCache(tmp_path / "cache")) as decoder:
        found = list(decoder.decode_all(clips))
    for name, one, other in zip(names, found, found[len(names) :], strict=False):
        if isinstance(one, VideoDecodeError):
            assert isinstance(other, VideoDecodeError), name
            assert one.reason == other.reason
            continue
        assert isinstance(other, Decoded), (name, other)
        assert np.array_equal(one.frames, other.frames), name
        assert one.facts == other.facts


def test_members_that_cannot_be_decoded_say_why(folder: Path, tmp_path: Path) -> None:
    (folder / "dir.tar").mkdir(exist_ok=True)
    (folder / "no.tar").write_text("<html>not found</html>")
    names = {
        "x.tar#none.mp4": ("missing", "the archive has no such member that can be read"),
        "x.tar#cut.mp4": ("missing", "the archive has no such member that can be read"),
        "x.tar#page.mp4": ("not_a_video", "an HTML or XML page"),
        "gone.tar#a.mp4": ("missing", "gone.tar does not exist"),
        "dir.tar#a.mp4": ("missing", "dir.tar does not exist"),
        "no.tar#a.mp4": ("missing", "the archive has no such member that can be read"),
        "x.tar#c.avi": ("too_large", "bytes"),
    }
    limit = (folder / "c.avi").stat().st_size - 1
    found = decode(folder, tmp_path, *names, max_bytes=limit)
    for (name, (reason, said)), outcome in zip(names.items(), found, strict=True):
        assert isinstance(outcome, VideoDecodeError), name
        assert (outcome.reason, outcome.clip_id) == (reason, name)
        assert said in outcome.message
        assert "/proc/" not in outcome.message


def test_an_archive_that_is_rewritten_is_read_anew(tmp_path: Path) -> None:
    """Its table of members and the identity of a member follow its contents."""
    members = TarMembers(VideoCache(tmp_path / "cache"))
    identities = set()
    for data in (b"one", b"another"):
        write_tar(tmp_path / "x.tar", {"before": data * 300, "a": data})
        os.utime(tmp_path / "x.tar", ns=(len(data), len(data)))
        for users in (members, TarMembers(VideoCache(tmp_path / "cache"))):
            archive = users.open_archive(str(tmp_path / "x.tar"))
            video = users.open(archive, "a", 100)
            archive.close()
            assert Path(video.path).read_bytes() == data
            identities.add(video.identity)
            video.close()
    assert len(identities) == 2


def test_a_damaged_table_of_members_is_made_again(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a": b"data"})
    cache = VideoCache(tmp_path / "cache")
    archive = TarMembers(cache).open_archive(str(path))
    TarMembers(cache).open(archive, "a", 100).close()
    (table,) = (tmp_path / "cache" / "indexes").iterdir()
    table.write_text("{")
    video = TarMembers(cache).open(archive, "a", 100)
    assert Path(video.path).read_bytes() == b"data"
    assert table.read_text() != "{"
    video.close()
    archive.close()


def test_a_disk_that_fills_up_gives_room_for_a_member(
    tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    place = small_disk("256k")
    cache = VideoCache(place / "cache")
    path = write_tar(tmp_path / "x.tar", {"a": b"data" * 25_000})
    kept = cache.folder / f"{'0' * 64}.video"
    kept.write_bytes(bytes(200_000))
    archive = TarMembers(cache).open_archive(str(path))
    video = TarMembers(cache).open(archive, "a", 10**6)
    assert Path(video.path).read_bytes() == b"data" * 25_000
    assert not kept.exists()
    video.close()
    archive.close()
