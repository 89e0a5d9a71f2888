"""Tables as people write them: delimiters, compression, and bad lines that cost only themselves."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.manifest.config import ManifestConfig, ManifestFormat
from pipelines.manifest.run import run_manifest
from stgt.errors import ManifestError

Made = Callable[..., dict[str, list[str]]]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Captions by clip id of a manifest of one annotation file; the videos a to d are there."""
    (tmp_path / "v" / "p").mkdir(parents=True)
    for name in "abcd":
        (tmp_path / "v" / f"{name}.mp4").touch()
        (tmp_path / "v" / "p" / f"{name}.mp4").touch()

    def make(
        file: str, content: str | bytes, name: ManifestFormat = "generic", **settings: Any
    ) -> dict[str, list[str]]:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / file).write_bytes(data)
        output = tmp_path / "m.parquet"
        run_manifest(
            ManifestConfig(
                annotations=(str(tmp_path / file),),
                videos=(str(tmp_path / "v"),),
                output=str(output),
                format=name,
                **settings,
            )
        )
        rows = pq.read_table(output).to_pylist()
        return {row["clip_id"]: row["captions"] for row in rows}

    return make


def rejected(tmp_path: Path) -> list[tuple[int, str]]:
    rows = pq.read_table(tmp_path / "m.rejected.parquet").to_pylist()
    return [(row["row"], row["reason"]) for row in rows]


THREE = {"a.mp4": ["one"], "b.mp4": ["two, too"], "c.mp4": ["three"]}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("t.tsv", "video\tcaption\na.mp4\tone\nb.mp4\ttwo, too\nc.mp4\tthree\n"),
        ("t.csv", "video\tcaption\na.mp4\tone\nb.mp4\ttwo, too\nc.mp4\tthree\n"),
        ("t.csv", "video;caption\na.mp4;one\nb.mp4;two, too\nc.mp4;three\n"),
        ("t.csv", "caption|video\none|a.mp4\ntwo, too|b.mp4\nthree|c.mp4\n"),
        ("t.tsv", 'video,caption\na.mp4,one\nb.mp4,"two, too"\nc.mp4,three\n'),
        ("t.csv", '\ufeffvideo,caption\r\na.mp4,one\r\nb.mp4,"two, too"\r\n\r\nc.mp4,three\r\n'),
        ("t.csv", "\n" * 2000 + 'video,"caption"\na.mp4,one\nb.mp4,"two, too"\nc.mp4,three'),
        ("t.csv", 'video,caption,\na.mp4,one,\nb.mp4,"two, too",\nc.mp4,three,\n'),
    ],
)
def test_tables_with_other_delimiters(made: Made, file: str, text: str) -> None:
    assert made(file, text) == THREE


CSV = 'video,caption\na.mp4,one\nb.mp4,"two, too"\nc.mp4,three\n'
JSONL = "".join(json.dumps({"video": v, "caption": c[0]}) + "\n" for v, c in THREE.items())
JSON = json.dumps([{"video": v, "caption": c[0]} for v, c in THREE.items()])


@pytest.mark.parametrize(("name", "text"), [("csv", CSV), ("jsonl", JSONL), ("json", JSON)])
@pytest.mark.parametrize(
    ("ending", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)]
)
def test_compressed_files(
    made: Made, name: str, text: str, ending: str, compress: Callable[[bytes], bytes]
) -> None:
    assert made(f"t.{name}.{ending}", compress(text.encode())) == THREE


