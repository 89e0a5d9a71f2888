"""Readers on the files as data sets ship them: counts as published, nothing lost in silence."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.manifest.config import ManifestConfig, ManifestFormat
from pipelines.manifest.formats.vidal import KINDS, MIX, clean_title
from pipelines.manifest.run import READERS, run_manifest
from stgt.errors import ManifestError

Make = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def make(tmp_path: Path, annotations_dir: Path) -> Make:
    """A manifest of sample files, as rows; the videos' folder holds the files that are named."""

    def made(
        name: ManifestFormat,
        *files: str | Path,
        videos: tuple[str, ...] = (),
        **settings: Any,
    ) -> list[dict[str, Any]]:
        folder = tmp_path / "videos"
        for video in videos:
            (folder / video).parent.mkdir(parents=True, exist_ok=True)
            (folder / video).touch()
        config = ManifestConfig(
            annotations=tuple(str(annotations_dir / file) for file in files),
            videos=str(folder),
            output=str(tmp_path / "m.parquet"),
            format=name,
            **settings,
        )
        run_manifest(config)
        rows = pq.read_table(tmp_path / "m.parquet").to_pylist()
        for row in rows:
            row["video_uri"] = os.path.relpath(row["video_uri"], folder)
            row["extras"] = json.loads(row["extras"])
        return rows

    return made


def rejected(tmp_path: Path) -> list[dict[str, Any]]:
    return pq.read_table(tmp_path / "m.rejected.parquet").to_pylist()


def by_id(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["clip_id"]: row for row in rows}


def test_msrvtt_1k_a_holds_a_thousand_videos_with_a_caption_each(make: Make) -> None:
    rows = make("msrvtt", "msrvtt/MSRVTT_JSFUSION_test.csv", videos=("video9770.mp4",))
    assert len(rows) == 1000
    assert all(len(row["captions"]) == 1 for row in rows)
    assert len({row["captions"][0] for row in rows}) == 995
    assert by_id(rows)["video9770"]["video_uri"] == "video9770.mp4"
    assert {row["split"] for row in rows} == {"test"}


@pytest.mark.parametrize(
    "listing", ["msrvtt/MSRVTT_train.9k.csv", "msrvtt/train_list_jsfusion.txt"]
)
def test_msrvtt_lists_pick_the_videos_of_the_json(
    make: Make, annotations_dir: Path, listing: str
) -> None:
    data = json.loads((annotations_dir / "derived/MSRVTT_data.subset.json").read_text())
    ids = set((annotations_dir / listing).read_text().split())
    wanted: dict[str, list[str]] = {}
    for sentence in data["sentences"]:
        if sentence["video_id"] in ids:
            wanted.setdefault(sentence["video_id"], []).append(sentence["caption"].strip())
    first = next(iter(wanted))
    rows = make("msrvtt", "derived/MSRVTT_data.subset.json", listing, videos=(f"{first}.webm",))
    assert {row["clip_id"]: row["captions"] for row in rows} == wanted
    assert by_id(rows)[first]["video_uri"] == f"{first}.webm"


def test_msrvtt_splits_are_those_of_the_json(make: Make, annotations_dir: Path) -> None:
    data = json.loads((annotations_dir / "derived/MSRVTT_data.subset.json").read_text())
    spoken_of = {sentence["video_id"] for sentence in data["sentences"]}
    for split, own in (("train", "train"), ("val", "validate")):
        wanted = {v["video_id"] for v in data["videos"] if v["split"] == own} & spoken_of
        if wanted:
            videos = (f"{next(iter(wanted))}.mp4",)
            rows = make("msrvtt", "derived/MSRVTT_data.subset.json", split=split, videos=videos)
            assert {row["clip_id"] for row in rows} == wanted
    with pytest.raises(ManifestError, match="split = 'mine'"):
        make("msrvtt", "derived/MSRVTT_data.subset.json", split="mine", videos=("x.mp4",))
    with pytest.raises(ManifestError, match="a list of ids without captions"):
        make("msrvtt", "msrvtt/MSRVTT_train.9k.csv", videos=("x.mp4",))


