"""Test clips in training data: by id, by their frames, in stores without hashes, and unfound."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.artifacts.clip_store import CLIP_SCHEMA, ClipStore, shard_uri, shard_writer
from pipelines.artifacts.frame_hashes import hashes_uri, read_hashes, shards_without_hashes
from pipelines.artifacts.manifest import whole_videos_table
from pipelines.artifacts.training_run import TrainingData, training_data_of
from pipelines.common import storage
from pipelines.common.config import TrackingConfig
from pipelines.evaluate.benchmarks import BENCHMARKS
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.gallery import Gallery, open_gallery
from pipelines.evaluate.leakage import check_leakage, needs_ray, resolve_training_data
from pipelines.evaluate.run import run_evaluate
from pipelines.video.config import SamplingConfig
from pipelines.video.frame_codec import encode_frames
from pipelines.video.frame_hash import NO_HASH
from stgt.errors import ClipStoreError, SettingError, STGTError

SIZE, FRAMES = 64, 4


def frames(seed: int, size: int = SIZE) -> np.ndarray:
    """Four smooth random pictures, [4, size, size, 3] uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, size=(FRAMES, 9, 9, 3), dtype=np.uint8)
    return np.stack(
        [
            np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC))
            for one in coarse
        ]
    )


def store(
    folder: Path, shards: list[dict[str, np.ndarray]], size: int = SIZE, quality: int = 95
) -> str:
    """A store as earlier versions made it, without hashes."""
    sampling = SamplingConfig(num_frames=FRAMES, size=size)
    records = []
    (folder / "shards").mkdir(parents=True)
    for number, clips in enumerate(shards):
        rows = [
            {
                "clip_id": name,
                "video_id": name,
                "video_uri": f"/{name}.mp4",
                "captions": [f"about {name}"],
                "frames": encode_frames(pictures, "jpeg", quality),
            }
            for name, pictures in clips.items()
        ]
        uri = shard_uri(str(folder), number)
        with shard_writer(uri) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=CLIP_SCHEMA))
        records.append({"shard": number, "clips": len(rows), "sha256": storage.digest(uri)})
    catalogue = {
        "sampling": asdict(sampling),
        "clips": sum(map(len, shards)),
        "quarantined": 0,
        "shards": records,
    }
    (folder / "catalogue.json").write_text(json.dumps(catalogue))
    return str(folder)


def opened(data: str, *against: str) -> tuple[EvaluateConfig, Gallery]:
    config = EvaluateConfig(data=data, checkpoint="c", output="o", leakage_against=against)
    return config, open_gallery(config, BENCHMARKS["any"])


@pytest.fixture
def stores(tmp_path: Path) -> tuple[str, str]:
    """Test clips t0 to t5, and training clips in two shards at another size and quality.

    t0 is there under its name with other frames, t1 with its frames under another name, t2 with
    both, t3 with three of its frames, t4 with one of them, and t5 not at all.
    """
    black = np.zeros((1, 96, 96, 3), dtype=np.uint8)
    test = {f"t{n}": frames(n) for n in range(6)}
    test["t5"] = np.concatenate([frames(5)[:3], black[:, :SIZE, :SIZE]])
    large = {n: frames(n, 96) for n in range(6)}
    train = [
        {"t0": frames(10, 96), "x1": large[1], "other": frames(11, 96)},
        {
            "t2": large[2],
            "x3": np.concatenate([frames(12, 96)[:1], large[3][:3]]),
            "x4": np.concatenate([large[4][:1], frames(13, 96)[:2], black]),
        },
    ]
    return (
        store(tmp_path / "test", [test]),
        store(tmp_path / "train", train, size=96, quality=70),
    )


def test_leaked_clips_are_found_by_id_and_by_frames(stores: tuple[str, str]) -> None:
    data, train = stores
    config, gallery = opened(data, train)
    found = check_leakage(config, gallery, TrainingData((train,)))
    by = {one.clip_id: (one.by, one.train_clip_id, one.frames, one.of) for one in found.leaked}
    assert by == {
        "t0": ("id", "t0", 0, 4),
        "t1": ("frames", "x1", 4, 4),
        "t2": ("id and frames", "t2", 4, 4),
        "t3": ("frames", "x3", 3, 4),
    }
    assert all(one.data == train for one in found.leaked)
    assert found.by_frames
    assert not found.is_clean
    said = str(found)
    assert said.startswith(f"4 of the 6 test clips are in {train}, compared by id and by 64-bit")
    assert "(2 by frames, 1 by id, 1 by id and frames); the metrics include them" in said
    assert found.to_dict()["clean"] is False


