"""`jobs.manifest --check`: a manifest is compared with the published size of its split."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pipelines.artifacts.published_counts import PUBLISHED_COUNTS, PublishedSplit
from pipelines.evaluate.benchmarks import BENCHMARKS
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.published import FoundCounts, compare
from pipelines.manifest.run import ManifestSummary, run_manifest
from stgt.errors import ManifestError


def made(
    tmp_path: Path, annotations: tuple[Path, ...], check: PublishedSplit, **settings: str
) -> ManifestSummary:
    videos = tmp_path / "videos"
    videos.mkdir(exist_ok=True)
    (videos / "video9770.mp4").touch()
    return run_manifest(
        ManifestConfig(
            annotations=tuple(map(str, annotations)),
            videos=(str(videos),),
            output=str(tmp_path / "manifest.parquet"),
            check=check,
            **settings,  # type: ignore[arg-type]
        )
    )


def test_the_published_annotations_pass_whatever_is_downloaded(
    tmp_path: Path, annotations_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file = annotations_dir / "msrvtt/MSRVTT_JSFUSION_test.csv"
    found = made(tmp_path, (file,), "msrvtt_1ka", format="msrvtt", split="test")
    assert (found["clips"], found["captions"]) == (1000, 1000)
    assert "has the size of MSR-VTT, test split 1k-A" in caplog.text
    assert "the videos of 999 of 1,000 clips are not there" in caplog.text


def test_annotations_that_lack_a_row_fail_in_one_sentence(
    tmp_path: Path, annotations_dir: Path
) -> None:
    lines = (annotations_dir / "msrvtt/MSRVTT_JSFUSION_test.csv").read_text().splitlines()
    file = tmp_path / "test.csv"
    file.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ManifestError) as raised:
        made(tmp_path, (file,), "msrvtt_1ka", format="msrvtt", split="test")
    said = str(raised.value)
    assert "999 clips instead of 1,000 and 999 captions instead of 1,000" in said
    assert "counted in MSRVTT_JSFUSION_test.csv" in said
    assert "\n" not in said
    assert (tmp_path / "manifest.parquet").exists()


@pytest.mark.parametrize("split", ["didemo_val", "didemo_test"])
def test_didemo_counts_videos_and_not_names(
    tmp_path: Path, annotations_dir: Path, split: PublishedSplit
) -> None:
    file = annotations_dir / f"didemo/{split.partition('_')[2]}_data.json"
    name = json.loads(file.read_text())[0]["video"]
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / name).touch()
    found = made(tmp_path, (file,), split, format="didemo")
    assert found["clips"] == PUBLISHED_COUNTS[split].clips


@pytest.mark.slow
def test_questions_are_counted(tmp_path: Path, annotations_dir: Path) -> None:
    file = annotations_dir / "msrvtt_qa/val.jsonl"
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/video6513.mp4").touch()
    made(tmp_path, (file,), "msrvtt_qa_val", format="msrvtt_qa")
    with pytest.raises(ManifestError, match="12,278 questions instead of 72,821"):
        made(tmp_path, (file,), "msrvtt_qa_test", format="msrvtt_qa")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, annotations_dir: Path) -> str:
    file = annotations_dir / "msrvtt/MSRVTT_JSFUSION_test.csv"
    folder = tmp_path_factory.mktemp("published")
    return made(folder, (file,), "msrvtt_1ka", format="msrvtt", split="test")["manifest"]


@pytest.mark.parametrize(
    ("split", "found", "fits"),
    [
        # Rounded numbers: whatever rounds to 2.5 million.
        ("webvid_2m_train", FoundCounts(2_450_001, 2_450_001, 0), True),
        ("webvid_2m_train", FoundCounts(2_548_000, 2_548_000, 999, dropped=1), True),
        ("webvid_2m_train", FoundCounts(2_449_999, 2_449_999, 0), False),
        # Lines without a sentence are rejected, and lines of one clip merged.
        ("lsmdc_train", FoundCounts(100_900, 101_074, 5), True),
        ("lsmdc_train", FoundCounts(100_900, 101_074, 0), False),
        # Two numbers are in circulation.
        ("didemo_train", FoundCounts(8_395, 8_395, 0), True),
        ("didemo_train", FoundCounts(8_392, 8_392, 0), True),
        ("didemo_train", FoundCounts(8_393, 8_393, 0), False),
        ("vidal_10m", FoundCounts(10_076_600, 10_076_600, 13), True),
        ("vidal_10m", FoundCounts(3_000_000, 3_000_000, 0), False),
    ],
)
def test_only_the_published_size_fits(
    manifest: str, split: PublishedSplit, found: FoundCounts, fits: bool
) -> None:
    if fits:
        compare(split, manifest, found)
    else:
        with pytest.raises(ManifestError, match="instead of"):
            compare(split, manifest, found)


def test_evaluation_expects_the_published_sizes() -> None:
    expected = {
        "msrvtt": (1000, 1000),
        "msrvtt_full": (2990, 59_800),
        "didemo": (1004, 1004),
        "lsmdc": (1000, 1000),
        "msvd": (670, 27_763),
        "msvd_670": (670, 670),
        "any": (None, None),
    }
    assert {name: (one.videos, one.captions) for name, one in BENCHMARKS.items()} == expected
