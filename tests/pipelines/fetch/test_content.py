"""Videos are recognized by their first bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.fetch.content import HEAD_BYTES, extension_of
from pipelines.fetch.failures import FetchError

EXTENSIONS = {"m4v": "mp4", "mpeg": "mpg", "qt": "mov", "m1v": "m2v"}
"""Other names of the same containers."""


def test_all_real_videos_are_recognized(videos_dir: Path) -> None:
    files = [path for path in (videos_dir / "good").iterdir() if path.is_file()]
    assert len(files) >= 20
    for path in files:
        named = path.suffix.lstrip(".").lower()
        found = extension_of(path.read_bytes()[:HEAD_BYTES], named)
        assert found == EXTENSIONS.get(named, named), path.name


def test_a_page_that_is_named_as_a_video_is_none(videos_dir: Path) -> None:
    pages = [
        path
        for path in (videos_dir / "bad").iterdir()
        if path.is_file() and b"<html" in path.read_bytes()[:500].lower()
    ]
    assert pages
    for path in pages:
        with pytest.raises(FetchError, match="not_a_video: the server sends an HTML page"):
            extension_of(path.read_bytes()[:HEAD_BYTES], "mp4")


def test_bare_streams_need_a_start_code_and_a_name() -> None:
    start = b"\x00\x00\x00\x01\x67" + b"\x42" * 100
    assert extension_of(start, "h264") == "h264"
    with pytest.raises(FetchError):
        extension_of(start, "mp4")
    with pytest.raises(FetchError):
        extension_of(b"no start code", "h264")


@pytest.mark.parametrize(
    "head",
    [
        b"Get free access to all videos",
        b"Goodness" + b"x" * 180 + b"G" + b"x" * 400,
        b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1B" + b"\0" * 500,
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 500,
    ],
)
def test_texts_and_pictures_are_no_videos(head: bytes) -> None:
    with pytest.raises(FetchError, match=r"sends (a text|a picture)"):
        extension_of(head, "mp4")


def test_boxes_of_quicktime_are_recognized_by_size_and_kind() -> None:
    assert extension_of(b"\0\0\0\x08wide\0\0\0\0mdat", "") == "mov"
    assert extension_of(b"\0\0\0\x01mdat" + b"\0" * 20, "") == "mov"
    assert extension_of(b"\x41\0\x42\x43moov" + b"\0" * 20, "") == "mov"
    assert extension_of(b"\0\0\0\x18ftypisom\0\0\0\0avifisom", "") == "mp4"


def test_a_short_file_is_no_transport_stream() -> None:
    assert extension_of(b"G" + b"\0" * 187 + b"G", "ts") == "ts"
    assert extension_of(b"\0" * 4 + b"G" + b"\0" * 191 + b"G", "") == "m2ts"
    with pytest.raises(FetchError):
        extension_of(b"G" + b"\0" * 187, "ts")