@pytest.mark.parametrize(
    ("file", "clips", "descriptions"),
    [("didemo/val_data.json", 1065, 4180), ("didemo/test_data.json", 1004, 4021)],
)
def test_didemo_is_grouped_by_stem_and_loses_no_description(
    make: Make, annotations_dir: Path, file: str, clips: int, descriptions: int
) -> None:
    entries = json.loads((annotations_dir / file).read_text())
    name = entries[0]["video"].partition(".")[0]
    rows = make("didemo", file, videos=(f"{name}.3gp",))
    assert len(rows) == clips
    assert sum(row["extras"]["num_descriptions"] for row in rows) == descriptions
    row = by_id(rows)[name]
    parts = [e["description"] for e in entries if e["video"].partition(".")[0] == name]
    assert row["captions"] == [" ".join(" ".join(part.split()) for part in parts)]
    assert row["video_uri"] == f"{name}.3gp"


def test_lsmdc_is_read_without_quoting_and_by_tabs(
    make: Make, annotations_dir: Path, tmp_path: Path
) -> None:
    file = "derived/SYNTHETIC_LSMDC16_annos_training.csv"
    lines = (annotations_dir / file).read_text().splitlines()
    first = lines[0].split("\t")
    rows = make("lsmdc", file, videos=(f"0001_American_Beauty/{first[0]}.avi",))
    sentences = [line.split("\t") for line in lines]
    wanted: dict[str, list[str]] = {}
    for fields in sentences:
        if fields[5].strip():
            wanted.setdefault(fields[0], []).append(fields[5].strip())
    assert {row["clip_id"]: row["captions"] for row in rows} == wanted
    assert max(len(captions) for captions in wanted.values()) > 1
    movies = {row["clip_id"]: row["extras"]["movie"] for row in rows}
    assert movies[first[0]] == "0001_American_Beauty"
    empty = [number for number, f in enumerate(sentences, start=1) if not f[5].strip()]
    assert [row["row"] for row in rejected(tmp_path)] == empty != []


@pytest.mark.parametrize(
    ("captions", "listing", "clips", "num_captions"),
    [
        ("msvd/captions_msvd.test_val_subset.json", "msvd/test_list.txt", 670, 27_763),
        ("msvd/captions_msvd.test_val_subset.json", "msvd/val_list.txt", 100, 4_290),
        ("msvd/DERIVED_raw-captions.subset.pkl", "msvd/val_list.txt", 100, 4_290),
    ],
)
def test_msvd_has_the_published_numbers_of_clips_and_captions(
    make: Make, annotations_dir: Path, captions: str, listing: str, clips: int, num_captions: int
) -> None:
    ids = (annotations_dir / listing).read_text().split()
    rows = make("msvd", captions, listing, videos=(f"{ids[0]}.avi",))
    assert len(rows) == clips
    assert sum(len(row["captions"]) for row in rows) == num_captions
    assert {row["clip_id"] for row in rows} == set(ids)
    dashed = [row for row in rows if row["clip_id"].startswith("-")]
    assert all(row["video_uri"] == f"{row['clip_id']}.avi" for row in dashed)


class Attack:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/stgt_attack",)


def test_a_pickle_that_asks_for_code_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps({"a": Attack()}))
    with pytest.raises(ManifestError, match="was not read: it would import posix.system"):
        make("msvd", tmp_path / "raw-captions.pkl", videos=("a.avi",))
    assert not Path("/tmp/stgt_attack").exists()
    with pytest.raises(ManifestError, match="reading a pickled table could execute code"):
        make("alpro", tmp_path / "train.pkl", videos=("a.mp4",))


