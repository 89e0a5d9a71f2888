"""The rule by which videos are found, which all formats share."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.common import storage
from pipelines.manifest.config import ManifestConfig, ManifestFormat
from pipelines.manifest.formats.files import AmbiguousVideo, VideoFinder
from pipelines.manifest.run import run_manifest


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def relative(found: str | AmbiguousVideo, folder: Path) -> str:
    assert isinstance(found, str), found
    return found.removeprefix(f"{folder}/")


@pytest.mark.parametrize(
    ("files", "name", "found"),
    [
        (["a.mp4"], "a.mp4", "a.mp4"),
        (["a.mp4"], "a", "a.mp4"),
        (["a.MP4"], "a.mp4", "a.MP4"),
        (["a.webm"], "a.mp4", "a.webm"),
        (["deep/er/a.MOV"], "a", "deep/er/a.MOV"),
        (["x/p/a.mkv", "q/a.mkv"], "p/a.mp4", "x/p/a.mkv"),
        (["a.mkv"], "p/a.mp4", "p/a.mp4"),  # this may be the file of another folder
        (["q/a.mp4"], "p/a.mp4", "p/a.mp4"),  # a file of another folder is another file
        (["a.b.mp4"], "a.b", "a.b.mp4"),
        (["a.b.mp4", "a.mp4"], "a.b", "a.b.mp4"),
        (["a.mp4"], "a.129", "a.129"),  # .129 is no extension of a video
        (["a.mp4.webm"], "a.mp4", "a.mp4.webm"),
        (["a.jpg", "a.json", "a.txt", "a.en.vtt", "s/a.webm"], "a.mp4", "s/a.webm"),
        (["a.png"], "a", "a.png"),
        (["a.json", "a.mp4.part"], "a", "a"),
        (["a.mp4", "s/a.mp4"], "a.mp4", "a.mp4"),
        (["s/a.mp4", "s/a.webm"], "a.mp4", "s/a.mp4"),
        (["a"], "a", "a"),
        ([".h/a.mp4"], ".h/a.mp4", ".h/a.mp4"),
        ([".h/a.mp4"], "a.mp4", "a.mp4"),
        (["a.mp4"], "./a.mp4", "./a.mp4"),
        (["s/a*[1]?#%41~ {x}.mp4", "s/a1.mp4"], "a*[1]?#%41~ {x}", "s/a*[1]?#%41~ {x}.mp4"),
        (["cafe\u0301.mp4"], "caf\u00e9.mp4", "cafe\u0301.mp4"),
        ([], "none.mp4", "none.mp4"),
    ],
)
def test_a_path_is_found_by_its_stem(
    tmp_path: Path, files: list[str], name: str, found: str
) -> None:
    touch(tmp_path, *files)
    assert relative(VideoFinder([str(tmp_path)]).of_path(name), tmp_path) == found


def test_a_row_of_another_folder_does_not_get_the_file_of_this_one(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.mp4")
    finder = VideoFinder([str(tmp_path / "train")])
    assert relative(finder.of_path("train/1.mp4"), tmp_path) == "train/1.mp4"
    assert relative(finder.of_path("test/1.mp4"), tmp_path) == "train/test/1.mp4"  # missing


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["a.mp4", "a.avi", "z/a.mp4"], "a.mp4"),
        (["a.webm", "a.mkv", "z/a.mp4"], "a.mkv"),  # as earlier versions chose
        (["a.x.webm"], "a.x.webm"),
        (["z/a.AVI"], "z/a.AVI"),
        (["a.txt", "z/a.mp4"], "z/a.mp4"),
        ([], "a.mp4"),
    ],
)
def test_an_id_is_found_as_by_earlier_versions_and_in_subfolders(
    tmp_path: Path, files: list[str], found: str
) -> None:
    touch(tmp_path, *files)
    finder = VideoFinder([str(tmp_path)], ".mp4", first_dot=True, takes_first=True)
    assert relative(finder.of_id("a"), tmp_path) == found


@pytest.mark.parametrize("name", ["a", "a.mp4"])
@pytest.mark.parametrize(
    "files", [["x/a.mp4", "y/a.mp4"], ["a.mkv", "a.webm"], ["x/a.mkv", "y/a.webm", "y/b.mp4"]]
)
def test_two_different_files_are_ambiguous(tmp_path: Path, files: list[str], name: str) -> None:
    touch(tmp_path, *files)
    found = VideoFinder([str(tmp_path)]).of_path(name)
    assert isinstance(found, AmbiguousVideo)
    assert all(str(tmp_path / file) in found.reason for file in files if "b" not in file)
    assert "\n" not in found.reason


def test_links_to_one_file_are_not_ambiguous(tmp_path: Path) -> None:
    touch(tmp_path, "v/x/a.mp4", "v/y/c.mp4", "outside/b.mkv")
    (tmp_path / "v" / "y" / "a.mp4").symlink_to(tmp_path / "v" / "x" / "a.mp4")
    (tmp_path / "v" / "linked").symlink_to(tmp_path / "outside")
    (tmp_path / "v" / "x" / "loop").symlink_to(tmp_path / "v")
    finder = VideoFinder([str(tmp_path / "v")])
    assert relative(finder.of_path("a"), tmp_path / "v") == "x/a.mp4"
    assert relative(finder.of_path("b"), tmp_path / "v") == "linked/b.mkv"


def test_several_folders_are_searched_and_listed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "one/a.mp4", "two/b.webm", "two/s/c.mp4", "one/d.mp4", "two/d.mp4")
    listed: list[str] = []
    whole = storage.list_below

    def list_below(uri: str, most: int) -> list[str] | None:
        listed.append(uri)
        return whole(uri, most)

    monkeypatch.setattr(storage, "list_below", list_below)
    folders = [str(tmp_path / "one"), str(tmp_path / "two")]
    finder = VideoFinder(folders, ".mp4")
    for name, file in [("a", "one/a.mp4"), ("b", "two/b.webm"), ("c", "two/s/c.mp4")]:
        assert relative(finder.of_id(name), tmp_path) == file
        assert relative(finder.of_path(f"{name}.mp4"), tmp_path) == file
    assert isinstance(finder.of_id("d"), AmbiguousVideo)
    assert relative(finder.of_id("none"), tmp_path) == "one/none.mp4"
    assert listed == folders


def test_absolute_paths_and_uris_are_taken_as_they_are(tmp_path: Path) -> None:
    touch(tmp_path, "v/a.mp4", "other/a b.mp4", "other/c%20d.mp4", "v/data/x.mp4")
    finder = VideoFinder([str(tmp_path / "v")])
    other = tmp_path / "other" / "a b.mp4"
    assert finder.of_path(str(other)) == str(other)
    assert finder.of_path(f"file://{other}") == str(other)
    assert finder.of_path(other.as_uri()) == str(other)
    assert finder.of_path(f"file://localhost{other}") == str(other)
    assert finder.of_path(f"file://{tmp_path}/other/c%20d.mp4") == f"{tmp_path}/other/c%20d.mp4"
    assert finder.of_path("/nowhere/a.mp4") == "/nowhere/a.mp4"
    assert finder.of_path("s3://bucket/a.mp4") == "s3://bucket/a.mp4"
    # As earlier versions did: a path within the videos folder may begin with a slash.
    assert finder.of_path("/data/x.mp4") == f"{tmp_path}/v//data/x.mp4"


ROWS: dict[ManifestFormat, str] = {
    "webvid": "videoid,contentUrl,duration,page_dir,name\na,u,PT1S,p,x\n",
    "vidal": '{"a": {"folder": "p", "polish_mplug": "x"}}',
    "msrvtt": '{"sentences": [{"video_id": "a", "caption": "x"}]}',
    "didemo": '[{"video": "a.null", "description": "x"}]',
    "msvd": '{"a": ["x"]}',
    "msrvtt_qa": '{"video_id": "a", "question": "q", "answer": "x"}',
    "lavis": '[{"video": "a.mp4", "caption": "x"}]',
    "alpro": '{"clip_name": "a", "caption": "x"}',
    "generic": '[{"video": "a", "caption": "x"}]',
    "panda70m": "videoID,timestamp,caption\na,\"[['0:00:01', '0:00:02']]\",\"['x']\"\n",
    "internvid": '{"YoutubeID": "a", "Start_timestamp": 0, "End_timestamp": 1, "Caption": "x"}',
    "vatex": '[{"videoID": "a", "enCap": ["x"]}]',
    "activitynet": '{"a": {"timestamps": [[0, 1]], "sentences": ["x"]}}',
    "youcook2": '{"database": {"a": {"annotations": [{"segment": [0, 1], "sentence": "x"}]}}}',
    "vript": '{"data": {"a": {"caption": {"content": "x"}}}}',
    "video2dataset": '{"key": "a", "caption": "x", "status": "success"}',
}
ENDINGS = {"webvid": "csv", "panda70m": "csv", "msrvtt_qa": "jsonl", "alpro": "jsonl"}


@pytest.mark.parametrize("name", list(ROWS))
def test_every_format_finds_files_by_the_same_rule(tmp_path: Path, name: ManifestFormat) -> None:
    file = tmp_path / f"t.{ENDINGS.get(name, 'jsonl' if name == 'internvid' else 'json')}"
    file.write_text(ROWS[name])
    touch(tmp_path, "one/b.mp4", "two/sub/a.MkV", "two/sub/a.json", "two/sub/a.txt")

    def made(*folders: str) -> str:
        run_manifest(
            ManifestConfig(
                annotations=(str(file),),
                videos=tuple(str(tmp_path / folder) for folder in folders),
                output=str(tmp_path / "m.parquet"),
                format=name,
            )
        )
        (clip,) = pq.read_table(tmp_path / "m.parquet").to_pylist()
        return os.path.relpath(clip["video_uri"], tmp_path)

    assert made("one", "two") == "two/sub/a.MkV"
    touch(tmp_path, "one/else/a.webm", "one/else/c.mp4")
    assert made("two") == "two/sub/a.MkV"


def test_an_ambiguous_row_is_rejected_and_the_others_are_kept(tmp_path: Path) -> None:
    touch(tmp_path, "v/x/a.mp4", "v/y/a.mp4", "v/b.mp4")
    rows = [{"video": name, "caption": "x"} for name in ("a", "b")]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    summary = run_manifest(
        ManifestConfig(
            annotations=(str(tmp_path / "t.json"),),
            videos=(str(tmp_path / "v"),),
            output=str(tmp_path / "m.parquet"),
            format="generic",
        )
    )
    assert (summary["clips"], summary["rejected"]) == (1, 1)
    (bad,) = pq.read_table(tmp_path / "m.rejected.parquet").to_pylist()
    assert bad["row"] == 1
    assert bad["reason"].startswith("a: several files fit a: ")


def test_one_video_among_many_rows_is_enough(tmp_path: Path) -> None:
    touch(tmp_path, "v/1499.mp4")
    rows = [{"video": f"{number}.mp4", "caption": "x"} for number in range(1500)]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    config = ManifestConfig(
        annotations=(str(tmp_path / "t.json"),),
        videos=(str(tmp_path / "v"),),
        output=str(tmp_path / "m.parquet"),
        format="generic",
    )
    assert run_manifest(config)["clips"] == 1500
