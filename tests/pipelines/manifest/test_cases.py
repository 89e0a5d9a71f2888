"""Small inputs that failed once, as they lie in the folder of cases, and what is right for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.manifest.config import ManifestConfig, ManifestFormat
from pipelines.manifest.run import run_manifest
from stgt.errors import ManifestError


def clips_of(
    tmp_path: Path, annotations: Path, videos: Path, name: ManifestFormat = "generic"
) -> dict[str, dict[str, Any]]:
    output = tmp_path / "m.parquet"
    run_manifest(
        ManifestConfig(
            annotations=(str(annotations),), videos=(str(videos),), output=str(output), format=name
        )
    )
    return {row["clip_id"]: row for row in pq.read_table(output).to_pylist()}


def rejected(tmp_path: Path) -> list[tuple[int, str]]:
    rows = pq.read_table(tmp_path / "m.rejected.parquet").to_pylist()
    return [(row["row"], row["reason"]) for row in rows]


def refusal(tmp_path: Path, folder: Path, file: str, name: ManifestFormat = "generic") -> str:
    with pytest.raises(ManifestError) as raised:
        clips_of(tmp_path, folder / file, folder / "v", name)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_01_a_comma_rejects_the_row_instead_of_cutting_the_caption(
    cases_dir: Path, tmp_path: Path
) -> None:
    folder = cases_dir / "01_csv_unquoted_comma"
    assert "line 2 has 3 fields, 2 expected" in refusal(tmp_path, folder, "cap.csv")
    assert "line 2 has 6 fields, 5 expected" in refusal(tmp_path, folder, "wv.csv", "webvid")


def test_02_an_open_quote_swallows_no_rows(cases_dir: Path, tmp_path: Path) -> None:
    folder = cases_dir / "02_csv_open_quote_swallows_rows"
    message = refusal(tmp_path, folder, "q.csv")
    assert "contains none of the 2 videos" in message
    assert "1 row was rejected" in message
    assert "line 2: a field spans several lines: a quote may be unclosed" in message


@pytest.mark.parametrize(
    ("file", "ids", "reason"),
    [
        ("t.jsonl", ["a.mp4"], "line 2 is not valid JSON: Unterminated string"),
        ("s.jsonl", ["a.mp4", "b.mp4"], None),
        ("l.jsonl", ["a.mp4"], "line 2 is not UTF-8 text"),
    ],
)
def test_03_a_bad_line_costs_itself(
    cases_dir: Path, tmp_path: Path, file: str, ids: list[str], reason: str | None
) -> None:
    folder = cases_dir / "03_jsonl_one_bad_line"
    assert sorted(clips_of(tmp_path, folder / file, folder / "v")) == ids
    if reason is not None:
        ((row, said),) = rejected(tmp_path)
        assert row == 2
        assert said.startswith(reason)


def test_04_nan_is_null_and_a_byte_order_mark_is_skipped(cases_dir: Path, tmp_path: Path) -> None:
    folder = cases_dir / "04_json_nan_and_bom"
    assert list(clips_of(tmp_path, folder / "nan.json", folder / "v")) == ["a.mp4"]
    assert rejected(tmp_path) == [(2, "b.mp4: caption is empty after cleaning")]
    assert list(clips_of(tmp_path, folder / "bom.json", folder / "v")) == ["a.mp4"]


def test_05_absolute_paths_and_file_uris_are_taken_as_they_are(
    cases_dir: Path, tmp_path: Path
) -> None:
    folder = cases_dir / "05_absolute_and_file_uri"
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "b.mp4").touch()
    text = (folder / "mixed.jsonl").read_text().replace("/ABSOLUTE", str(tmp_path))
    (tmp_path / "mixed.jsonl").write_text(text)
    clips = clips_of(tmp_path, tmp_path / "mixed.jsonl", folder / "v")
    uris = {clip["captions"][0]: clip["video_uri"] for clip in clips.values()}
    other = str(tmp_path / "v" / "b.mp4")
    assert uris == {"x": str(folder / "v" / "a.mp4"), "y": other, "z": other}


def test_06_null_is_no_id_and_zero_is_one(cases_dir: Path, tmp_path: Path) -> None:
    folder = cases_dir / "06_nan_id_and_zero_id"
    assert sorted(clips_of(tmp_path, folder / "nan.jsonl", folder / "v")) == ["a.mp4", "b.mp4"]
    clips = clips_of(tmp_path, folder / "id0.jsonl", folder / "v")
    assert {name: clip["captions"] for name, clip in clips.items()} == {"0": ["x"], "a.mp4": ["z"]}


def test_07_a_double_colon_is_part_of_a_name(cases_dir: Path, tmp_path: Path) -> None:
    folder = cases_dir / "07_double_colon_in_name"
    clips = clips_of(tmp_path, folder / "cc.jsonl", folder / "v")
    assert clips["c::d.mp4"]["video_uri"] == str(folder / "v" / "c::d.mp4")


def test_08_clock_times_are_times_and_nan_is_none(cases_dir: Path, tmp_path: Path) -> None:
    folder = cases_dir / "08_times_hms"
    (clip,) = clips_of(tmp_path, folder / "t.jsonl", folder / "v").values()
    assert (clip["start_s"], clip["end_s"]) == (0.0, 0.2)
    (clip,) = clips_of(tmp_path, folder / "n.csv", folder / "v").values()
    assert (clip["start_s"], clip["end_s"]) == (None, None)


def test_09_ids_find_files_with_any_extension(cases_dir: Path, tmp_path: Path) -> None:
    folder = cases_dir / "09_ids_without_extension"
    (clip,) = clips_of(tmp_path, folder / "g.jsonl", folder / "v").values()
    assert clip["video_uri"] == str(folder / "v" / "a.mp4")
    (clip,) = clips_of(tmp_path, folder / "lsmdc.csv", folder / "v", "lsmdc").values()
    assert clip["video_uri"].endswith("/0001_American_Beauty_00.00.51.926-00.00.54.129.mp4")
    assert Path(clip["video_uri"]).is_file()


def test_10_videos_are_found_in_subfolders(cases_dir: Path, tmp_path: Path) -> None:
    folder = cases_dir / "10_msrvtt_two_folders"
    clips = clips_of(tmp_path, folder / "MSRVTT_data.json", folder / "v", "msrvtt")
    assert {clip["video_uri"] for clip in clips.values()} == {
        str(folder / "v" / "TrainValVideo" / "video0.mp4"),
        str(folder / "v" / "TestVideo" / "video9770.mp4"),
    }


def test_11_equal_rows_are_dropped_and_counted(cases_dir: Path, tmp_path: Path) -> None:
    folder = cases_dir / "11_webvid_duplicate_ids"
    summary = run_manifest(
        ManifestConfig(
            annotations=(str(folder / "d.csv"),),
            videos=(str(folder / "v"),),
            output=str(tmp_path / "m.parquet"),
        )
    )
    assert (summary["clips"], summary["equal_rows_dropped"]) == (1, 1)


def test_12_a_long_field_is_taken(cases_dir: Path, tmp_path: Path) -> None:
    folder = cases_dir / "12_long_field"
    (clip,) = clips_of(tmp_path, folder / "l.csv", folder / "v").values()
    assert len(clip["extras"]) > 131_072