@pytest.mark.slow
def test_msrvtt_qa_keeps_every_question(make: Make, annotations_dir: Path) -> None:
    rows = make("msrvtt_qa", "msrvtt_qa/val.jsonl", videos=("video6513.mp4",))
    assert len(rows) == 497
    questions = [question for row in rows for question in row["extras"]["questions"]]
    assert len(questions) == 12_278
    kinds = [question["answer_type"] for question in questions]
    assert (kinds.count("what"), kinds.count("where")) == (8337, 52)
    assert sorted(question["question_id"] for question in questions) == list(range(12_278))


def test_msvd_qa_numbers_are_mapped_to_clips(
    make: Make, annotations_dir: Path, tmp_path: Path
) -> None:
    files = ("derived/msvdqa_original_layout_test_qa.json", "derived/msvdqa_youtube_mapping.txt")
    mapping = dict(
        reversed(line.rsplit(" vid", 1))
        for line in (annotations_dir / files[1]).read_text().splitlines()
    )
    entries = json.loads((annotations_dir / files[0]).read_text())
    known = [entry for entry in entries if str(entry["video_id"]) in mapping]
    first = mapping[str(known[0]["video_id"])]
    rows = make("msvd_qa", *files, videos=(f"{first}.avi",))
    questions = {
        question["question_id"]: row["clip_id"]
        for row in rows
        for question in row["extras"]["questions"]
    }
    assert questions == {entry["id"]: mapping[str(entry["video_id"])] for entry in known}
    with pytest.raises(ManifestError, match="video numbers need youtube_mapping.txt"):
        make("msvd_qa", files[0], videos=("a.avi",))


@pytest.mark.slow
def test_lavis_takes_a_caption_or_a_list_of_them(make: Make, annotations_dir: Path) -> None:
    for file in ("lavis_msrvtt_retrieval_train.json", "lavis_msrvtt_retrieval_test.json"):
        entries = json.loads((annotations_dir / "derived" / file).read_text())
        wanted: dict[str, list[str]] = {}
        for entry in entries:
            value = entry["caption"]
            wanted.setdefault(entry["video"], []).extend(
                [text.strip() for text in ([value] if isinstance(value, str) else value)]
            )
        rows = make("lavis", f"derived/{file}", videos=(entries[0]["video"],))
        assert {row["video_uri"]: row["captions"] for row in rows} == wanted
    rows = make("lavis", "derived/stgt_webvid_flat.json", videos=("027701_027750/1053841541.mp4",))
    assert "027701_027750/1053841541.mp4" in by_id(rows)
    rows = make("lavis", "derived/lavis_msvd_qa_test.json", videos=("pzq5fPfsPZg_51_57.avi",))
    assert rows[0]["extras"]["questions"][0].keys() == {"question", "answer", "question_id"}


def test_alpro_retrieval_and_questions(make: Make) -> None:
    rows = make("alpro", "derived/alpro_msrvtt_ret_test.jsonl", videos=("video9770.mp4",))
    assert by_id(rows)["video9770"]["extras"]["retrieval_key"] == "ret0"
    rows = make("alpro", "derived/alpro_msvd_qa_test.jsonl", videos=("pzq5fPfsPZg_51_57.avi",))
    row = by_id(rows)["pzq5fPfsPZg_51_57"]
    assert row["video_uri"] == "pzq5fPfsPZg_51_57.avi"
    assert row["extras"]["questions"][0]["answer"] == "boy"


