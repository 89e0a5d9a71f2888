"""Manifest to clip store, on real files and a real Ray."""

from __future__ import annotations

import json
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from ray.util import placement_group, remove_placement_group

from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.manifest import whole_videos_table
from pipelines.common import storage, waiting
from pipelines.ingest.plan import store_uri
from pipelines.ingest.run import run_ingest
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.run import run_manifest
from pipelines.video.config import SamplingConfig
from pipelines.video.frame_codec import decode_frames, encode_frames
from pipelines.video.synthetic import dataset, render, scenes
from stgt.errors import ClipStoreError, ManifestError, STGTError
from tests.helpers.data import TinyData, digests, tiny_ingest
from tests.helpers.waiting import wait_until


@pytest.mark.ray
def test_every_clip_is_in_the_store_or_in_quarantine(tiny_data: TinyData) -> None:
    store = ClipStore(tiny_data.train_store)
    assert (store.num_clips, store.num_quarantined) == (39, 1)
    assert len(store.shard_sizes) == 3
    assert store.catalogue["reasons"] == {"empty": 1}
    stored = [
        clip_id
        for shard in range(3)
        for clip_id in store.read_shard(shard, ["clip_id"])["clip_id"].to_pylist()
    ]
    bad = pq.read_table(f"{tiny_data.train_store}/quarantine")["clip_id"].to_pylist()
    manifest = pq.read_table(tiny_data.train_manifest)["clip_id"].to_pylist()
    assert sorted(stored + bad) == sorted(manifest)


