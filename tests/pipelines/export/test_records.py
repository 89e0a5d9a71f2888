"""Data sets whose records were changed to harm whoever restores them, without Ray."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.artifacts.caption_similarity import scores_uri
from pipelines.artifacts.clip_store import CLIP_SCHEMA, record_uri, shard_uri, shard_writer
from pipelines.artifacts.frame_hashes import hashes_uri
from pipelines.common import storage
from pipelines.common.ray_errors import raise_packed
from pipelines.export.config import ExportConfig
from pipelines.export.dataset_form import to_store_row
from pipelines.export.dataset_writer import ShardExporter
from pipelines.export.restore_worker import ShardRestorer
from pipelines.export.run import run_export
from pipelines.export.store_files import copy_files
from pipelines.video.config import SamplingConfig
from stgt.errors import ClipStoreError

FILE = "data/train-00000-of-00001.parquet"
SIZE = 8
DIGEST = "0" * 64


class ConnectedError(Exception):
    """The export would connect to Ray now."""


def stop(config: ExportConfig) -> None:
    raise ConnectedError


def work(worker: Callable[..., Any]) -> None:
    for error in worker({"part": np.array([0])}).get("error", ()):
        raise_packed(error)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A data set of one clip, whose shard was rewritten once."""
    store, hub = tmp_path / "store", tmp_path / "hub"
    row = {
        **dict.fromkeys(CLIP_SCHEMA.names),
        "clip_id": "clip",
        "captions": ["one"],
        "split": "train",
        "frames": [bytes(SIZE * SIZE * 3)],
    }
    place = Path(shard_uri(str(store), 0, 1))
    place.parent.mkdir(parents=True)
    with shard_writer(place) as writer:
        writer.write_table(pa.Table.from_pylist([row], schema=CLIP_SCHEMA))
    shard = {
        "shard": 0,
        "revision": 1,
        "clips": 1,
        "quarantined": 0,
        "sha256": storage.digest(str(place)),
    }
    catalogue = {
        "clips": 1,
        "quarantined": 0,
        "sampling": {"num_frames": 1, "size": SIZE, "codec": "raw"},
        "shards": [shard],
    }
    storage.write_json(str(store / "catalogue.json"), catalogue)
    work(ShardExporter(str(store), str(hub), [{"train": FILE}]))
    storage.write_json(str(hub / "store/catalogue.json"), catalogue)
    storage.write_json(record_uri(str(hub / "store"), 0), shard)
    identity = {"clips": 1, "shards": 1, "manifest_sha256": DIGEST, "quarantine": None}
    storage.write_json(str(hub / "store/store.json"), identity)
    for name in ("store/manifest.parquet", "store/quarantine/00000.r1.parquet", "README.md"):
        storage.write_bytes(str(hub / name), b"x")
    claim(hub, "0a1b")
    return hub


def claim(hub: Path, name: Any) -> None:
    told = {
        "kind": "dataset",
        "store": name,
        "catalogue_sha256": storage.digest(str(hub / "store/catalogue.json")),
    }
    storage.write_json(str(hub / "export.json"), told)