def test_a_store_of_other_clips_is_clean(stores: tuple[str, str], tmp_path: Path) -> None:
    data, _ = stores
    other = store(tmp_path / "other", [{f"o{n}": frames(20 + n) for n in range(5)}])
    config, gallery = opened(data, other)
    found = check_leakage(config, gallery, TrainingData((other,)))
    assert found.leaked == ()
    assert found.is_clean
    assert str(found).startswith(f"none of the 6 test clips is in {other}")
    half_known = check_leakage(config, gallery, TrainingData((other,), "the rest is unknown"))
    assert not half_known.is_clean
    assert str(half_known).endswith("; the rest is unknown")


def test_older_stores_get_hashes_once_and_keep_their_shards(stores: tuple[str, str]) -> None:
    _, train = stores
    before = {path: path.read_bytes() for path in Path(train).rglob("*") if path.is_file()}
    config, gallery = opened(*stores)
    opened_store = ClipStore(train)
    assert shards_without_hashes(opened_store) == [0, 1]
    assert read_hashes(opened_store, 0) is None
    check_leakage(config, gallery, TrainingData((train,)))
    assert {path: path.read_bytes() for path in before} == before
    assert shards_without_hashes(opened_store) == []
    table = read_hashes(opened_store, 1)
    assert table is not None
    assert table["clip_id"].to_pylist() == ["t2", "x3", "x4"]
    assert [len(one) for one in table["hashes"].to_pylist()] == [FRAMES] * 3
    assert table["hashes"].to_pylist()[2][3] == NO_HASH
    # Interrupted after the first shard: only the second one is hashed again.
    first, second = (Path(hashes_uri(train, number)) for number in (0, 1))
    written = first.stat().st_mtime_ns
    second.unlink()
    check_leakage(config, gallery, TrainingData((train,)))
    assert first.stat().st_mtime_ns == written
    assert second.exists()


def test_hashes_of_another_version_of_a_shard_are_not_used(stores: tuple[str, str]) -> None:
    _, train = stores
    config, gallery = opened(*stores)
    check_leakage(config, gallery, TrainingData((train,)))
    catalogue = json.loads((Path(train) / "catalogue.json").read_text())
    catalogue["shards"][1]["sha256"] = "another"
    (Path(train) / "catalogue.json").write_text(json.dumps(catalogue))
    assert shards_without_hashes(ClipStore(train)) == [1]


def test_manifests_are_compared_by_id_only(stores: tuple[str, str], tmp_path: Path) -> None:
    data, train = stores
    manifest = str(tmp_path / "train.parquet")
    names = ["all/t4.mp4", "z"]
    table = whole_videos_table(dict.fromkeys(names, "/v.mp4"), dict.fromkeys(names, "x"), "test")
    pq.write_table(table, manifest)
    config, gallery = opened(data, manifest, train)
    only_ids = check_leakage(config, gallery, TrainingData((manifest,)))
    assert [(one.clip_id, one.by) for one in only_ids.leaked] == [("t4", "id")]
    assert not only_ids.by_frames
    assert "by id only, because no frames of the training data are stored" in str(only_ids)
    both = check_leakage(config, gallery, TrainingData((manifest, train)))
    assert [one.clip_id for one in both.leaked] == ["t0", "t1", "t2", "t3", "t4"]
    assert not both.by_frames
    said = str(both)
    assert f"compared with {train} by id and by 64-bit hashes of stored frames" in said
    assert (
        f"and with {manifest} by id only, because no frames are stored there (2 by frames" in said
    )
    assert both.to_dict()["compared"] == [
        {"data": manifest, "by": "id"},
        {"data": train, "by": "id and frames"},
    ]
    of_manifest = EvaluateConfig(data=manifest, checkpoint="c", output="o")
    found = check_leakage(
        of_manifest, open_gallery(of_manifest, BENCHMARKS["any"]), TrainingData((train,))
    )
    assert (found.leaked, found.is_clean, found.by_frames) == ((), False, False)
    assert str(found).endswith("by id only, because no frames of the test clips are stored")


def test_clips_of_the_same_name_in_several_folders_are_all_found(tmp_path: Path) -> None:
    paths = {}
    for split, names in (
        ("test", ["x/clip1.mp4", "y/clip1.mp4", "y/clip2.mp4"]),
        ("train", ["clip1"]),
    ):
        paths[split] = str(tmp_path / f"{split}.parquet")
        table = whole_videos_table(
            dict.fromkeys(names, "/v.mp4"), dict.fromkeys(names, "a"), "test"
        )
        pq.write_table(table, paths[split])
    config, gallery = opened(paths["test"], paths["train"])
    found = check_leakage(config, gallery, TrainingData((paths["train"],)))
    leaked = {one.clip_id: one.train_clip_id for one in found.leaked}
    assert leaked == {"x/clip1.mp4": "clip1", "y/clip1.mp4": "clip1"}


