"""The baselines of the benchmark decode: where FFmpeg's libraries come from."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import av
import pytest

from pipelines.bench.decode import baselines, link_ffmpeg


def test_the_libraries_of_pyav_are_found_by_their_usual_names(tmp_path: Path) -> None:
    if not (Path(av.__file__).parents[1] / "av.libs").is_dir():
        pytest.skip("PyAV was built from source and brings no libraries along")
    link_ffmpeg(tmp_path)
    names = {path.name.partition(".")[0]: path for path in tmp_path.iterdir()}
    assert {"libavcodec", "libavformat", "libavutil", "libswscale"} <= names.keys()
    codec = names["libavcodec"]
    major = av.library_versions["libavcodec"][0]
    assert codec.name == f"libavcodec.so.{major}"
    # PyAV has loaded the same file, so this loads nothing new.
    assert ctypes.CDLL(str(codec)).avcodec_version() >> 16 == major


def test_a_baseline_that_is_missing_is_named_with_what_to_install() -> None:
    found, notes = baselines()
    assert {"decord", "pyav in order", "pyav seeking"} <= found.keys()
    if importlib.util.find_spec("torchcodec") is None:
        assert "torchcodec" not in found
        (note,) = notes
        assert note.startswith("decode was not compared with torchcodec: it is not installed; run")
    else:
        assert ("torchcodec" in found) == (notes == ())
