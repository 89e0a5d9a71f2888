"""What an ingest does when asked: filters, a sample, retries, verification, the report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.manifest import whole_videos_table
from pipelines.common import storage
from pipelines.ingest import filters, histograms
from pipelines.ingest.config import FilterConfig, IngestConfig
from pipelines.ingest.plan import store_uri
from pipelines.ingest.run import IngestSummary, run_ingest
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.run import run_manifest
from pipelines.video import decoder
from pipelines.video.config import DecodeReason, SamplingConfig
from stgt.errors import ClipStoreError, STGTError
from tests.helpers.data import TinyData, digests, tiny_ingest

Make = Callable[..., IngestConfig]


@pytest.fixture
def make(tiny_data: TinyData, tmp_path: Path) -> Make:
    """An ingest config over copies of generated videos, with captions and files of one's choice."""
    videos = [path for path in sorted(Path(tiny_data.videos).rglob("*.mp4")) if path.stat().st_size]

    def made(captions: list[Any], *, copies: dict[int, int] | None = None, **changes: Any):  # noqa: ANN202
        folder = tmp_path / "videos"
        folder.mkdir(exist_ok=True)
        rows = []
        for number, caption in enumerate(captions):
            source = videos[(copies or {}).get(number, number)]
            shutil.copyfile(source, folder / f"{number:02d}.mp4")
            rows.append({"video": f"{number:02d}.mp4", "caption": caption})
        annotations = tmp_path / "a.jsonl"
        annotations.write_text("".join(json.dumps(row) + "\n" for row in rows))
        manifest = str(tmp_path / "manifest.parquet")
        run_manifest(
            ManifestConfig(
                annotations=(str(annotations),),
                videos=str(folder),
                output=manifest,
                format="generic",
            )
        )
        return tiny_ingest(
            manifest, str(tmp_path / "clips"), **{"clips_per_shard": 4, "num_workers": 1, **changes}
        )

    return made


def outcome(summary: IngestSummary) -> dict[str, str]:
    """Reason of each clip; `fine` for those in the store."""
    store = ClipStore(summary["store"])
    found = {}
    for shard in range(len(store.shard_sizes)):
        for clip_id in store.read_shard(shard, ["clip_id"])["clip_id"].to_pylist():
            assert found.setdefault(clip_id, "fine") == "fine"
    for path in sorted(Path(summary["store"], "quarantine").iterdir()):
        for row in pq.read_table(path).to_pylist():
            assert row["clip_id"] not in found
            found[row["clip_id"]] = row["reason"]
    return found


def test_every_reason_has_a_meaning() -> None:
    assert set(decoder.REASONS) == set(DecodeReason.__args__)
    assert not set(decoder.REASONS) & set(filters.REASONS)


@pytest.mark.ray
def test_filters_leave_clips_out_under_reasons_of_their_own(make: Make) -> None:
    captions = ["a red circle", "hm", "one two three four five six seven", ["hm", "a blue square"]]
    config = make(
        captions,
        filters=FilterConfig(min_caption_words=2, max_caption_words=5),
        max_bad_fraction=0.0,
    )
    summary = run_ingest(config)
    assert outcome(summary) == {
        "00.mp4": "fine",
        "01.mp4": "caption_too_short",
        "02.mp4": "caption_too_long",
        "03.mp4": "fine",
    }
    (kept,) = [
        clip["captions"]
        for clip in ClipStore(summary["store"]).read_shard(0).to_pylist()
        if clip["clip_id"] == "03.mp4"
    ]
    assert kept == ["a blue square"]
    assert summary["store"] != store_uri(replace(config, filters=FilterConfig()))


@pytest.mark.ray
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"min_short_side": 97}, "too_small"),
        ({"min_duration_s": 2.5}, "too_short"),
        ({"max_duration_s": 1.5}, "too_long"),
    ],
)
def test_size_and_duration_are_seen_in_the_container(
    make: Make, change: dict[str, float], reason: str
) -> None:
    config = make(["one clip", "another"], filters=FilterConfig(**change))
    with pytest.raises(ClipStoreError, match=rf"none of 2 clips can be used \(2 {reason}\)"):
        run_ingest(config)