def test_vidal_chooses_captions_and_folders(make: Make, tmp_path: Path) -> None:
    sample = "vidal/sample_from_DATASETS_md.json"
    (row,) = make(
        "vidal", sample, caption="ofa1", videos=("coco_vat_9_resize256_skip15/ImkVYKWqlDU.mp4",)
    )
    assert row["captions"] == ["a man in a scuba suit on a boat"]
    assert row["video_uri"] == "coco_vat_9_resize256_skip15/ImkVYKWqlDU.mp4"
    entries = {
        "a:b": {"folder": "new_3", "mplug": "one", "ofa": "", "raw": "A Cat! #Shorts #viral"},
        "-c": {"folder": "/data/plain", "mplug": "two", "raw": "#shorts"},
        "d": {"mplug": "three"},
    }
    (tmp_path / "v.json").write_text(json.dumps(entries))
    videos = ("new_download_resize256_skip15/a:b.mp4", "plain/-c.mp4")
    rows = by_id(make("vidal", tmp_path / "v.json", caption="mplug", videos=videos))
    assert {rows[name]["video_uri"] for name in ("a:b", "-c")} == set(videos)
    (row,) = make("vidal", tmp_path / "v.json", caption="raw", videos=videos)
    assert row["captions"] == ["a cat"]
    reasons = [bad["reason"] for bad in rejected(tmp_path)]
    assert reasons == ["-c: caption is empty after cleaning", "d: folder is missing or empty"]
    with pytest.raises(ManifestError, match="caption = 'title': must be one of raw, mplug"):
        make("vidal", sample, caption="title", videos=videos)


@pytest.mark.slow
def test_vidal_mix_draws_kinds_by_their_share(tmp_path: Path) -> None:
    """Each caption is the name of its kind."""
    kinds = {kind: kind for kind in KINDS if not kind.startswith(("ofa", "mix"))}
    entry = {"folder": "f", **kinds, "ofa": [kind for kind in KINDS if kind.startswith("ofa")]}
    (tmp_path / "v.json").write_text(json.dumps({f"id{number}": entry for number in range(20_000)}))
    (tmp_path / "videos" / "f").mkdir(parents=True)
    (tmp_path / "videos" / "f" / "id0.mp4").touch()
    run_manifest(
        ManifestConfig(
            annotations=(str(tmp_path / "v.json"),),
            videos=str(tmp_path / "videos"),
            output=str(tmp_path / "m.parquet"),
            format="vidal",
            caption="mix",
        )
    )
    drawn = [
        caption
        for captions in pq.read_table(tmp_path / "m.parquet")["captions"].to_pylist()
        for caption in captions
    ]
    assert len(drawn) == 20_000
    for kind, share in MIX.items():
        assert drawn.count(kind) / len(drawn) == pytest.approx(share, abs=0.01)
    assert sum(MIX.values()) == pytest.approx(1)
    assert set(MIX) == set(KINDS) - {"mix"}
    assert clean_title("My Dog\u2019s #1 trick #fyp") == "my dogs 1 trick"


@pytest.mark.parametrize("extension", ["csv", "jsonl", "json", "parquet"])
def test_generic_tables_of_any_kind(make: Make, tmp_path: Path, extension: str) -> None:
    rows = [
        {"file": "a/x.mp4", "text": "one", "start_s": 1.5, "end_s": 4.0, "mood": "calm"},
        {"file": "a/x.mp4", "text": "two", "start_s": 4.0, "end_s": 6.0, "mood": "wild"},
        {"file": "a/x.mp4", "text": "also two", "start_s": 4.0, "end_s": 6.0, "mood": "wild"},
        {"file": "a/y.mp4", "text": "", "start_s": None, "end_s": None, "mood": ""},
        {"file": "../z.mp4", "text": "three", "start_s": None, "end_s": None, "mood": ""},
    ]
    path = tmp_path / f"table.{extension}"
    if extension == "csv":
        lines = [",".join("" if v is None else str(v) for v in row.values()) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]) + "\n")
    elif extension == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif extension == "json":
        path.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    columns = ("video=file", "caption=text")
    made = make("generic", path, videos=("a/x.mp4",), columns=columns)
    clips = {row["start_s"]: row for row in made}
    assert clips[1.5]["captions"] == ["one"]
    assert clips[4.0]["captions"] == ["two", "also two"]
    assert clips[4.0]["end_s"] == 6.0
    assert clips[1.5]["extras"]["mood"] == "calm"
    assert len({row["clip_id"] for row in made}) == 2
    reasons = [bad["reason"] for bad in rejected(tmp_path)]
    assert reasons == [
        "a/y.mp4: caption is empty after cleaning",
        "../z.mp4 is outside the videos folder",
    ]
    if extension in ("csv", "parquet"):
        with pytest.raises(ManifestError, match=r"lacks the columns video, caption"):
            make("generic", path, videos=("a/x.mp4",))
    with pytest.raises(ManifestError, match="columns = colour"):
        make("generic", path, columns=("colour=x",))