def test_clips_whose_frames_show_nothing_do_not_count_as_compared(tmp_path: Path) -> None:
    black = np.zeros((FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    data = store(tmp_path / "test", [{"seen": frames(1), "black": black}])
    train = store(tmp_path / "train", [{"other": frames(2), "dark": black}])
    config, gallery = opened(data, train)
    found = check_leakage(config, gallery, TrainingData((train,)))
    assert (found.leaked, found.ids_only, found.by_frames) == ((), ("black",), False)
    assert not found.is_clean
    assert "except for 1 test clip compared by id only, because no frame that shows" in str(found)
    assert found.to_dict()["ids_only"] == ["black"]
    data = store(tmp_path / "dark", [{"black": black}])
    config, gallery = opened(data, train)
    nothing = check_leakage(config, gallery, TrainingData((train,)))
    assert not nothing.is_clean
    assert str(nothing).endswith(
        "by id only, because no stored frame of the test clips shows something"
    )


def test_a_result_is_outdated_when_the_training_data_grew(
    tmp_path: Path, mlflow_database: Path
) -> None:
    (tmp_path / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    train = tmp_path / "train.parquet"

    def write(names: list[str]) -> None:
        table = whole_videos_table(
            dict.fromkeys(names, "/v.mp4"), dict.fromkeys(names, "a"), "train"
        )
        pq.write_table(table, train)

    write(["other"])
    np.savez(
        tmp_path / "e.npz",
        video_ids=np.array(["clip1", "clip2"]),
        video_embeds=np.eye(2),
        caption_video_ids=np.array(["clip1", "clip2"]),
        caption_embeds=np.eye(2),
    )
    values = {
        "embedding_file": str(tmp_path / "e.npz"),
        "leakage_against": (str(train),),
        "resamples": 0,
        "tracking": TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"),
    }
    first = EvaluateConfig(output=str(tmp_path / "out"), **values)
    before = run_evaluate(first)["protocol"]["leakage"]
    assert before.startswith("none of the 2 test clips is in")
    assert run_evaluate(first)["protocol"]["leakage"] == before
    write(["other", "clip2"])
    with pytest.raises(STGTError, match="choose another folder, or delete this one"):
        run_evaluate(first)
    again = run_evaluate(EvaluateConfig(output=str(tmp_path / "again"), **values))
    assert again["protocol"]["leakage"].startswith("1 of the 2 test clips is in")


def test_training_data_are_named_or_recorded_with_the_checkpoint(
    stores: tuple[str, str], tmp_path: Path
) -> None:
    data, train = stores
    first, second = tmp_path / "stage1", tmp_path / "stage2"
    for folder, settings in (
        (first, {"data": [data], "init_from": str(tmp_path / "imported")}),
        (second, {"data": [train], "init_from": str(first / "checkpoints" / "step-00000002")}),
    ):
        checkpoint = folder / "checkpoints" / "step-00000002"
        checkpoint.mkdir(parents=True)
        (checkpoint / "COMPLETE").touch()
        (folder / "config.json").write_text(json.dumps({"job": "train", **settings}))
    checkpoint = str(second / "checkpoints" / "step-00000002")
    found = training_data_of(checkpoint)
    assert found.uris == (train, data)
    assert found.unknown == f"what {tmp_path}/imported was trained on is not recorded"
    values = {"data": data, "output": "o"}
    config = EvaluateConfig(checkpoint=checkpoint, leakage_against=("recorded",), **values)
    assert resolve_training_data(config) == found
    assert not needs_ray(config, found)
    assert resolve_training_data(EvaluateConfig(checkpoint=checkpoint, **values)) is None
    unknown = EvaluateConfig(checkpoint="elsewhere", leakage_against=("recorded",), **values)
    with pytest.raises(SettingError, match="no training data are recorded with elsewhere"):
        resolve_training_data(unknown)
    gone = EvaluateConfig(checkpoint="c", leakage_against=(str(tmp_path / "gone"),), **values)
    with pytest.raises(ClipStoreError, match=r"gone has no catalogue\.json"):
        resolve_training_data(gone)


def test_large_stores_without_hashes_need_ray(
    stores: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, gallery = opened(*stores)
    training = TrainingData((stores[1],))
    monkeypatch.setattr("pipelines.evaluate.leakage.SMALL_STORE_CLIPS", 3)
    assert needs_ray(config, training)
    assert not needs_ray(config, None)


@pytest.mark.ray
def test_ray_gives_the_same_hashes(
    stores: tuple[str, str], monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    _, train = stores
    config, gallery = opened(*stores)
    here = check_leakage(config, gallery, TrainingData((train,)))
    files = sorted(Path(train).glob("hashes/*.parquet"))
    before = [path.read_bytes() for path in files]
    for path in files:
        path.unlink()
    monkeypatch.setattr("pipelines.evaluate.leakage.SMALL_STORE_CLIPS", 0)
    assert check_leakage(config, gallery, TrainingData((train,))) == here
    assert [path.read_bytes() for path in files] == before