def change(hub: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
    told = json.loads((hub / file).read_text())
    storage.write_json(str(hub / file), change(told) or told)
    if file == "store/catalogue.json":
        claim(hub, "0a1b")


def restore(hub: Path) -> None:
    """What the driver checks, and then the work of a worker."""
    try:
        run_export(ExportConfig(dataset=str(hub), output=str(hub.parent / "again")), stop)
    except ConnectedError:
        work(ShardRestorer(str(hub), str(hub.parent / "again" / "0a1b")))


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*.parquet")}


def test_what_is_not_changed_comes_back(hub: Path) -> None:
    restore(hub)
    assert written(hub.parent / "again") == {"00000.r1.parquet"}


OUTSIDE = "/../../../../outside/evil"


@pytest.mark.parametrize(
    "values",
    [
        {"revision": OUTSIDE},
        {"revision": -1},
        {"revision": 2},
        {"revision": True},
        {"revision": 1.0},
        {"shard": OUTSIDE},
        {"shard": 1},
        {"clips": 2},
        {"clips": None},
        {"sha256": DIGEST},
        {"sha256": OUTSIDE},
        {"bytes": "1"},
        {"reasons": {"missing": -1}},
        {"captions": "1"},
        {"histograms": [1]},
        {"generation": OUTSIDE},
    ],
    ids=str,
)
def test_a_record_of_a_shard_is_checked(hub: Path, values: dict[str, Any]) -> None:
    before = written(hub.parent)
    change(hub, "store/shards/00000.json", lambda record: {**record, **values})
    with pytest.raises(ClipStoreError, match=r"shards/00000\.json is not one that jobs\.export"):
        restore(hub)
    assert written(hub.parent) == before


@pytest.mark.parametrize(
    "values",
    [
        {"shard": 1},
        {"files": [1]},
        {"files": [FILE, FILE]},
        {"files": "data"},
        {"file_of_clip": [-1]},
        {"file_of_clip": [1]},
        {"file_of_clip": [0, 0]},
        {"file_of_clip": 1},
        {"files": [], "file_of_clip": [0, 0]},
        {"clips": 10**30},
        {"rows_sha256": None},
    ],
    ids=str,
)
def test_a_record_of_what_was_exported_is_checked(hub: Path, values: dict[str, Any]) -> None:
    change(hub, "store/exported/00000.json", lambda record: {**record, **values})
    with pytest.raises(ClipStoreError, match=r"exported/00000\.json is not one that jobs\.export"):
        restore(hub)
    assert not (hub.parent / "again" / "0a1b" / "shards").exists()


def in_shard(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda told: told["shards"][0].update({name: value})


def in_sampling(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda told: told["sampling"].update({name: value})


@pytest.mark.parametrize(
    "damage",
    [
        in_shard("revision", OUTSIDE),
        in_shard("shard", 1),
        in_shard("clips", 2),
        in_sampling("size", "8"),
        in_sampling("codec", "other"),
        in_sampling("num_frames", 0),
        in_sampling("unknown", 0),
        lambda told: told.update(generation=OUTSIDE),
        lambda told: told.update(generation=None),
        lambda told: told.update(clips="1"),
        lambda told: told.update(quarantined=None),
        lambda told: told.update(shards={}),
        lambda told: told.update(shards=[1]),
        lambda told: [told],
    ],
)
def test_a_catalogue_is_checked(hub: Path, damage: Callable[[dict[str, Any]], Any]) -> None:
    change(hub, "store/catalogue.json", damage)
    with pytest.raises(ClipStoreError, match=r"catalogue\.json is not one that jobs\.export wrote"):
        restore(hub)
    assert not (hub.parent / "again").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"shards": 2},
        {"clips": "1"},
        {"manifest_sha256": None},
        {"generations": [OUTSIDE]},
        {"generations": [{"clips": 1, "shards": 1, "added": 1}] * 2},
    ],
    ids=str,
)
def test_the_settings_of_a_store_are_checked(hub: Path, values: dict[str, Any]) -> None:
    change(hub, "store/store.json", lambda told: {**told, **values})
    with pytest.raises(ClipStoreError, match=r"store/store\.json is not one that jobs\.export"):
        restore(hub)
    assert not (hub.parent / "again").exists()


def test_json_that_cannot_be_read_is_one_sentence(hub: Path) -> None:
    record = hub / "store/shards/00000.json"
    for data in (b"[" * 100_000, b"\xff", b"1" * 5000, b""):
        record.write_bytes(data)
        with pytest.raises(ClipStoreError, match="is not one that jobs"):
            restore(hub)
    record.unlink()
    with pytest.raises(ClipStoreError, match="is missing; fetch the data set again"):
        restore(hub)
    (hub / "store/exported/0\u00b2.json").touch()  # a digit that is no number
    (hub / "store/exported/00000.json").unlink()
    with pytest.raises(ClipStoreError, match="has no record of shard 0"):
        restore(hub)


@pytest.mark.parametrize("name", ["my.store", "clips v1", "...", "0a1b", "\u00e9t\u00e9"])
def test_a_store_keeps_any_name_that_a_folder_may_have(hub: Path, name: str) -> None:
    claim(hub, name)
    with pytest.raises(ConnectedError):
        run_export(ExportConfig(dataset=str(hub), output=str(hub.parent / "again")), stop)
    assert (hub.parent / "again" / name / "export.json").exists()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "/a", "a\0b", "\ud800", "x" * 256, None, 1], ids=repr
)
def test_a_name_that_is_not_one_folder_is_refused(hub: Path, name: Any) -> None:
    claim(hub, name)
    with pytest.raises(ClipStoreError, match=r"export\.json is not one that jobs\.export wrote"):
        run_export(ExportConfig(dataset=str(hub), output=str(hub.parent / "again")), stop)
    assert not (hub.parent / "again").exists()


