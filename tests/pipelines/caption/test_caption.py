"""Captions that a model writes for the clips of a manifest."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts import checkpoints
from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.generated_captions import generated_captions
from pipelines.artifacts.manifest import check_manifest, whole_videos_table
from pipelines.caption.config import CaptionConfig
from pipelines.caption.parts import EMPTY_CAPTION, SCHEMA, count_left, part_uri, read_parts
from pipelines.caption.run import run_caption
from pipelines.common import storage
from pipelines.feed.opening import open_source
from pipelines.ingest.run import run_ingest
from stgt.errors import CheckpointError, ClipStoreError, ManifestError, SettingError, STGTError
from tests.helpers.checkpoint import save_untrained
from tests.helpers.data import PROJECT, TinyData, tiny_ingest
from tests.helpers.faulty_s3 import FaultyS3
from tests.helpers.models import small_model
from tests.helpers.videos import encode_video, moving_pictures
from tests.helpers.waiting import wait_until

VIDEOS = 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    model = small_model("stgt", folder)
    uri = str(folder / "checkpoint")
    checkpoints.save(uri, model, model.tokenizer, step=0)
    return uri


@pytest.fixture
def config(tmp_path: Path, checkpoint: str) -> CaptionConfig:
    """Nucleus sampling for five short videos, the second of which has no caption."""
    for number in range(VIDEOS):
        pictures = moving_pictures(8, seed=number)
        encode_video(tmp_path / f"{number}.mp4", "mpeg4", pictures)
    uris = {f"clip{number}": str(tmp_path / f"{number}.mp4") for number in range(VIDEOS)}
    table = whole_videos_table(uris, {name: f"about {name}" for name in uris}, "test")
    rows = table.to_pylist()
    rows[1]["captions"] = []
    rows[2]["extras"] = json.dumps({"url": "https://example.org"})
    manifest = str(tmp_path / "in.parquet")
    storage.write_table(manifest, table.from_pylist(rows, schema=table.schema))
    return CaptionConfig(
        manifest=manifest,
        checkpoint=checkpoint,
        output=str(tmp_path / "out.parquet"),
        method="nucleus",
        top_p=0.95,
        captions_per_clip=2,
        max_tokens=6,
        batch_clips=2,
    )


def rows_of(uri: str) -> list[dict[str, Any]]:
    check_manifest(uri)
    return pq.read_table(uri).to_pylist()


def captions_of(uri: str) -> dict[str, list[str]]:
    return {row["clip_id"]: generated_captions(row["extras"]) for row in rows_of(uri)}


@pytest.mark.slow
def test_captions_are_added_and_everything_else_stays(config: CaptionConfig) -> None:
    summary = run_caption(config)
    before, after = rows_of(config.manifest), rows_of(config.output)
    extras = [json.loads(row.pop("extras")) for row in after]
    own = [json.loads(row.pop("extras")) for row in before]
    assert after == before
    generated = [one.pop("generated") for one in extras]
    assert extras == own
    for one in generated:
        assert 1 <= len(one["captions"]) == len(set(one["captions"])) <= 2
        assert one["model"] == {"name": config.checkpoint, "fingerprint": summary["model"]}
        assert one["settings"]["method"] == "nucleus"
        assert (one["settings"]["top_p"], one["settings"]["num_frames"]) == (0.95, 6)
        assert "num_beams" not in one["settings"]
    counts = {name: summary[name] for name in ("clips", "captioned", "captions", "missing")}
    written = sum(len(one["captions"]) for one in generated)
    assert counts == {"clips": 5, "captioned": 5, "captions": written, "missing": {}}
    folder = Path(config.output).parent
    beside = json.loads((folder / "out.config.json").read_text())
    assert (beside["job"], beside["method"]) == ("caption", "nucleus")
    assert not (folder / "out.parts").exists()


@pytest.mark.slow
def test_captions_depend_on_the_seed_and_not_on_batches(
    config: CaptionConfig, tmp_path: Path
) -> None:
    run_caption(config)
    other = replace(config, output=str(tmp_path / "other.parquet"), batch_clips=5)
    run_caption(other)
    assert captions_of(other.output) == captions_of(config.output)
    seeded = replace(config, output=str(tmp_path / "seeded.parquet"), seed=1)
    run_caption(seeded)
    assert captions_of(seeded.output) != captions_of(config.output)


@pytest.mark.slow
def test_a_complete_output_is_kept_and_other_settings_are_refused(config: CaptionConfig) -> None:
    first = run_caption(config)
    content = Path(config.output).read_bytes()
    again = run_caption(replace(config, batch_clips=1))
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert Path(config.output).read_bytes() == content
    with pytest.raises(STGTError, match=r"captions of other settings \(seed: 0 -> 3\)"):
        run_caption(replace(config, seed=3))
    with pytest.raises(SettingError, match="is the manifest itself"):
        run_caption(replace(config, output=config.manifest))
    Path(config.output).with_name("out.config.json").unlink()
    with pytest.raises(STGTError, match="was not written by jobs.caption"):
        run_caption(config)
    assert Path(config.output).read_bytes() == content


def test_an_output_in_use_is_refused(config: CaptionConfig) -> None:
    parts = config.output.replace(".parquet", ".parts")
    with storage.lock(parts), pytest.raises(STGTError, match="another run is using"):
        run_caption(config)


@pytest.mark.slow
def test_videos_that_cannot_be_decoded_are_counted_and_tried_again(
    config: CaptionConfig, tmp_path: Path
) -> None:
    whole = run_caption(replace(config, output=str(tmp_path / "whole.parquet")))
    content = (tmp_path / "3.mp4").read_bytes()
    (tmp_path / "3.mp4").write_bytes(b"")
    (tmp_path / "4.mp4").rename(tmp_path / "moved.mp4")
    with pytest.raises(ClipStoreError, match=r"2 of 5 .* \(1 empty, 1 missing\).*finished"):
        run_caption(config)
    assert not Path(config.output).exists()
    (tmp_path / "moved.mp4").rename(tmp_path / "4.mp4")
    summary = run_caption(replace(config, max_bad_fraction=0.2))
    assert (summary["captioned"], summary["missing"]) == (4, {"empty": 1})
    assert captions_of(config.output)["clip3"] == []
    (tmp_path / "3.mp4").write_bytes(content)
    third = replace(config, output=str(tmp_path / "third.parquet"))
    assert run_caption(third)["captions"] == whole["captions"]
    assert captions_of(third.output) == captions_of(str(tmp_path / "whole.parquet"))


@pytest.mark.slow
def test_only_clips_that_could_not_be_decoded_are_captioned_again(
    config: CaptionConfig, tmp_path: Path
) -> None:
    whole = replace(config, output=str(tmp_path / "whole.parquet"))
    run_caption(whole)
    (tmp_path / "4.mp4").rename(tmp_path / "moved.mp4")
    refused = replace(config, max_bad_fraction=0.0)
    with pytest.raises(ClipStoreError, match=r"1 of 5 clips cannot be decoded \(1 missing\)"):
        run_caption(refused)
    (part,) = (tmp_path / "out.parts").glob("*.parquet")
    rows = pq.read_table(part).to_pylist()
    (silent,) = [row for row in rows if row["clip_id"] == "clip0"]
    silent.update(captions=[], reason=EMPTY_CAPTION)
    storage.write_table(str(part), pa.Table.from_pylist(rows, schema=pq.read_schema(part)))
    # The others would be missing if they were decoded again.
    for number in range(VIDEOS - 1):
        (tmp_path / f"{number}.mp4").unlink()
    (tmp_path / "moved.mp4").rename(tmp_path / "4.mp4")
    summary = run_caption(refused)
    assert (summary["captioned"], summary["missing"]) == (4, {"empty_caption": 1})
    assert captions_of(config.output) == {**captions_of(whole.output), "clip0": []}


def test_a_part_is_left_if_clips_could_not_be_decoded(tmp_path: Path) -> None:
    folder, reasons = str(tmp_path), [[None, EMPTY_CAPTION], ["missing", None, "empty"]]
    for number, some in enumerate(reasons):
        storage.write_table(part_uri(folder, number), pa.table({"reason": some}))
    items = [{"part": number, "rows": [0, 1, 2][: 2 + number]} for number in range(2)]
    items.append({"part": 2, "rows": [0] * 7})
    assert count_left(folder, items, decodes=True) == [0, 2, 7]
    assert count_left(folder, items, decodes=False) == [0, 0, 7]


def test_parts_are_read_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, millions of clips on S3 would take hours."""
    count = 6
    for number in range(count):
        row = {"clip_hash": count - number, "clip_id": str(number), "captions": [], "reason": None}
        table = pa.Table.from_pylist([row], schema=SCHEMA)
        storage.write_table(part_uri(str(tmp_path), number), table)
    read, together = storage.read_table, threading.Barrier(count, timeout=20)

    def read_together(uri: str, columns: list[str] | None = None) -> pa.Table:
        together.wait()  # fails unless all parts are being read
        return read(uri, columns)

    monkeypatch.setattr(storage, "read_table", read_together)
    assert read_parts(str(tmp_path), count)["clip_id"].to_pylist() == ["5", "4", "3", "2", "1", "0"]
    items = [{"part": number, "rows": [0]} for number in range(count)]
    assert count_left(str(tmp_path), items, decodes=True) == [0] * count


