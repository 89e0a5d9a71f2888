"""Indexes of videos that the decoders of a node share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.video import exact_frames
from pipelines.video.child import Decoded, DecodeRequest, decode_file
from pipelines.video.exact_frames import VideoIndex
from pipelines.video.index_cache import LONG_FRAMES, IndexCache
from tests.helpers.videos import encode_video, moving_pictures


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many frames as are worth an index on disk."""
    pictures = moving_pictures(100, 32, 32) * (LONG_FRAMES // 100)
    folder = tmp_path_factory.mktemp("long")
    return encode_video(folder / "long.mp4", "mpeg4", pictures, rate=250, g="50")


def same(one: VideoIndex, other: VideoIndex) -> bool:
    return all(np.array_equal(value, vars(other)[name]) for name, value in vars(one).items())


class Reader:
    """Reads the index of a file, and counts how often."""

    def __init__(self, path: Path) -> None:
        self.path, self.times = path, 0

    def __call__(self) -> VideoIndex:
        self.times += 1
        return exact_frames.read_index(str(self.path))


def test_an_index_is_made_once_per_process_and_once_per_node(
    long_video: Path, tmp_path: Path
) -> None:
    folder, read = tmp_path / "indexes", Reader(long_video)
    one, other = IndexCache(str(folder)), IndexCache(str(folder))
    index = one.get("identity", read)
    assert one.get("identity", read) is index
    assert same(other.get("identity", read), index)
    assert read.times == 1
    assert one.get("another identity", read) is not index
    assert read.times == 2


@pytest.mark.parametrize("damage", [b"", b"no index", b"PK\x03\x04 cut short"])
def test_a_damaged_index_is_made_again(long_video: Path, tmp_path: Path, damage: bytes) -> None:
    read = Reader(long_video)
    index = IndexCache(str(tmp_path)).get("identity", read)
    (path,) = tmp_path.glob("*.npz")
    path.write_bytes(damage)
    assert same(IndexCache(str(tmp_path)).get("identity", read), index)
    assert same(IndexCache(str(tmp_path)).get("identity", read), index)
    assert read.times == 2


def test_a_folder_that_cannot_be_written_costs_only_time(long_video: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    read = Reader(long_video)
    cache = IndexCache(str(tmp_path / "file" / "indexes"))
    assert cache.get("identity", read).num_frames == LONG_FRAMES
    assert read.times == 1


def test_frames_by_a_shared_index_are_those_of_the_whole_file(
    long_video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second folder name stands for a process that finds the index on disk."""

    def decoded(folder: Path, first: int) -> Decoded:
        found = decode_file(
            DecodeRequest(
                path=str(long_video),
                start_s=first / 250,
                end_s=(first + 40) / 250,
                num_frames=5,
                frame_choice="uniform",
                size=32,
                resize="squash",
                decoder="pyav",
                max_pixels=10**9,
                max_bytes=10**12,
                index_folder=str(folder),
            )
        )
        assert isinstance(found, Decoded), found
        return found

    folder, again = tmp_path / "indexes", tmp_path / "again"
    firsts = range(0, LONG_FRAMES - 40, 490)
    apart = [decoded(tmp_path / f"none{first}", first) for first in firsts]
    decoded(folder, 0)
    again.symlink_to(folder)

    def refuse(path: str) -> VideoIndex:
        raise AssertionError(f"{path} is indexed again")

    monkeypatch.setattr(exact_frames, "read_index", refuse)
    for first, alone in zip(firsts, apart, strict=True):
        found = decoded(again, first)
        assert found.frame_indices == list(range(first, first + 40, 8))
        assert np.array_equal(found.frames, alone.frames)
        assert found.facts == alone.facts
