"""From a WebVid CSV to a manifest: nothing is lost without being said."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.manifest import SCHEMA, ManifestRows, check_manifest, clip_hash
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.formats import webvid
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow
from pipelines.manifest.run import run_manifest
from stgt.errors import ManifestError, STGTError

HEADER = "videoid,contentUrl,duration,page_dir,name\n"


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    (tmp_path / "videos" / "p").mkdir(parents=True)
    for name in ("000", "1"):
        (tmp_path / "videos" / "p" / f"{name}.mp4").write_text("a video")
    return tmp_path / "videos"


def manifest_of(tmp_path: Path, videos: Path, text: str) -> Path:
    (tmp_path / "a.csv").write_text(text)
    output = tmp_path / "m.parquet"
    run_manifest(
        ManifestConfig(
            annotations=(str(tmp_path / "a.csv"),), videos=str(videos), output=str(output)
        )
    )
    return output


def rows_csv(count: int) -> str:
    return HEADER + "".join(f"{i:03d},u,PT00H00M17S,p,caption number {i}\n" for i in range(count))


def test_ids_keep_leading_zeros_and_rows_are_sorted_by_hash(tmp_path: Path, videos: Path) -> None:
    table = pq.read_table(manifest_of(tmp_path, videos, rows_csv(50)))
    assert table.schema.names == SCHEMA.names
    ids = table["clip_id"].to_pylist()
    assert sorted(ids)[0] == "000"
    assert ids == sorted(ids, key=clip_hash)
    assert table["video_uri"][0].as_py() == f"{videos}/p/{ids[0]}.mp4"


def test_any_range_of_rows_can_be_read(tmp_path: Path, videos: Path) -> None:
    rows = ManifestRows(str(manifest_of(tmp_path, videos, rows_csv(3000))))
    everything = rows.read(0, 3000)
    assert len(everything) == len(rows) == 3000
    assert rows.read(1000, 2100) == everything[1000:2100]
    assert rows.read(1023, 1024) == everything[1023:1024]
    assert rows.read(1024, 1025) == everything[1024:1025]
    assert rows.read(2999, 5000) == everything[2999:]
    assert rows.read(3000, 5000) == []


def test_rows_that_cannot_be_used_are_listed_with_their_reason(
    tmp_path: Path, videos: Path
) -> None:
    text = HEADER + '1,u,d,p,"a, quoted caption"\n2,u,d,p,...\n,u,d,p,x\n4,u,d,nan,x\n5,u,d,p,nan\n'
    manifest = manifest_of(tmp_path, videos, text)
    assert pq.read_table(manifest)["captions"].to_pylist() == [["a, quoted caption"]]
    rejected = pq.read_table(tmp_path / "m.rejected.parquet").to_pylist()
    assert [(row["row"], row["reason"]) for row in rejected] == [
        (2, "caption is empty after cleaning"),
        (3, "videoid is empty"),
        (4, "page_dir is empty"),
        (5, "caption is empty after cleaning"),
    ]


def test_a_list_of_rejected_rows_of_an_earlier_run_does_not_stay(
    tmp_path: Path, videos: Path
) -> None:
    manifest_of(tmp_path, videos, HEADER + "1,u,d,p,one\n2,u,d,p,...\n")
    assert (tmp_path / "m.rejected.parquet").exists()
    manifest_of(tmp_path, videos, HEADER + "1,u,d,p,one\n2,u,d,p,two\n")
    assert not (tmp_path / "m.rejected.parquet").exists()


def test_an_unclosed_quote_loses_no_row_in_silence(tmp_path: Path, videos: Path) -> None:
    manifest = manifest_of(tmp_path, videos, HEADER + '1,u,d,p,one\n2,u,d,p,"two\n3,u,d,p,three\n')
    assert set(pq.read_table(manifest)["clip_id"].to_pylist()) == {"1", "3"}
    (rejected,) = pq.read_table(tmp_path / "m.rejected.parquet").to_pylist()
    assert rejected["row"] == 2
    assert "a quote may be unclosed" in rejected["reason"]


def test_a_video_outside_the_folder_is_rejected(tmp_path: Path, videos: Path) -> None:
    text = HEADER + "1,u,d,p,one\n2,u,d,../../etc,two\n../3,u,d,p,three\n"
    manifest = manifest_of(tmp_path, videos, text)
    assert pq.read_table(manifest)["clip_id"].to_pylist() == ["1"]
    assert len(pq.read_table(tmp_path / "m.rejected.parquet")) == 2


def test_a_folder_with_none_of_the_videos_is_refused(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "readme.txt").write_text("none here")
    with pytest.raises(ManifestError, match="contains none of the 50 videos"):
        manifest_of(tmp_path, tmp_path / "videos", rows_csv(50))
    with pytest.raises(ManifestError, match="missing or empty"):
        manifest_of(tmp_path, tmp_path / "videos" / "readme.txt", rows_csv(50))
    assert not (tmp_path / "m.parquet").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("videoid,name\n1,x\n", r"lacks the columns page_dir \(found: videoid, name\)"),
        ("", "found: none"),
        (HEADER, "none of the rows is usable, 0 were rejected"),
        (
            HEADER + "1,u,d,p,...\n",
            "none of the rows is usable, 1 were rejected; the first is row 1 of",
        ),
        (HEADER + "1,u,d,p,x\n1,u,d,p,y\n", r"1 clip ids occur more than once \(1\)"),
    ],
)
def test_annotations_that_cannot_be_used_give_one_sentence(
    tmp_path: Path, videos: Path, text: str, message: str
) -> None:
    with pytest.raises(ManifestError, match=message):
        manifest_of(tmp_path, videos, text)
    assert not (tmp_path / "m.parquet").exists()


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path, videos: Path) -> None:
    (tmp_path / "a.csv").write_bytes(HEADER.encode() + b"1,u,d,p,caf\xe9\n")
    config = ManifestConfig(
        annotations=(str(tmp_path / "a.csv"),),
        videos=str(videos),
        output=str(tmp_path / "m.parquet"),
    )
    with pytest.raises(ManifestError, match="not UTF-8"):
        run_manifest(config)


def test_a_missing_or_empty_folder_of_videos_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        with pytest.raises(ManifestError, match=f"{folder} is missing or empty"):
            manifest_of(tmp_path, tmp_path / folder, rows_csv(1))


def test_a_manifest_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="does not exist"):
        check_manifest(str(tmp_path / "none.parquet"))
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(ManifestError, match="not a Parquet file"):
        check_manifest(str(tmp_path / "text.parquet"))


def test_real_webvid_files_are_read_whatever_the_order_of_their_columns(
    annotations_dir: Path,
) -> None:
    for name in ("webvid/test_webvid.csv", "derived/webvid_results_5col.csv"):
        source = AnnotationSource(
            annotations=(str(annotations_dir / name),), videos="/videos", split="train", caption=""
        )
        rows = list(webvid.read(source))
        clips = [row for row in rows if isinstance(row, ClipRow)]
        assert len(clips) > 10, name
        assert not [row for row in rows if isinstance(row, BadRow)], name
        first = next(clip for clip in clips if clip.clip_id == "1053841541")
        assert first.video_uri == "/videos/027701_027750/1053841541.mp4"
        assert first.captions[0].startswith("Travel blogger shoot a story")


def test_an_output_that_is_a_folder_is_named_before_annotations_are_read(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "1.mp4").touch()
    config = ManifestConfig(
        annotations=("/nowhere.csv",), videos=(str(videos),), output=str(tmp_path)
    )
    with pytest.raises(STGTError, match=f"{tmp_path} is a folder, but a file must be written"):
        run_manifest(config)