def replaced(hub: Path, name: str, column: pa.Array) -> None:
    table = pq.read_table(hub / FILE)
    place = table.schema.get_field_index(name)
    pq.write_table(table.set_column(place, name, column), hub / FILE)


def png(size: tuple[int, int]) -> bytes:
    sink = io.BytesIO()
    Image.new("1", size).save(sink, format="PNG")
    return sink.getvalue()


FRAMES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


@pytest.mark.parametrize(
    ("name", "column", "said"),
    [
        ("captions", pa.array(["one"]), "the column captions has the type string"),
        ("frames", pa.array([[1]]), "the column frames has the type list"),
        ("fps", pa.array([b"1"]), "the column fps has the type binary"),
        ("frames", pa.array([None], FRAMES), "a frame has no bytes"),
        ("frames", pa.array([[None]], FRAMES), "a frame has no bytes"),
        (
            "frames",
            pa.array([[{"bytes": png((9, SIZE)), "path": None}]], FRAMES),
            "9 x 8 pixels instead of 8 x 8",
        ),
    ],
)
def test_rows_of_another_kind_are_refused(
    hub: Path, name: str, column: pa.Array, said: str
) -> None:
    replaced(hub, name, column)
    with pytest.raises(ClipStoreError, match=said):
        restore(hub)
    assert not written(hub.parent / "again" / "0a1b" / "shards")


def test_a_picture_that_unpacks_to_gigabytes_is_refused() -> None:
    # A small file whose header declares more pixels than Pillow opens.
    small = png((1, 1))
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + small[24:29]
    bomb = small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]
    row = {"clip_id": "a", "frames": [{"bytes": bomb, "path": None}]}
    with pytest.raises(ValueError, match="decompression bomb"):
        to_store_row(row, SamplingConfig(num_frames=1, size=SIZE, codec="raw"))


def test_more_rows_than_a_shard_has_are_not_read_to_their_end(hub: Path) -> None:
    table = pq.read_table(hub / FILE)
    place = table.schema.get_field_index("frames")
    damaged = table.set_column(place, "frames", pa.array([None], FRAMES))
    pq.write_table(pa.concat_tables([*[table] * 150, damaged]), hub / FILE)
    with pytest.raises(ClipStoreError, match="has changed since it was exported"):
        restore(hub)
    assert not written(hub.parent / "again" / "0a1b" / "shards")


@pytest.mark.parametrize("place", [hashes_uri, scores_uri])
def test_what_is_beside_a_shard_comes_back_and_names_its_new_checksum(
    hub: Path, place: Callable[[str, int, int], str]
) -> None:
    part, again = str(hub / "store"), str(hub.parent / "again" / "0a1b")
    table = pa.table({"clip_id": ["clip"]})

    def come_back(named: str, recorded: str) -> str:
        """Restore it, and return the checksum that it names."""
        change(hub, "store/shards/00000.json", lambda told: told.update(sha256=recorded))
        change(hub, "store/catalogue.json", in_shard("sha256", recorded))
        labeled = table.replace_schema_metadata({"shard_sha256": named})
        storage.write_table(place(part, 0, 1), labeled)
        work(ShardRestorer(str(hub), again))
        found = storage.read_table(place(again, 0, 1))
        assert found.to_pylist() == table.to_pylist()
        return (found.schema.metadata or {})[b"shard_sha256"].decode()

    actual = storage.read_json(part + "/catalogue.json")["shards"][0]["sha256"]
    assert come_back(actual, actual) == actual
    # Another version of Arrow wrote the shard.
    assert come_back("e" * 64, "e" * 64) == actual
    # It belongs to a version of the shard that was replaced.
    assert come_back("f" * 64, "e" * 64) == "f" * 64


def test_all_that_is_beside_shards_is_copied(hub: Path, tmp_path: Path) -> None:
    part, copies = str(hub / "store"), tmp_path / "copies"
    expected = {"manifest.parquet", "quarantine/00000.r1.parquet"}
    for place in (hashes_uri, scores_uri):
        storage.write_bytes(place(part, 0, 1), b"x")
        expected.add(str(Path(place(part, 0, 1)).relative_to(part)))
    catalogue = storage.read_json(part + "/catalogue.json")
    copy_files(part, str(copies), catalogue, part + "/quarantine")
    found = {str(path.relative_to(copies)) for path in copies.rglob("*.parquet")}
    assert found == expected