def test_a_zip_of_one_or_several_annotation_files(made: Made, tmp_path: Path) -> None:
    rows = [{"video": v, "caption": c[0]} for v, c in THREE.items()]
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "t.parquet")
    archive = tmp_path / "source.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("set/README.txt", "about the set")
        zipped.writestr("__MACOSX/set/._t.csv", "\0\1")
        zipped.writestr("set/a.csv", CSV[: CSV.index("c.mp4")])
        zipped.writestr("set/b.json.gz", gzip.compress(json.dumps(rows[2:]).encode()))
    assert made("t.zip", archive.read_bytes()) == THREE
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.write(tmp_path / "t.parquet", "t.parquet")
        zipped.writestr("bad.csv", "video,caption\nb.mp4,two, too\n")
    assert made("t.zip", archive.read_bytes()) == {"a.mp4": ["one"]}
    (row,) = pq.read_table(tmp_path / "m.rejected.parquet").to_pylist()
    assert row["file"] == f"{tmp_path}/t.zip/bad.csv"


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("t.csv.gz", gzip.compress(CSV.encode() * 99, mtime=0)[:-20], "t.csv.gz is damaged"),
        ("t.csv.gz", b"no gzip", "t.csv.gz is damaged"),
        ("t.zip", b"no zip", "t.zip is not a valid zip archive"),
        ("t.csv", CSV.encode("utf-16"), "t.csv is UTF-16 text; convert it to UTF-8"),
        ("t.csv", b"a,video,caption,a\n1,a.mp4,x,2\n", "several columns named a"),
        ("t.csv", b"video,caption,caption\na.mp4,x,y\n", "several columns named caption"),
        ("t.csv", b'"video,caption\na.mp4,x\n' * 2000, "line 1: the column names cannot be read"),
        ("t.csv", b'video,"caption\na.mp4,x\n', "line 1: the column names cannot be read"),
        ("t.csv", b"\n" * 2000, "lacks the columns video, caption .found: none"),
        ("t.csv", b"vid\xe9o,caption\n", "line 1 is not UTF-8 text"),
        ("t.doc", b"video,caption\n", "must end in .csv, .tsv, .jsonl, .json, .parquet"),
        ("t.json", b'[{"video": "a.mp4", "caption": "x"}, {"video"', "not valid .* after entry 1"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    made: Made, file: str, data: bytes, message: str
) -> None:
    with pytest.raises(ManifestError, match=message) as raised:
        made(file, data)
    assert "\n" not in str(raised.value)


def test_a_zip_without_annotations_says_what_is_in_it(made: Made, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "source.zip", "w") as zipped:
        zipped.writestr("a.mp4", "video")
    with pytest.raises(ManifestError, match=r"contains no annotation file \(found: a.mp4\)"):
        made("t.zip", (tmp_path / "source.zip").read_bytes())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"b.mp4,two, too\n", "line 3 has 3 fields, 2 expected"),
        (b"b.mp4\n", "line 3 has 1 field, 2 expected"),
        (b'b.mp4,"two\n', "line 3: a field spans several lines: a quote may be unclosed"),
        (b'"b.mp4,two\n', "line 3: a field spans several lines: a quote may be unclosed"),
        (b"b.mp4,caf\xe9\n", "line 3: the line is not UTF-8 text"),
        (b"b.mp4,t\0o\n", "line 3: "),
        (b"video,caption\n", "line 3 repeats the header"),
        (b"nan,two\n", "video is missing or empty"),
        (b",two\n", "video is missing or empty"),
    ],
)
def test_a_bad_line_of_a_table_costs_itself(
    made: Made, tmp_path: Path, line: bytes, reason: str
) -> None:
    data = b"video,caption\na.mp4,one\n" + line + b"\nc.mp4,three\nd.mp4,four\n"
    assert made("t.csv", data) == {"a.mp4": ["one"], "c.mp4": ["three"], "d.mp4": ["four"]}
    ((row, said),) = rejected(tmp_path)
    assert row == 2
    assert said.startswith(reason)


@pytest.mark.parametrize(
    "ids", [("a.mp4", "b.mp4"), ("1201", "1202"), ("xk3_ab-9Qz1", "xk3_ab-9Qz2")]
)
def test_two_stray_quotes_do_not_hide_the_rows_between_them(
    made: Made, tmp_path: Path, ids: tuple[str, str]
) -> None:
    text = f'video,caption\na.mp4,one\n{ids[0]},"two\n{ids[1]},three"\nc.mp4,four\n'
    found = made("t.csv", text)
    assert found == {"a.mp4": ["one"], ids[1]: ['three"'], "c.mp4": ["four"]}
    assert [row for row, _ in rejected(tmp_path)] == [2]