@pytest.mark.ray
def test_of_duplicates_the_first_in_the_manifest_stays(make: Make) -> None:
    captions = ["a red circle", "A red circle!", "a square", "a triangle", "x y", "z", "u", "v"]
    config = make(
        captions,
        copies={4: 3, 5: 3},
        filters=FilterConfig(unique_captions=True, unique_videos=True),
    )
    manifest = pq.read_table(config.manifest)["clip_id"].to_pylist()
    summary = run_ingest(config)
    expected = dict.fromkeys(manifest, "fine")
    for same, reason in (
        (["00.mp4", "01.mp4"], "duplicate_caption"),
        (["03.mp4", "04.mp4", "05.mp4"], "duplicate_video"),
    ):
        for clip_id in sorted(same, key=manifest.index)[1:]:
            expected[clip_id] = reason
    assert outcome(summary) == expected
    whole = digests(summary["store"])
    # As a kill leaves it in the middle of taking duplicates out: one shard written anew, one not.
    Path(summary["store"], "catalogue.json").unlink()
    assert outcome(run_ingest(config)) == expected
    assert digests(summary["store"]) == whole
    assert run_ingest(replace(config, verify=True))["clips"] == 5


@pytest.mark.ray
def test_quarantined_clips_are_tried_again_and_the_store_is_as_if_they_had_been_fine(
    make: Make, tmp_path: Path
) -> None:
    config = make([f"caption {n}" for n in range(9)], max_bad_fraction=0.5)
    fine = run_ingest(replace(config, output=str(tmp_path / "fine")))
    hidden, broken = tmp_path / "videos" / "03.mp4", tmp_path / "videos" / "05.mp4"
    hidden.rename(tmp_path / "hidden")
    shutil.copyfile(broken, tmp_path / "whole")
    broken.write_bytes(b"")
    assert run_ingest(config)["reasons"] == {"empty": 1, "missing": 1}
    (tmp_path / "hidden").rename(hidden)
    shutil.copyfile(tmp_path / "whole", broken)
    only = run_ingest(replace(config, retry_quarantined=("missing",)))
    assert only["reasons"] == {"empty": 1}
    assert run_ingest(replace(config, verify=True))["clips"] == 8
    everything = run_ingest(replace(config, retry_quarantined=()))
    assert (everything["clips"], everything["reasons"]) == (9, {})
    for shard in range(2):
        again, at_once = (
            ClipStore(summary["store"]).read_shard(shard) for summary in (everything, fine)
        )
        assert again.equals(at_once)
    assert not [p for p in Path(everything["store"]).rglob("*.parquet") if "r3" in p.name]


@pytest.mark.ray
def test_a_failed_retry_counts_its_attempts_and_keeps_a_finished_store(
    make: Make, tmp_path: Path
) -> None:
    config = make([f"caption {n}" for n in range(3)], max_bad_fraction=0.5)
    (tmp_path / "videos" / "01.mp4").write_bytes(b"")
    run_ingest(config)
    summary = run_ingest(replace(config, retry_quarantined=(), max_bad_fraction=0.0))
    assert summary["reasons"] == {"empty": 1}
    (path,) = Path(summary["store"], "quarantine").iterdir()
    assert pq.read_table(path)["attempts"].to_pylist() == [2]


@pytest.mark.ray
def test_a_sample_is_ingested_and_the_whole_is_estimated(make: Make) -> None:
    config = make([f"caption {n}" for n in range(8)], limit=4)
    summary = run_ingest(config)
    assert summary["clips"] == 4
    assert summary["store"].endswith("-first-4")
    report = json.loads(Path(summary["store"], "report.json").read_text())
    assert report["whole_manifest"]["clips"] == 8
    assert report["whole_manifest"]["bytes"] == 2 * summary["bytes"]
    assert report["whole_manifest"]["seconds"] == pytest.approx(8 / summary["clips_per_s"], 0.01)
    assert run_ingest(replace(config, limit=None))["clips"] == 8