@pytest.mark.ray
def test_stored_frames_and_captions_belong_to_their_clip(tiny_data: TinyData) -> None:
    store = ClipStore(tiny_data.train_store)
    videos = {
        video.video_id: video
        for video in dataset.plan_videos(num_train=40, num_val=12, seed=0)["train"]
    }
    for clip in store.read_shard(0).to_pylist()[:4]:
        video = videos[clip["clip_id"]]
        assert clip["captions"] == [video.scene.caption()]
        assert (clip["width"], clip["height"], clip["fps"]) == (96, 96, 12.0)
        assert clip["frame_indices"] == list(range(0, 24, 2))
        drawn = render.render(video.scene, np.random.default_rng(video.seed))[::2]
        stored = store.decode(clip["frames"])
        assert stored.shape == (12, 64, 64, 3)
        # Colour, averaged over coarse cells: what scaling and two codecs leave alone.
        coarse = [f.reshape(12, 4, f.shape[1] // 4, 4, -1, 3).mean((2, 4)) for f in (drawn, stored)]
        assert np.abs(coarse[0] - coarse[1]).mean() < 4


@pytest.mark.ray
def test_an_interrupted_ingest_ends_with_the_same_bytes(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    whole = digests(tiny_data.train_store)
    store = Path(tmp_path) / Path(tiny_data.train_store).name
    shutil.copytree(tiny_data.train_store, store)
    for name in ("catalogue.json", "mlflow_run.json", "shards/00001.json", "shards/00002.json"):
        (store / name).unlink()
    (store / "shards" / "00001.parquet").write_bytes(b"half a shard")
    untouched = (store / "shards" / "00000.parquet").stat().st_mtime_ns
    run_ingest(tiny_ingest(tiny_data.train_manifest, str(tmp_path)))
    assert digests(str(store)) == whole
    assert (store / "shards" / "00000.parquet").stat().st_mtime_ns == untouched


@pytest.mark.ray
def test_a_finished_store_is_not_made_again(tiny_data: TinyData) -> None:
    before = digests(tiny_data.train_store)
    folder = str(Path(tiny_data.train_store).parent)
    summary = run_ingest(tiny_ingest(tiny_data.train_manifest, folder))
    assert (summary["clips"], summary["quarantined"]) == (39, 1)
    assert digests(tiny_data.train_store) == before


@pytest.mark.ray
def test_no_usable_clip_is_a_failure_that_says_why(tiny_data: TinyData, tmp_path: Path) -> None:
    (tmp_path / "videos" / "p").mkdir(parents=True)
    for name in ("1", "2"):
        (tmp_path / "videos" / "p" / f"{name}.mp4").touch()
    (tmp_path / "a.csv").write_text("videoid,page_dir,name\n1,p,x\n2,p,y\n")
    manifest = str(tmp_path / "m.parquet")
    run_manifest(
        ManifestConfig(
            annotations=(str(tmp_path / "a.csv"),), videos=str(tmp_path / "videos"), output=manifest
        )
    )
    with pytest.raises(ClipStoreError, match=r"none of 2 clips can be used \(2 empty\)"):
        run_ingest(tiny_ingest(manifest, str(tmp_path / "clips")))
    assert not list((tmp_path / "clips").rglob("catalogue.json"))


@pytest.mark.ray
def test_too_many_bad_clips_fail_the_run_and_keep_the_shards(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    config = tiny_ingest(tiny_data.train_manifest, str(tmp_path), max_bad_fraction=0.01)
    with pytest.raises(ClipStoreError, match=r"1 of 40 clips are bad \(1 empty\)"):
        run_ingest(config)
    assert len(list(tmp_path.rglob("shards/*.parquet"))) == 3
    raised = tiny_ingest(tiny_data.train_manifest, str(tmp_path), max_bad_fraction=0.5)
    assert run_ingest(raised)["clips"] == 39


def test_a_store_without_catalogue_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(ClipStoreError, match=r"has no catalogue\.json"):
        ClipStore(str(tmp_path))


def test_a_missing_manifest_is_an_error_before_ray_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="does not exist"):
        run_ingest(tiny_ingest(str(tmp_path / "none.parquet"), str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"manifest": "folder"}, "manifest .*/folder is a folder; give a Parquet file"),
        ({"output": "file"}, "/file is a file, but a folder is needed there"),
        ({"output": "file/below"}, "/file is a file, but a folder is needed there"),
        ({"quarantine": "file/below"}, "quarantine: .*/file is a file, but a folder is needed"),
    ],
)
def test_files_in_place_of_folders_are_an_error_before_ray_is_needed(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    manifest = str(tmp_path / "manifest.parquet")
    storage.write_table(manifest, whole_videos_table({"a": "/a.mp4"}, {"a": "x"}, "test"))
    config = tiny_ingest(manifest, str(tmp_path / "clips"))
    with pytest.raises(STGTError, match=message):
        run_ingest(replace(config, **{name: str(tmp_path / at) for name, at in changes.items()}))


@pytest.mark.ray
def test_an_ingest_that_waits_for_cpus_says_so(
    tiny_data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(waiting, "FIRST_S", 0.5)
    cpus = int(ray.cluster_resources()["CPU"])
    # One group per CPU, so that those that other tests still hold are taken once they are free.
    others = [placement_group([{"CPU": 1}]) for _ in range(cpus)]
    wait_until(lambda: ray.available_resources().get("CPU", 0) == 0)
    config = tiny_ingest(tiny_data.train_manifest, str(tmp_path), limit=2)
    ingest = threading.Thread(target=run_ingest, args=(config,))
    ingest.start()
    said = f"ingest: no worker has started .* needs 1 CPU, .* 0 of {cpus} CPUs are free"
    wait_until(lambda: re.search(said, caplog.text))
    for other in others:
        remove_placement_group(other)
    ingest.join(timeout=120)
    assert ClipStore(store_uri(config)).num_clips == 2


@pytest.mark.parametrize("codec", ["jpeg", "raw"])
def test_frames_survive_their_codec(codec: str) -> None:
    frames = render.render(scenes.all_scenes()[0], np.random.default_rng(0))[:2, 20:52, 20:52]
    again = decode_frames(encode_frames(frames, codec, 95), codec, 32)  # type: ignore[arg-type]
    assert again.dtype == np.uint8
    difference = np.abs(frames.astype(int) - again).mean()
    assert difference == 0 if codec == "raw" else difference < 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jpeg_quality": 0}, "jpeg_quality = 0"),
        ({"num_frames": 0}, "num_frames = 0"),
    ],
)
def test_a_sampling_config_out_of_range_names_the_field(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**changes)


def test_a_catalogue_adds_up(tmp_path: Path) -> None:
    catalogue = {
        "sampling": json.loads(json.dumps(SamplingConfig().__dict__)),
        "clips": 3,
        "quarantined": 1,
        "reasons": {"empty": 1},
        "shards": [{"clips": 2}, {"clips": 1}],
    }
    (tmp_path / "catalogue.json").write_text(json.dumps(catalogue))
    store = ClipStore(str(tmp_path))
    assert (store.num_clips, store.shard_sizes) == (3, [2, 1])