def test_a_last_line_that_is_cut_off_in_a_quote_is_rejected(made: Made, tmp_path: Path) -> None:
    assert made("t.csv", 'video,caption\na.mp4,one\nb.mp4,"tw') == {"a.mp4": ["one"]}
    assert "a quote is not closed" in rejected(tmp_path)[0][1]


def test_captions_of_several_lines_and_quotes_within_a_caption_are_kept(made: Made) -> None:
    text = 'video,caption\na.mp4,"one\nline, and two"\nb.mp4,a 5" pipe\nc.mp4,"say ""hi"""\n'
    assert made("t.csv", text) == {
        "a.mp4": ["one\nline, and two"],
        "b.mp4": ['a 5" pipe'],
        "c.mp4": ['say "hi"'],
    }


def test_thousands_of_rows_after_an_open_quote_are_kept(made: Made, tmp_path: Path) -> None:
    rows = "".join(f"{number}.mp4,caption {number}\n" for number in range(3000))
    found = made("t.csv", f'video,caption\na.mp4,one\nb.mp4,"two\n{rows}')
    assert len(found) == 3001
    assert [row for row, _ in rejected(tmp_path)] == [2]


def test_long_fields_are_taken(made: Made, tmp_path: Path) -> None:
    long = "word " * 40_000
    assert made("t.csv", f"video,caption,asr\na.mp4,one,{long}\n") == {"a.mp4": ["one"]}
    text = f"videoid,contentUrl,duration,page_dir,name\na,u,d,p,{long}\n"
    assert len(made("w.csv", text, "webvid")["a"][0]) <= 350


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("alpro", '{"clip_name": "%s", "caption": "one"}'),
        ("msrvtt_qa", '{"video_id": "%s", "question": "q", "answer": "a"}'),
        ("lsmdc", "%s_00.00.51.926-00.00.54.129\t0\t0\t0\t0\tone"),
    ],
)
def test_a_bad_line_costs_itself_in_every_format_of_lines(
    made: Made, tmp_path: Path, name: ManifestFormat, line: str
) -> None:
    (tmp_path / "v" / "d_00.00.51.926-00.00.54.129.avi").touch()
    lines = [line % "a", line % "b", "   ", line % "d"]
    data = "\n".join(lines).encode().replace(b"one", b"caf\xe9", 2).replace(b"caf\xe9", b"one", 1)
    if name == "msrvtt_qa":
        data = data.replace(b'"b", "question"', b'"b", "que')
    clips = made("t.csv" if name == "lsmdc" else "t.jsonl", data, name)
    assert [clip[0] for clip in sorted(clips)] == ["a", "d"]
    ((row, reason),) = rejected(tmp_path)
    assert row == 2
    assert reason.startswith("line 2 is not ")


@pytest.mark.parametrize(
    "text",
    [
        '{"video": "b.mp4", "caption": "two", "caption": "too"}',
        '{"video": "b.mp4", "caption": "two"',
        '{"video": {"name": "b.mp4"}, "caption": "two"}',
        '{"video": ["b.mp4"], "caption": "two"}',
        '{"video": "b.mp4", "caption": "two", "clip_id": {"a": 1}}',
        '{"video": "b.mp4", "caption": "two", "clip_id": true}',
        '{"video": NaN, "caption": "two"}',
        '["b.mp4", "two"]',
        "null",
    ],
)
def test_an_object_that_cannot_be_used_costs_itself(made: Made, tmp_path: Path, text: str) -> None:
    good = ['{"video": "a.mp4", "caption": "one"}', '{"video": "c.mp4", "caption": "three"}']
    wanted = {"a.mp4": ["one"], "c.mp4": ["three"]}
    assert made("t.jsonl", "\n".join([good[0], text, good[1]])) == wanted
    assert [row for row, _ in rejected(tmp_path)] == [2]
    if text.endswith(("}", "]", "null")):
        (tmp_path / "m.rejected.parquet").unlink()
        assert made("t.json", f"[{good[0]}, {text}, {good[1]}]") == wanted
        assert [row for row, _ in rejected(tmp_path)] == [2]