def test_rows_of_a_clip_that_contradict_each_other_are_an_error(make: Make, tmp_path: Path) -> None:
    rows = [{"clip_id": "1", "video": video, "caption": "x"} for video in ("a.mp4", "b.mp4")]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    with pytest.raises(ManifestError, match="clip 1 has both video_uri"):
        make("generic", tmp_path / "t.json", videos=("a.mp4",))


@pytest.mark.parametrize(
    ("name", "text"),
    [("lavis", '[{"video": "a.mp4", "caption": '), ("vidal", '{"a": {"folder"'), ("lavis", "{}")],
)
def test_json_that_is_cut_off_is_an_error(
    make: Make, tmp_path: Path, name: ManifestFormat, text: str
) -> None:
    (tmp_path / "cut.json").write_text(text)
    with pytest.raises(
        ManifestError, match=r"cut.json( contains an object| is not valid UTF-8 JSON)"
    ):
        make(name, tmp_path / "cut.json", videos=("a.mp4",))


def test_every_reader_has_a_name(annotations_dir: Path) -> None:
    assert set(READERS) == set(ManifestFormat.__args__)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"video": "b.mp4", "caption": 5}, "caption is empty"),
        ({"video": "b.mp4", "caption": {"en": "a dog"}}, "caption is empty"),
        ({"video": "b.mp4", "caption": "x", "start_s": "soon"}, "is not a valid time"),
        ({"video": "b.mp4", "caption": "x", "start_s": -1}, "is not a valid time"),
        ({"video": "b.mp4", "caption": "x", "start_s": 2, "end_s": 1}, "is not after the start"),
        ({"video": "gs://b/x.mp4", "caption": "x"}, "copy the video there"),
    ],
)
def test_an_odd_row_is_rejected_and_the_others_are_kept(
    make: Make, tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    rows = [{"video": "a.mp4", "caption": "fine", "start_s": 1, "end_s": 2.5}, row]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (clip,) = make("generic", tmp_path / "a.jsonl", videos=("a.mp4",))
    assert (clip["captions"], clip["start_s"], clip["end_s"]) == (["fine"], 1.0, 2.5)
    (bad,) = rejected(tmp_path)
    assert bad["row"] == 2
    assert reason in bad["reason"]


def test_a_caption_is_never_taken_letter_by_letter(make: Make, tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text(json.dumps({"a": "a man", "b": ["a dog", "a cat"]}))
    clips = by_id(make("msvd", tmp_path / "captions.json", videos=("a.avi",)))
    assert clips["a"]["captions"] == ["a man"]
    assert clips["b"]["captions"] == ["a dog", "a cat"]


def test_the_older_msrvtt_json_and_ids_without_captions(make: Make, tmp_path: Path) -> None:
    sentences = [{"image_id": "video1", "caption": "one"}, {"image_id": "video1", "caption": "two"}]
    (tmp_path / "MSR_VTT.json").write_text(json.dumps({"annotations": sentences}))
    (tmp_path / "ids.txt").write_text("video1\nvideo2\n")
    (clip,) = make(
        "msrvtt", tmp_path / "MSR_VTT.json", tmp_path / "ids.txt", videos=("video1.mp4",)
    )
    assert clip["captions"] == ["one", "two"]
    (bad,) = rejected(tmp_path)
    assert bad["reason"].startswith("video2: the video is in the list of ids")


def test_the_nearest_column_is_named(make: Make, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Video_ID,pagedir,name\n1,p,x\n")
    with pytest.raises(ManifestError, match="Video_ID may be videoid, pagedir may be page_dir"):
        make("webvid", tmp_path / "a.csv", videos=("p/1.mp4",))
