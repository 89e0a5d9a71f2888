"""Galleries are recognized as the splits in circulation, or not called by a benchmark's name."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from pipelines.evaluate.benchmarks import BENCHMARKS
from pipelines.evaluate.known_galleries import base_name, digest_of_ids, recognize
from stgt.errors import SettingError


@pytest.fixture(scope="module")
def ids_1k_a(annotations_dir: Path) -> list[str]:
    with (annotations_dir / "msrvtt" / "MSRVTT_JSFUSION_test.csv").open() as file:
        return [row["video_id"] for row in csv.DictReader(file)]


def listed(path: Path) -> list[str]:
    return path.read_text().split()


def name_of(ids: list[str], captions: int) -> tuple[str, str | None]:
    found = recognize(ids, captions)
    assert found is not None
    return found.name, found.benchmark


def test_the_msrvtt_tests_in_circulation_are_told_apart(
    ids_1k_a: list[str], annotations_dir: Path
) -> None:
    msrvtt = annotations_dir / "msrvtt"
    full, miech = listed(msrvtt / "test_list_full.txt"), listed(msrvtt / "test_list_miech.txt")
    assert name_of(ids_1k_a, 1000) == ("MSR-VTT 1k-A", "msrvtt")
    assert name_of([f"videos/all/{one}.mp4" for one in ids_1k_a[::-1]], 1000)[1] == "msrvtt"
    assert name_of(full, 59_800) == ("MSR-VTT full", "msrvtt_full")
    assert name_of(miech, 1000) == ("MSR-VTT 1k-B", None)
    assert name_of(ids_1k_a[:884], 884) == ("MSR-VTT 884", None)
    assert name_of(full[:879], 879) == ("MSR-VTT 879", None)
    # The right videos with other captions, and parts of a split, are not the split.
    assert name_of(ids_1k_a, 20_000) == ("the videos of MSR-VTT 1k-A", None)
    assert name_of(full, 2990) == ("the videos of MSR-VTT full test split", None)
    assert name_of(ids_1k_a[:-3], 997) == ("a part of MSR-VTT 1k-A", None)
    assert name_of(full[:884], 884) == ("a part of MSR-VTT full test split", None)
    assert "1k-A" in str(recognize(ids_1k_a[:884], 884))


def test_every_video_of_1k_a_and_no_other_counts_as_one(
    ids_1k_a: list[str], annotations_dir: Path
) -> None:
    """Its ids are stored as bits, which must be those of the list."""
    full = listed(annotations_dir / "msrvtt" / "test_list_full.txt")
    is_part = {one: name_of([one], 1)[0] == "a part of MSR-VTT 1k-A" for one in full}
    assert {one for one, inside in is_part.items() if inside} == set(ids_1k_a)


def test_didemo_by_stem_and_by_file_name(annotations_dir: Path) -> None:
    rows = json.loads((annotations_dir / "didemo" / "test_data.json").read_text())
    files = sorted({row["video"] for row in rows})
    stems = sorted({one.partition(".")[0] for one in files})
    assert (len(files), len(stems)) == (1037, 1004)
    assert name_of(stems, 1004) == ("DiDeMo grouped by stem", "didemo")
    assert name_of(files, 1037) == ("DiDeMo grouped by file name", None)
    assert name_of(stems, 4021) == ("the videos of DiDeMo's test split", None)
    with pytest.raises(SettingError, match="1,037 in FILE, which is DiDeMo grouped by file name"):
        BENCHMARKS["didemo"].check(files, 1037, "FILE")


def test_msvd_per_caption_and_pooled(annotations_dir: Path) -> None:
    ids = listed(annotations_dir / "msvd" / "test_list.txt")
    assert name_of(ids, 27_763) == ("MSVD per caption", "msvd")
    assert name_of([f"{one}.avi" for one in ids], 670) == ("MSVD pooled", "msvd_670")
    assert name_of(ids, 1340) == ("the videos of MSVD's test split", None)
    with pytest.raises(
        SettingError, match=r"found 670 in FILE, which is MSVD pooled .* the benchmark `msvd_670`"
    ):
        BENCHMARKS["msvd"].check(ids, 670, "FILE")


def test_lsmdc_is_known_by_the_form_of_its_ids() -> None:
    ids = [f"1001_Movie_00.00.{n // 60:02d}.{n % 60:02d}0-00.00.{n:02d}" for n in range(10)]
    assert recognize(ids, 10) is None
    times = [f"00.{number // 60:02d}.{number % 60:02d}" for number in range(1000)]
    ids = [f"1001_Movie_{time}.000-{time}.900.avi" for time in times]
    assert name_of(ids, 1000) == ("LSMDC public test", "lsmdc")
    assert base_name(ids[0]) == "1001_Movie_00.00.00.000-00.00.00.900"
    assert recognize(ids, 1001) is None


@pytest.mark.parametrize(
    "ids",
    [
        [f"video{n}" for n in range(1000)],  # 1,000 videos, but of the training split
        [f"video{n}" for n in range(7010, 7020)] + ["video12000"],
        ["video7020", "video7020.mp4"],  # one video twice
        ["a", "b"],
    ],
)
def test_other_galleries_have_no_name(ids: list[str]) -> None:
    assert recognize(ids, len(ids)) is None


def test_digests_ignore_order_folders_and_endings() -> None:
    assert digest_of_ids(["b/x.mp4", "y"]) == digest_of_ids(["y.avi", "x"])
    assert digest_of_ids(["x"]) != digest_of_ids(["x", "y"])