def test_nan_in_json_is_null_wherever_it_stands_and_texts_keep_theirs(made: Made) -> None:
    """Values at the edges of the blocks in which the file is read included."""
    rows = [
        {
            "video": f"{number}.mp4",
            "caption": 'NaN, "-Infinity\\',
            "score": (math.nan, -math.inf, math.inf, 1.5)[number % 4],
            "more": [math.nan, 1, -math.inf],
        }
        for number in range(3000)
    ]
    long = "say NaN, " * 20_000  # longer than the blocks in which the file is read
    rows += [{"video": "long.mp4", "caption": long, "start_s": math.nan}]
    found = made("t.json", json.dumps([*rows, {"video": "a.mp4", "caption": "x"}]))
    assert len(found) == 3002
    assert found["long.mp4"] == [long.strip()]
    assert found["7.mp4"] == ['NaN, "-Infinity\\']


def test_entities_of_html_are_decoded(made: Made, tmp_path: Path) -> None:
    rows = [
        "a.mp4,salt &amp; pepper",
        "b.mp4,it&#39;s &quot;here&quot; &amp;amp; there",
        "c.mp4,R&D at AT&T &copy 2 &nosuch; a&lt;b",
        "d.mp4,caf&eacute;&nbsp;&#x41;",
    ]
    assert made("t.csv", "video,caption\n" + "\n".join(rows)) == {
        "a.mp4": ["salt & pepper"],
        "b.mp4": ['it\'s "here" & there'],
        "c.mp4": ["R&D at AT&T &copy 2 &nosuch; a<b"],
        "d.mp4": ["caf\u00e9 A"],
    }
    text = "videoid,contentUrl,duration,page_dir,name\na,u,d,p,salt &amp; pepper\n"
    assert made("w.csv", text, "webvid") == {"a": ["salt & pepper"]}
    entries = {"a": {"folder": "p", "raw": "A &amp; B&#39;s"}}
    assert made("v.json", json.dumps(entries), "vidal", caption="raw") == {"a": ["a b's"]}


WEBVID = "videoid,contentUrl,duration,page_dir,name\n"


def test_a_span_without_a_start_is_the_one_from_zero(made: Made) -> None:
    content = "video,caption,start_s,end_s\na.mp4,one,,2\na.mp4,two,0,2\na.mp4,three,0:00,2.0\n"
    assert made("t.csv", content) == {"a.mp4#0.0-2.0": ["one", "two", "three"]}


def test_equal_rows_are_dropped_and_contradictions_are_refused(made: Made, tmp_path: Path) -> None:
    row = "a,u,PT1S,p,a cat\n"
    assert made("w.csv", WEBVID + row + row + "b,u,PT1S,p,a dog\n" + row, "webvid") == {
        "a": ["a cat"],
        "b": ["a dog"],
    }
    with pytest.raises(ManifestError, match=r"1 clip ids occur .* \(a\) with .* of captions;"):
        made("w.csv", WEBVID + row + "a,u,PT1S,p,a dog\n", "webvid")
    with pytest.raises(ManifestError, match=r"\(a\) with different values of extras, video_uri"):
        made("w.csv", WEBVID + row + row + "a,other,PT1S,q,a cat\n", "webvid")
    assert made("m.json", '{"a": ["one"], "b": ["two"], "a": ["one"]}', "msvd") == {
        "a": ["one"],
        "b": ["two"],
    }
