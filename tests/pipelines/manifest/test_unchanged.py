"""Annotations that earlier versions read give the same manifest, row by row.

The digests were recorded with the version before files were found by one rule (1d463d4).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.manifest.config import ManifestConfig, ManifestFormat
from pipelines.manifest.run import run_manifest

VIDEOS = (
    *("p/1.mp4", "p/02.mp4", "f_resize256_skip15/id1.mp4", "plain/id2.mp4"),
    *("video1.mp4", "video1.webm", "video2.webm", "video2.mkv", "video3.x.avi", "sub/video4.mp4"),
    *("The_Movie/The_Movie_00.00.01.000-00.00.02.000.avi", "-yt_1_2.avi", "-yt_1_2.mp4"),
)
WEBVID = "videoid,contentUrl,duration,page_dir,name\n"
FILES: dict[str, str] = {
    "w.csv": WEBVID + '1,u,PT1S,p,"a ""cat"", sat"\n02,u,PT1S,p,  two \n3,,,q,three\n4,u,d,p,\n',
    "v.json": json.dumps(
        {
            "id1": {"folder": "f", "polish_mplug": "one"},
            "id2": {"folder": "/x/plain", "polish_mplug": "two", "split": "val"},
            "id3": {"folder": "new_2", "polish_mplug": "three"},
        }
    ),
    "m.json": json.dumps(
        {
            "sentences": [
                {"video_id": f"video{number}", "caption": f"caption {place} of {number}"}
                for place in (1, 2)
                for number in (1, 2, 3, 5)
            ]
        }
    ),
    "d.json": json.dumps(
        [{"video": f"video{number}.mov", "description": "x  y\n"} for number in (1, 1, 2, 3, 5)]
    ),
    "l.csv": "The_Movie_00.00.01.000-00.00.02.000\t0\t0\t0\t0\tone\n"
    'The_Movie_00.00.03.000-00.00.04.000\t0\t0\t0\t0\tsays "two"\n',
    "c.json": json.dumps({"-yt_1_2": ["one", "two"], "other_3_4": "three"}),
    "q.jsonl": '{"video_id": "video2", "question": "q", "answer": "nan", "answer_type": "what"}\n'
    '{"video_id": "video5", "question": "r", "answer": "b"}\n\n',
    "a.jsonl": '{"clip_name": "video2.mp4", "caption": ["a", "nan"], "sen_id": 3}\n'
    '{"video_id": "video3", "question": "q", "answer": "b"}\n',
    "lavis.json": json.dumps(
        [
            {"video": "p/1.mp4", "caption": "one"},
            {"image": "./p/02.mp4", "caption": ["two", "too"]},
            {"video": "none.mp4", "question": "q", "answer": "a", "question_id": 0},
        ]
    ),
    "g.csv": 'video,caption,start_s,end_s,mood\np/1.mp4,"a, ""cat""",1.5,2,\np/02.mp4,one,,,calm\n'
    'p/02.mp4,"two\nlines, here",,\nnone.mp4,missing\n/p/1.mp4,slash,0,3,z\n\np/1.mp4,said 5" x\n',
    "g.jsonl": '{"video": "p/1.mp4", "caption": ["a", "b"], "start_s": "1.5", "k": {"a": [1, 2]}}\n'
    '{"video": "p//02.mp4", "caption": "c", "clip_id": 12, "split": "val"}\n',
}
DIGESTS: dict[tuple[ManifestFormat, str], str] = {
    ("webvid", "w.csv"): "c591d1e285b7abde",
    ("vidal", "v.json"): "7eb505a7fb2a76e4",
    ("msrvtt", "m.json"): "3eb1fc49f51a749b",
    ("didemo", "d.json"): "d5b403b3a4a1c92c",
    ("lsmdc", "l.csv"): "010e9bf7241dcc56",
    ("msvd", "c.json"): "8201dc0c2c078e6a",
    ("msrvtt_qa", "q.jsonl"): "64052ed7797e3f62",
    ("alpro", "a.jsonl"): "82b3bb8187fa4090",
    ("lavis", "lavis.json"): "574309a1d6dfd9bc",
    ("generic", "g.csv"): "6f1e02320d4be014",
    ("generic", "g.jsonl"): "dfa9e8d1222eaeaa",
    ("generic", "g.parquet"): "5f4408318cbed1d5",
}


def digest_of(folder: Path, name: ManifestFormat, file: str) -> str:
    videos = folder / "v"
    for video in VIDEOS:
        (videos / video).parent.mkdir(parents=True, exist_ok=True)
        (videos / video).touch()
    if file == "g.parquet":
        rows = [
            {"video": "p/1.mp4", "caption": "one", "start_s": 1.5, "end_s": None, "clip_id": 1.0},
            {"video": "p/02.mp4", "caption": "two", "start_s": None, "end_s": 2, "clip_id": None},
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / file)
    else:
        (folder / file).write_text(FILES[file])
    config: dict[str, Any] = {
        "annotations": (str(folder / file),),
        "videos": str(videos),
        "output": str(folder / "m.parquet"),
        "format": name,
    }
    run_manifest(ManifestConfig(**config))
    rows = pq.read_table(folder / "m.parquet").to_pylist()
    for row in rows:
        row["video_uri"] = row["video_uri"].removeprefix(f"{videos}")
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


@pytest.mark.parametrize(("name", "file"), list(DIGESTS))
def test_the_manifest_is_that_of_earlier_versions(
    tmp_path: Path, name: ManifestFormat, file: str
) -> None:
    assert digest_of(tmp_path, name, file) == DIGESTS[name, file]
