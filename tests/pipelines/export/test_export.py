"""Round trips on Ray: a store as a data set and back, a manifest as tars and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pipelines.artifacts.clip_store import ClipStore
from pipelines.common import storage
from pipelines.export.config import ExportConfig
from pipelines.export.run import run_export
from pipelines.ingest.run import run_ingest
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.run import run_manifest
from stgt.errors import ClipStoreError, SettingError, STGTError
from tests.helpers.data import TinyData, digests, tiny_ingest

pytestmark = pytest.mark.ray


class ConnectedError(Exception):
    """The export would connect to Ray now."""


def stop(config: ExportConfig) -> None:
    raise ConnectedError


@pytest.fixture(scope="module")
def dataset(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three shards with a clip in quarantine, as a data set."""
    output = tmp_path_factory.mktemp("dataset") / "hub"
    done: Any = run_export(ExportConfig(store=tiny_data.train_store, output=str(output)))
    assert (done["splits"], done["files"]) == ({"train": done["clips"]}, 3)
    return output


def test_a_data_set_has_a_card_and_pictures(dataset: Path, tiny_data: TinyData) -> None:
    header = yaml.safe_load((dataset / "README.md").read_text().split("---")[1])
    (split,) = header["dataset_info"]["splits"]
    store = ClipStore(tiny_data.train_store)
    assert (split["name"], split["num_examples"]) == ("train", store.num_clips)
    assert header["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*"}]
    files = sorted((dataset / "data").iterdir())
    assert [file.name for file in files] == [f"train-{n:05d}-of-00003.parquet" for n in range(3)]
    schema = pq.read_schema(files[0])
    told = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    assert list(told) == schema.names
    assert [one["name"] for one in header["dataset_info"]["features"]] == schema.names
    assert told["frames"]["feature"] == {"_type": "Image"}
    rows = pq.read_table(files[0]).to_pylist()
    expected = store.read_shard(0).to_pylist()
    assert [row["clip_id"] for row in rows] == [row["clip_id"] for row in expected]
    frame = rows[0]["frames"][0]["bytes"]
    assert frame == expected[0]["frames"][0]
    (dataset.parent / "frame.jpg").write_bytes(frame)
    with Image.open(dataset.parent / "frame.jpg") as picture:
        assert picture.size == (store.sampling.size, store.sampling.size)


def test_a_store_comes_back_with_the_same_bytes_and_passes_verification(
    dataset: Path, tiny_data: TinyData, tmp_path: Path
) -> None:
    done: Any = run_export(ExportConfig(dataset=str(dataset), output=str(tmp_path)))
    assert done["identical_shards"] == done["shards"] == 3
    assert digests(done["store"]) == {
        **digests(tiny_data.train_store),
        "export.json": digests(done["store"])["export.json"],
    }
    again = run_ingest(
        tiny_ingest(str(Path(done["store"]) / "manifest.parquet"), str(tmp_path), verify=True)
    )
    assert (again["store"], again["clips"]) == (done["store"], done["clips"])
    # It is finished, so nothing needs Ray.
    assert run_export(ExportConfig(dataset=str(dataset), output=str(tmp_path)), stop) == done


def test_an_interrupted_export_writes_what_is_missing(
    dataset: Path, tiny_data: TinyData, tmp_path: Path
) -> None:
    before = digests(str(dataset))
    partial = tmp_path / "hub"
    shutil.copytree(dataset, partial)
    for name in ("README.md", "data/train-00001-of-00003.parquet", "store/exported/00001.json"):
        (partial / name).unlink()
    shutil.rmtree(partial / "store" / "quarantine")
    kept = (partial / "data" / "train-00000-of-00003.parquet").stat().st_mtime_ns
    run_export(ExportConfig(store=tiny_data.train_store, output=str(partial)))
    assert digests(str(partial)) == before
    assert (partial / "data" / "train-00000-of-00003.parquet").stat().st_mtime_ns == kept
    # Without its card, a data set is not complete.
    (partial / "README.md").unlink()
    with pytest.raises(ClipStoreError, match=r"README\.md is missing"):
        run_export(ExportConfig(dataset=str(partial), output=str(tmp_path / "clips")), stop)


def changed_row(hub: Path) -> None:
    file = hub / "data" / "train-00002-of-00003.parquet"
    table = pq.read_table(file)
    captions = table["captions"].to_pylist()
    captions[0] = ["another caption"]
    place = table.schema.get_field_index("captions")
    pq.write_table(table.set_column(place, table.schema.field(place), [captions]), file)


def fewer_columns(hub: Path) -> None:
    file = hub / "data" / "train-00002-of-00003.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["frames", "fps"]), file)