@pytest.mark.ray
def test_clips_with_questions_and_no_captions_are_ingested(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    videos = [path for path in sorted(Path(tiny_data.videos).rglob("*.mp4")) if path.stat().st_size]
    (tmp_path / "videos").mkdir()
    lines = []
    for number in range(3):
        shutil.copyfile(videos[number], tmp_path / "videos" / f"video{number}.mp4")
        row = {"question": "what moves?", "answer": "it", "video_id": f"video{number}"}
        lines.append(json.dumps({**row, "answer_type": "what"}) + "\n")
    (tmp_path / "qa.jsonl").write_text("".join(lines))
    manifest = str(tmp_path / "manifest.parquet")
    run_manifest(
        ManifestConfig(
            annotations=(str(tmp_path / "qa.jsonl"),),
            videos=str(tmp_path / "videos"),
            output=manifest,
            format="msrvtt_qa",
        )
    )
    every_filter = FilterConfig(unique_captions=True, min_caption_words=1, max_caption_words=50)
    summary = run_ingest(tiny_ingest(manifest, str(tmp_path / "clips"), filters=every_filter))
    assert (summary["clips"], summary["reasons"]) == (3, {})
    assert "what moves?" in Path(summary["report"]).read_text()


@pytest.mark.ray
def test_of_duplicate_captions_a_usable_clip_stays(make: Make, tmp_path: Path) -> None:
    config = make(
        ["the same"] * 4, filters=FilterConfig(unique_captions=True), max_bad_fraction=0.5
    )
    first = pq.read_table(config.manifest)["clip_id"].to_pylist()[0]
    (tmp_path / "videos" / first).write_bytes(b"")
    summary = run_ingest(config)
    assert summary["clips"] == 1
    assert summary["reasons"] == {"duplicate_caption": 2, "empty": 1}


@pytest.mark.ray
def test_rows_that_lead_nowhere_cost_themselves(tiny_data: TinyData, tmp_path: Path) -> None:
    video = next(path for path in Path(tiny_data.videos).rglob("*.mp4") if path.stat().st_size)
    shutil.copyfile(video, tmp_path / "fine.mp4")
    names = ["fine.mp4", "a\0.mp4", "gs://bucket/x.mp4", "\ud800.mp4", "n" * 300 + ".mp4"]
    rows = [json.dumps({"video": name, "caption": "x"}) + "\n" for name in names]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    manifest = str(tmp_path / "m.parquet")
    made = run_manifest(
        ManifestConfig(
            annotations=(str(tmp_path / "a.jsonl"),),
            videos=str(tmp_path),
            output=manifest,
            format="generic",
        )
    )
    assert (made["clips"], made["rejected"]) == (2, 3)
    config = tiny_ingest(manifest, str(tmp_path / "clips"), max_bad_fraction=0.5)
    assert run_ingest(config)["reasons"] == {"missing": 1}


@pytest.mark.ray
def test_nothing_to_retry_keeps_the_figures_of_the_report(make: Make) -> None:
    config = make(["one", "two"])
    summary = run_ingest(config)
    run_ingest(replace(config, retry_quarantined=()))
    report = json.loads(Path(summary["store"], "report.json").read_text())
    assert report["run"]["clips"] == 2
    assert report["run"]["clips_per_s"] == pytest.approx(summary["clips_per_s"], 0.01)


def _tamper(store: Path) -> None:
    values = json.loads((store / "catalogue.json").read_text())
    (store / "catalogue.json").write_text(json.dumps({**values, "salvaged": 7}))


def _flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _forget_a_clip(store: Path) -> None:
    """A shard that is whole by its record, and yet lacks a clip of the manifest."""
    table = storage.read_table(str(store / "shards" / "00000.parquet"))
    data = storage.write_table(str(store / "shards" / "00000.parquet"), table.slice(1))
    for path in (store / "shards" / "00000.json", store / "catalogue.json"):
        values = json.loads(path.read_text())
        record = values if "shard" in values else values["shards"][0]
        record.update(clips=len(table) - 1, sha256=storage.digest_of(data), bytes=len(data))
        values["clips"] = values["clips"] - 1 if values is not record else record["clips"]
        path.write_text(json.dumps(values))


@pytest.mark.ray
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda s: _flip_a_byte(s / "shards" / "00001.parquet"), "has changed: its checksum"),
        (lambda s: _flip_a_byte(s / "quarantine" / "00000.parquet"), "has changed: its checksum"),
        (lambda s: (s / "shards" / "00000.parquet").unlink(), "is missing"),
        (lambda s: (s / "shards" / "00001.json").unlink(), "shard 1 has no record"),
        (_tamper, "the catalogue differs from its shards in salvaged"),
        (
            lambda s: (s / "catalogue.json").write_text("{"),
            r"catalogue\.json is damaged .* delete it and run the same command again",
        ),
        (_forget_a_clip, "do not hold each clip of the manifest exactly once"),
    ],
)
def test_verification_finds_what_is_wrong(
    tiny_data: TinyData, tmp_path: Path, harm: Callable[[Path], Any], message: str
) -> None:
    store = Path(tmp_path) / Path(tiny_data.train_store).name
    shutil.copytree(tiny_data.train_store, store)
    harm(store)
    with pytest.raises(STGTError, match=message):
        run_ingest(tiny_ingest(tiny_data.train_manifest, str(tmp_path), verify=True))