def test_videos_that_are_not_fetched_yet_are_refused(config: CaptionConfig) -> None:
    table = pq.read_table(config.manifest)
    rows = table.to_pylist()
    rows[1]["video_uri"] = "https://example.org/1.mp4"
    storage.write_table(config.manifest, table.from_pylist(rows, schema=table.schema))
    with pytest.raises(ManifestError, match=r"contains URLs, such as https://example.org/1.mp4"):
        run_caption(config)
    assert not Path(config.output).with_name("out.parts").exists()


@pytest.mark.parametrize("kind", ["alpro", "dual_encoder"])
def test_models_that_write_no_captions_are_refused(
    config: CaptionConfig, tmp_path: Path, kind: str
) -> None:
    model = small_model(kind, tmp_path)
    uri = str(tmp_path / "other")
    checkpoints.save(uri, model, model.tokenizer, step=0)
    with pytest.raises(CheckpointError, match="writes no captions; give a checkpoint of stgt"):
        run_caption(replace(config, checkpoint=uri))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_tokens": 999}, "max_tokens = 999: must be less than"),
        ({"max_tokens": None, "min_tokens": 99}, "min_tokens = 99: must not exceed max_tokens"),
        ({"num_frames": 99}, "num_frames = 99: the model takes at most"),
        ({"checkpoint": "nowhere"}, "has no COMPLETE marker"),
        ({"manifest": "nowhere.parquet"}, "does not exist"),
        ({"store": "nowhere"}, "has no catalogue.json"),
    ],
)
def test_what_cannot_be_used_is_named(
    config: CaptionConfig, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(STGTError, match=said):
        run_caption(replace(config, **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output": "folder"}, "output = 'folder': must be the name of a manifest"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": 0.0}, "temperature"),
        ({"num_beams": 2, "captions_per_clip": 3, "method": "beam"}, "captions_per_clip"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_out_of_range_are_named(
    config: CaptionConfig, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingError, match=said):
        replace(config, **changes)


# With a clip store, on Ray.


@pytest.mark.ray
def test_clips_of_a_store_are_captioned(tiny_data: TinyData, tmp_path: Path) -> None:
    config = CaptionConfig(
        manifest=tiny_data.train_manifest,
        store=tiny_data.train_store,
        checkpoint=save_untrained(tiny_data, tmp_path),
        output=str(tmp_path / "captioned.parquet"),
        method="nucleus",
    )
    summary = run_caption(config)
    # The damaged video of the data set is in the manifest and not in the store.
    assert (summary["clips"], summary["captioned"]) == (40, 39)
    assert summary["missing"] == {"not_in_store": 1}
    with pytest.raises(ClipStoreError, match="contains none of the clips"):
        run_caption(
            replace(config, store=tiny_data.val_store, output=str(tmp_path / "none.parquet"))
        )


@pytest.mark.ray
@pytest.mark.soak
def test_a_killed_captioning_of_a_store_continues_with_equal_results(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    config = CaptionConfig(
        manifest=tiny_data.train_manifest,
        store=tiny_data.train_store,
        checkpoint=save_untrained(tiny_data, tmp_path),
        output=str(tmp_path / "killed.parquet"),
        method="nucleus",
        captions_per_clip=12,
    )
    flags = [f"--{name}={getattr(config, name)}" for name in ("manifest", "store", "checkpoint")]
    flags += [f"--output={config.output}", "--method=nucleus", "--captions-per-clip=12"]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            [sys.executable, "-m", "jobs.caption", *flags], cwd=PROJECT, stderr=log
        )
    parts = tmp_path / "killed.parts"
    wait_until(lambda: (parts / "00000.parquet").exists(), every_s=0.005)
    run.kill()
    run.wait()
    assert not Path(config.output).exists()
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("0*.parquet")}
    assert 1 <= len(kept) < 3
    time.sleep(0.01)
    summary = run_caption(replace(config, num_workers=1))
    assert (summary["clips"], summary["captioned"]) == (40, 39)
    at_once = replace(config, output=str(tmp_path / "at_once.parquet"))
    run_caption(at_once)
    assert captions_of(config.output) == captions_of(at_once.output)


@pytest.mark.ray
@pytest.mark.soak
def test_captions_reach_a_store_that_is_there_already(tiny_data: TinyData, tmp_path: Path) -> None:
    shutil.copytree(Path(tiny_data.train_store).parent, tmp_path / "clips")
    captioned = str(tmp_path / "captioned.parquet")
    run_caption(
        CaptionConfig(
            manifest=tiny_data.train_manifest,
            store=str(tmp_path / "clips"),
            checkpoint=save_untrained(tiny_data, tmp_path),
            output=captioned,
            method="nucleus",
        )
    )
    summary = run_ingest(tiny_ingest(captioned, str(tmp_path / "clips")))
    assert Path(summary["store"]).name == Path(tiny_data.train_store).name
    before, after = ClipStore(tiny_data.train_store), ClipStore(summary["store"])
    assert before.catalogue["digest"] != after.catalogue["digest"]
    written = captions_of(captioned)
    sources = {
        choice: open_source(after.uri, 64, "squash", captions=choice)
        for choice in ("original", "generated", "both")
    }
    for shard in range(len(before.shard_sizes)):
        old, new = (store.read_shard(shard).drop(["extras"]) for store in (before, after))
        assert old.equals(new)
        for row, clip_id in enumerate(old["clip_id"].to_pylist()):
            texts = {name: source.clip(shard, row)["captions"] for name, source in sources.items()}
            assert texts["generated"] == written[clip_id] != []
            assert texts["both"] == [*texts["original"], *texts["generated"]]


@pytest.mark.slow
@pytest.mark.soak
def test_manifest_checkpoint_and_output_may_be_on_s3(config: CaptionConfig, s3: FaultyS3) -> None:
    bucket = "s3://bucket/caption"
    storage.put_file(Path(config.manifest), f"{bucket}/in.parquet")
    for path in Path(config.checkpoint).iterdir():
        storage.put_file(path, f"{bucket}/model/{path.name}")
    remote = replace(
        config,
        manifest=f"{bucket}/in.parquet",
        checkpoint=f"{bucket}/model",
        output=f"{bucket}/out.parquet",
    )
    run_caption(config)
    assert run_caption(remote)["captioned"] == VIDEOS
    for row in storage.read_table(remote.output).to_pylist():
        assert generated_captions(row["extras"]) == captions_of(config.output)[row["clip_id"]]
    assert storage.list_names(f"{bucket}/out.parts") == []
    assert run_caption(remote)["captioned"] == VIDEOS