def cut_file(hub: Path) -> None:
    file = hub / "data" / "train-00002-of-00003.parquet"
    file.write_bytes(file.read_bytes()[:-99])


def outside(hub: Path) -> None:
    record = hub / "store" / "exported" / "00002.json"
    told = json.loads(record.read_text())
    record.write_text(json.dumps({**told, "files": ["../../evil.parquet"]}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (changed_row, "has changed since it was exported"),
        (fewer_columns, "lacks the columns frames, fps"),
        (cut_file, "is damaged"),
        (outside, "which is no file of a data set"),
    ],
)
def test_a_data_set_that_has_changed_is_refused(
    dataset: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    from pipelines.common.ray_errors import raise_packed
    from pipelines.export.restore_worker import ShardRestorer

    shutil.copytree(dataset, tmp_path / "hub")
    damage(tmp_path / "hub")
    worker = ShardRestorer(str(tmp_path / "hub"), str(tmp_path / "store"))
    answer = worker({"part": np.array([2])})
    with pytest.raises(ClipStoreError, match=said):
        raise_packed(answer["error"][0])
    assert not list((tmp_path / "store").rglob("*.parquet"))


def test_videos_come_back_from_tars_as_the_same_clips(tiny_data: TinyData, tmp_path: Path) -> None:
    output = tmp_path / "tars"
    config = ExportConfig(manifest=tiny_data.train_manifest, output=str(output), videos_per_tar=16)
    done: Any = run_export(config)
    assert (done["videos"], done["rejected"], done["tars"]) == (39, 1, 3)
    (rejected,) = storage.read_table(done["rejected_videos"]).to_pylist()
    assert rejected["reason"] == "empty"
    before = digests(str(output))
    # What a killed run leaves: a tar without its record, which is written again, and one that
    # continued it when another video could be read as well.
    (output / "records" / "00001.json").unlink()
    (output / "tars.json").unlink()
    (output / "00001_001.tar").touch()
    (output / f".00002.tar.{'0' * 32}.tmp").touch()
    assert run_export(config) == done
    assert digests(str(output)) == before
    assert run_export(config, stop) == done
    with pytest.raises(ConnectedError):
        run_export(replace(config, retry_rejected=True), stop)
    assert not (output / "tars.json").exists()
    back = run_manifest(
        ManifestConfig(
            annotations=(str(output),), output=str(tmp_path / "back.parquet"), format="webdataset"
        )
    )
    rows, expected = (
        storage.read_table(manifest).drop_columns(["video_uri"]).to_pylist()
        for manifest in (back["manifest"], tiny_data.train_manifest)
    )
    assert rows == [row for row in expected if [row["clip_id"]] != rejected["clip_ids"]]


def test_an_output_with_something_else_is_refused(
    dataset: Path, tiny_data: TinyData, tmp_path: Path
) -> None:
    store = ExportConfig(store=tiny_data.val_store, output=str(dataset))
    with pytest.raises(STGTError, match="holds an export with another clip store than this one"):
        run_export(store, stop)
    (tmp_path / "mine.txt").touch()
    for config in (
        ExportConfig(store=tiny_data.val_store, output=str(tmp_path)),
        ExportConfig(manifest=tiny_data.train_manifest, output=str(tmp_path)),
    ):
        with pytest.raises(STGTError, match="already contains mine.txt"):
            run_export(config, stop)
    clips = Path(tiny_data.train_store).parent
    with pytest.raises(STGTError, match="which no export wrote"):
        run_export(ExportConfig(dataset=str(dataset), output=str(clips)), stop)
    with storage.lock(str(tmp_path / "new")), pytest.raises(STGTError, match="another run"):
        run_export(ExportConfig(store=tiny_data.val_store, output=str(tmp_path / "new")), stop)


def test_what_is_no_finished_store_or_data_set_is_refused(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    unfinished = tmp_path / "store"
    shutil.copytree(tiny_data.val_store, unfinished)
    (unfinished / "catalogue.json").unlink()
    output = str(tmp_path / "new")
    with pytest.raises(ClipStoreError, match=r"has no catalogue\.json"):
        run_export(ExportConfig(store=str(unfinished), output=output), stop)
    with pytest.raises(ClipStoreError, match="is not a complete data set"):
        run_export(ExportConfig(dataset=tiny_data.val_store, output=output), stop)
    assert not (tmp_path / "new").exists()


def test_exactly_one_thing_is_exported() -> None:
    wrong: list[dict[str, Any]] = [
        {},
        {"store": "a", "dataset": "b"},
        {"manifest": "a", "store": "b"},
    ]
    for given in wrong:
        with pytest.raises(SettingError, match="exactly one of --manifest, --store and --dataset"):
            ExportConfig(output="out", **given)