@pytest.mark.ray
def test_a_copy_of_a_store_that_is_right_is_verified(tiny_data: TinyData, tmp_path: Path) -> None:
    shutil.copytree(tiny_data.train_store, tmp_path / Path(tiny_data.train_store).name)
    config = tiny_ingest(tiny_data.train_manifest, str(tmp_path), verify=True)
    assert run_ingest(config)["clips"] == 39


def test_what_was_never_made_cannot_be_verified(tmp_path: Path) -> None:
    manifest = str(tmp_path / "manifest.parquet")
    table = whole_videos_table({"a": "/nowhere/a.mp4"}, {"a": "one"}, "test")
    storage.write_table(manifest, table)
    with pytest.raises(ClipStoreError, match="holds no store that could be verified"):
        run_ingest(tiny_ingest(manifest, str(tmp_path / "clips"), verify=True))


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.text: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


@pytest.mark.ray
def test_the_report_shows_numbers_reasons_and_pictures(make: Make, tmp_path: Path) -> None:
    captions = ["<b>bold</b> & co", *(f"caption number {n}" for n in range(7))]
    config = make(captions, max_bad_fraction=0.5)
    (tmp_path / "videos" / "05.mp4").write_bytes(b"<html>gone</html>")
    summary = run_ingest(config)
    page = _Page()
    page.feed(Path(summary["report"]).read_text())
    assert "7" in page.text
    assert "not_a_video" in page.text
    assert "<b>bold</b> & co" in page.text
    assert "script" not in page.tags
    assert len(page.images) == 7
    assert all(image.startswith("data:image/jpeg;base64,") for image in page.images)
    values = json.loads(Path(summary["store"], "report.json").read_text())
    assert (values["clips"], values["bad"], values["reasons"]) == (7, 1, {"not_a_video": 1})
    assert sum(values["histograms"]["caption_words"].values()) == 7
    assert values["histograms"]["duration_s"] == {"2 to 5": 7}
    record = json.loads(Path(summary["store"], "mlflow_run.json").read_text())
    client = MlflowClient(tracking_uri=config.tracking.uri)
    run = client.get_run(record["run_id"])
    assert run.info.status == "FINISHED"
    assert (run.data.metrics["clips"], run.data.metrics["data/bad_fraction"]) == (7, 1 / 8)
    artifacts = {artifact.path for artifact in client.list_artifacts(record["run_id"])}
    assert artifacts == {"config.json", "report.html", "report.json"}


def test_histograms_of_parts_add_up() -> None:
    values = {name: [edges[0], edges[-2]] for name, edges in histograms.EDGES.items()}
    once = histograms.count(values)
    assert all(sum(counts) == 2 for counts in once.values())
    assert histograms.add([once, once]) == {
        name: [2 * count for count in counts] for name, counts in once.items()
    }
    assert histograms.labelled("fps", [0, 2, 0, 1, *[0] * 7]) == {
        "10 to 14": 2,
        "14 to 18": 0,
        "18 to 23": 1,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": 0}, "limit = 0"),
        ({"verify": True, "retry_quarantined": ()}, "cannot be combined with retry_quarantined"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IngestConfig(manifest="m", output="o", **change)


def test_a_filter_that_nothing_passes_is_refused() -> None:
    with pytest.raises(ValueError, match="min_duration_s = 3: must not exceed max_duration_s, 2"):
        FilterConfig(min_duration_s=3, max_duration_s=2)


def test_stores_of_other_settings_have_other_names() -> None:
    config = IngestConfig(manifest="m", output="/o")
    names = {
        store_uri(config),
        store_uri(replace(config, sampling=SamplingConfig(decoder="auto"))),
        store_uri(replace(config, filters=FilterConfig(min_short_side=100))),
        store_uri(replace(config, limit=10)),
    }
    assert len(names) == 4
