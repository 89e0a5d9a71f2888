"""Lists of URLs: text files, tables, and WebVid's CSV."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.manifest import refuse_web_addresses, url_key
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.run import ManifestSummary, run_manifest
from stgt.errors import ManifestError, SettingError


def rows_of(
    tmp_path: Path, name: str, data: str | bytes, *columns: str
) -> tuple[list[dict], ManifestSummary]:
    file = tmp_path / name
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    summary = run_manifest(
        ManifestConfig(
            annotations=(str(file),), output=str(tmp_path / "m.parquet"), format="urls",
            columns=columns,
        )
    )  # fmt: skip
    return pq.read_table(tmp_path / "m.parquet").to_pylist(), summary


def reasons(tmp_path: Path) -> list[str]:
    return pq.read_table(tmp_path / "m.rejected.parquet")["reason"].to_pylist()


def test_a_text_file_has_one_url_per_line(tmp_path: Path) -> None:
    text = "# my list\n\nhttps://a.example/1.mp4\r\n  https://a.example/2.mp4?v=2  \n"
    rows, summary = rows_of(tmp_path, "list.txt", text)
    urls = {"https://a.example/1.mp4", "https://a.example/2.mp4?v=2"}
    assert {row["video_uri"] for row in rows} == urls
    assert {row["clip_id"] for row in rows} == {url_key(url) for url in urls}
    assert [row["captions"] for row in rows] == [[], []]
    assert summary["rejected"] == 0


def test_lines_that_are_no_urls_are_rejected_one_by_one(tmp_path: Path) -> None:
    lines = [
        "https://a.example/1.mp4",
        "file:///etc/passwd",
        "videos/1.mp4",
        "https://",
        "ftp://a/1",
    ]
    rows, summary = rows_of(tmp_path, "list.txt", "\n".join([*lines, "https://[::1/1.mp4", ""]))
    assert [row["video_uri"] for row in rows] == lines[:1]
    assert summary["rejected"] == 5
    assert len(reasons(tmp_path)) == 5
    assert all("URL" in reason for reason in reasons(tmp_path))


def test_a_url_in_several_splits_is_a_clip_of_each(tmp_path: Path) -> None:
    text = (
        "url,caption,split,start_s\n"
        "https://a.example/1.mp4,a dog,train,\n"
        "https://a.example/1.mp4,a pet,test,\n"
        "https://a.example/1.mp4,an animal,train,\n"
        "https://a.example/1.mp4,a tail,test,2\n"
        "https://a.example/2.mp4,a cat,test,\n"
        "https://a.example/1.mp4,a friend,test,\n"
    )
    rows, summary = rows_of(tmp_path, "t.csv", text)
    one, two = (url_key(f"https://a.example/{number}.mp4") for number in (1, 2))
    assert {row["clip_id"]: (row["split"], row["captions"]) for row in rows} == {
        one: ("train", ["a dog", "an animal"]),
        f"{one}@test": ("test", ["a pet", "a friend"]),
        f"{one}#2.0-": ("test", ["a tail"]),
        two: ("test", ["a cat"]),
    }
    assert len({row["video_uri"] for row in rows}) == 2
    assert summary["rejected"] == 0


def test_an_id_that_was_given_to_clips_of_two_splits_is_an_error(tmp_path: Path) -> None:
    text = "url,clip_id,split\nhttps://a.example/1.mp4,x,train\nhttps://a.example/1.mp4,x,test\n"
    with pytest.raises(ManifestError, match="clip x has both split 'train' and 'test'"):
        rows_of(tmp_path, "t.csv", text)


@pytest.mark.parametrize("name", ["list", "list.dat", "list.dat.gz"])
def test_a_list_whose_kind_is_not_known_is_one_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(ManifestError, match=r"one URL per line must end in \.txt, .*\.csv, "):
        rows_of(tmp_path, name, gzip.compress(b"https://a.example/1.mp4\n"))


def test_a_list_without_urls_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"list\.txt: none of the rows is usable, 1 were rej"):
        rows_of(tmp_path, "list.txt", "nothing here\n")
    with pytest.raises(ManifestError, match=r"none of the rows is usable, 0 were rejected"):
        rows_of(tmp_path, "list.txt", "# only a comment\n")


def test_tables_give_captions_ids_and_spans(tmp_path: Path) -> None:
    text = (
        "link,text,id,start_s,end_s,note\n"
        "https://a.example/1.mp4,a dog,first,1.5,4,x\n"
        "https://a.example/1.mp4,a cat,second,4,6,y\n"
    )
    rows, _ = rows_of(
        tmp_path, "t.csv.gz", gzip.compress(text.encode()),
        "video=link", "caption=text", "clip_id=id",
    )  # fmt: skip
    by_id = {row["clip_id"]: row for row in rows}
    assert by_id["first"]["captions"] == ["a dog"]
    assert (by_id["first"]["start_s"], by_id["first"]["end_s"]) == (1.5, 4.0)
    assert by_id["first"]["video_id"] == by_id["second"]["video_id"]
    assert json.loads(by_id["second"]["extras"]) == {"note": "y"}


def test_the_column_of_urls_may_be_called_url_and_rows_of_one_clip_are_merged(
    tmp_path: Path,
) -> None:
    table = pa.table({"url": ["https://a.example/1.mp4"] * 2, "caption": ["a dog", "a pet"]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    ((row,), _) = rows_of(tmp_path, "t.parquet", sink.getvalue().to_pybytes())
    assert row["captions"] == ["a dog", "a pet"]


def test_a_table_without_urls_names_its_columns(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"lacks the columns video \(found: a, b\).*--columns"):
        rows_of(tmp_path, "t.csv", "a,b\n1,2\n")
    with pytest.raises(ManifestError, match=r"lacks the columns text"):
        rows_of(tmp_path, "t.csv", "url,b\nhttps://a.example/1.mp4,2\n", "caption=text")


def test_webvid_is_recognized_and_has_the_ids_and_captions_of_its_own_format(
    tmp_path: Path,
) -> None:
    long = "word " * 100
    text = (
        "videoid,contentUrl,duration,page_dir,name\n"
        f"0012,https://a.example/12.mp4,PT00H00M10S,000001_000050,{long}\n"
        "0013,https://a.example/13.mp4,PT00H00M10S,000001_000050,R&amp;D\n"
        "0014,https://a.example/14.mp4,PT00H00M10S,000001_000050,\n"
    )
    rows, summary = rows_of(tmp_path, "results_2M_val.csv", text)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "0012.mp4").write_text("x")
    run_manifest(
        ManifestConfig(
            annotations=(str(tmp_path / "results_2M_val.csv"),),
            videos=(str(tmp_path / "videos"),),
            output=str(tmp_path / "w.parquet"),
        )
    )
    theirs = pq.read_table(tmp_path / "w.parquet").to_pylist()
    same = ("clip_id", "clip_hash", "video_id", "captions", "split", "source")
    assert [{n: r[n] for n in same} for r in rows] == [{n: r[n] for n in same} for r in theirs]
    assert summary["rejected"] == 1


def test_secrets_of_urls_stand_in_no_id_and_no_reason(tmp_path: Path) -> None:
    text = "https://user:hunter22@a.example/1.mp4?token=hunter22\nftp://user:hunter22@a.example/1\n"
    ((row,), _) = rows_of(tmp_path, "list.txt", text)
    assert "hunter22" in row["video_uri"]
    assert "hunter22" not in row["clip_id"] + row["video_id"] + row["extras"]
    assert "hunter22" not in "".join(reasons(tmp_path))


def test_other_formats_need_folders_and_refuse_urls(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="videos = .*: give the folders"):
        ManifestConfig(annotations=("a.csv",), output="m.parquet")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "1.mp4").write_text("x")
    (tmp_path / "t.csv").write_text("video,caption\nhttps://a.example/1.mp4,a dog\n")
    with pytest.raises(ManifestError, match="--format urls only, and fetched by python -m jobs"):
        run_manifest(
            ManifestConfig(
                annotations=(str(tmp_path / "t.csv"),), videos=(str(tmp_path / "videos"),),
                output=str(tmp_path / "m.parquet"), format="generic",
            )
        )  # fmt: skip


def test_stages_that_read_videos_refuse_urls_and_name_the_job_that_fetches_them(
    tmp_path: Path,
) -> None:
    rows_of(tmp_path, "list.txt", "https://a.example/1.mp4?token=hunter22\n")
    with pytest.raises(
        ManifestError, match=r"python -m jobs\.fetch --annotations .*m\.parquet"
    ) as told:
        refuse_web_addresses(str(tmp_path / "m.parquet"))
    assert "hunter22" not in str(told.value)
