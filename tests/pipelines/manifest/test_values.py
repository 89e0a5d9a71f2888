"""Times, ids and missing values in the forms that people and libraries write."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.formats import values
from pipelines.manifest.run import run_manifest


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (2, 2.0),
        (2.5, 2.5),
        (0, 0.0),
        (decimal.Decimal("2.5"), 2.5),
        ("2.5", 2.5),
        (" 2,5 ", 2.5),
        ("1e1", 10.0),
        (".5", 0.5),
        ("0:02", 2.0),
        ("75:30", 4530.0),
        ("00:00:00.500", 0.5),
        ("1:02:03", 3723.0),
        ("01:02:03,250", 3723.25),
        ("100:00:01", 360001.0),
        ("0 days 00:00:05.500000", 5.5),
        ("1 day, 0:00:05", 86405.0),
        ("1970-01-01 00:00:05.5", 5.5),
        ("1900-01-01T00:01:00", 60.0),
        (datetime.timedelta(minutes=1, milliseconds=500), 60.5),
        (datetime.time(1, 2, 3, 500_000), 3723.5),
        (datetime.datetime(1970, 1, 1, 0, 0, 5), 5.0),
        (None, None),
        ("", None),
        ("nan", None),
        ("NaT", None),
        (math.nan, None),
    ],
)
def test_times_in_the_forms_that_people_write(value: Any, seconds: float | None) -> None:
    assert values.seconds(value, "start_s") == seconds


@pytest.mark.parametrize(
    "value",
    [
        *(-1, math.inf, "-1", "inf", "soon", "1:2:3:4", "0:60", "1:60:00", "1:2", "2024-05-01"),
        *(True, [1], {"s": 1}, b"1", datetime.datetime(2024, 5, 1), datetime.date(1970, 1, 1)),
        *(datetime.timedelta(seconds=-1), "00:00:01:12", "1.2.3", ":30"),
        *(10**400, "1" + "0" * 400, "1" + "0" * 400 + ":00", "1" + "0" * 400 + " days 0:00:00"),
    ],
)
def test_what_is_no_time_is_refused_with_the_accepted_forms(value: Any) -> None:
    with pytest.raises(ValueError, match=r"end_s = .* valid time; give seconds .* H:MM:SS.mmm"):
        values.seconds(value, "end_s")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, None), (math.nan, None), ("", None), ("nan", None), ("  ", None)),
        *((0, "0"), (0.0, "0.0"), ("0", "0"), (7, "7"), ("-x", "-x"), ("nancy", "nancy")),
    ],
)
def test_null_is_no_id_and_zero_is_one(value: Any, text: str | None) -> None:
    assert values.identifier(value, "clip_id") == text


@pytest.mark.parametrize("value", [{"a": 1}, ["a"], ("a",), b"a", True, False, {}, []])
def test_what_is_no_id_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="video must be a text or a number, but is"):
        values.identifier(value, "video")


def test_times_of_arrow_are_read_from_parquet(tmp_path: Path) -> None:
    """Durations, times of day and time stamps of each resolution."""
    (tmp_path / "a.mp4").touch()
    ends = [datetime.timedelta(seconds=2.5), datetime.time(0, 0, 2, 500_000)]
    ends += [datetime.datetime(1970, 1, 1, 0, 0, 2, 500_000)]
    kinds = [
        *(("duration", ends[0], pa.duration(unit)) for unit in ("ms", "us", "ns")),
        *(("time", ends[1], kind) for kind in (pa.time32("ms"), pa.time64("us"), pa.time64("ns"))),
        *(("stamp", ends[2], pa.timestamp(unit)) for unit in ("ms", "us", "ns")),
        ("decimal", decimal.Decimal("2.5"), pa.decimal128(5, 2)),
        ("float", 2.5, pa.float32()),
    ]
    for name, end, kind in kinds:
        table = pa.table(
            {
                "video": ["a.mp4", "a.mp4"],
                "caption": ["x", "y"],
                "start_s": pa.nulls(2, kind),
                "end_s": pa.array([end, None], kind),
            }
        )
        pq.write_table(table, tmp_path / "t.parquet")
        run_manifest(
            ManifestConfig(
                annotations=(str(tmp_path / "t.parquet"),),
                videos=(str(tmp_path),),
                output=str(tmp_path / "m.parquet"),
                format="generic",
            )
        )
        clips = pq.read_table(tmp_path / "m.parquet").to_pylist()
        found = {clip["captions"][0]: (clip["start_s"], clip["end_s"]) for clip in clips}
        assert found == {"x": (None, 2.5), "y": (None, None)}, (name, kind)


def test_a_number_as_video_or_split_is_text(tmp_path: Path) -> None:
    (tmp_path / "7.mp4").touch()
    row = {"video": 7, "caption": "x", "split": math.nan, "start_s": "0:01", "end_s": "0:02,5"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    run_manifest(
        ManifestConfig(
            annotations=(str(tmp_path / "t.jsonl"),),
            videos=(str(tmp_path),),
            output=str(tmp_path / "m.parquet"),
            format="generic",
        )
    )
    (clip,) = pq.read_table(tmp_path / "m.parquet").to_pylist()
    assert (clip["clip_id"], clip["split"]) == ("7#1.0-2.5", "train")
    assert clip["video_uri"] == str(tmp_path / "7.mp4")
