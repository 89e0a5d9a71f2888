"""Stores of several splits, of raw frames and of rewritten shards as data sets, without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.clip_store import CLIP_SCHEMA, record_uri, shard_uri, shard_writer
from pipelines.common import storage
from pipelines.common.ray_errors import raise_packed
from pipelines.export.dataset_form import (
    DATA_FILE,
    DATASET_SCHEMA,
    RowsDigest,
    card_features,
    data_file,
    row_groups,
    split_names,
    to_dataset_row,
    to_store_row,
)
from pipelines.export.dataset_writer import ShardExporter
from pipelines.export.restore_worker import ShardRestorer
from pipelines.video import frame_codec
from pipelines.video.config import SamplingConfig

Row = dict[str, Any]
SPLITS = ["train", "1k-A test", "train", None, "1k-A test"]
FILES = {"": "data/unnamed-00000-of-00001.parquet"} | {
    split: f"data/{name}-00000-of-00001.parquet"
    for split, name in (("train", "train"), ("1k-A test", "1k_A_test"))
}


def rows_of(sampling: SamplingConfig) -> list[Row]:
    """Clips of three splits in turn, the last one a picture."""
    generator = np.random.default_rng(0)
    rows = []
    for number, split in enumerate(SPLITS):
        shape = (sampling.num_frames if number < 4 else 1, sampling.size, sampling.size, 3)
        frames = generator.integers(0, 255, shape, dtype=np.uint8)
        rows.append(
            {
                **dict.fromkeys(CLIP_SCHEMA.names),
                "clip_id": f"clip/{number}",
                "video_id": "v\u00e9lo",
                "captions": [] if number == 2 else ["one", "two\nlines"][: number + 1],
                "start_s": None if number % 2 else 0.1 + number,
                "split": split,
                "extras": json.dumps({"n": number}),
                "frames": frame_codec.encode_frames(frames, sampling.codec, 95),
                "frame_indices": list(range(shape[0])),
                "fps": 29.97,
                "salvaged": bool(number % 2),
            }
        )
    return rows


@pytest.fixture(params=["jpeg", "raw"])
def sampling(request: pytest.FixtureRequest) -> SamplingConfig:
    return SamplingConfig(num_frames=3, size=8, codec=request.param)


@pytest.fixture
def store(tmp_path: Path, sampling: SamplingConfig) -> Path:
    """A store of one shard, which was rewritten once."""
    folder = tmp_path / "store"
    place = Path(shard_uri(str(folder), 0, 1))
    place.parent.mkdir(parents=True)
    with shard_writer(place) as writer:
        writer.write_table(pa.Table.from_pylist(rows_of(sampling), schema=CLIP_SCHEMA))
    record = {"shard": 0, "revision": 1, "clips": 5, "sha256": storage.digest(str(place))}
    storage.write_json(record_uri(str(folder), 0), record)
    recorded = {"num_frames": 3, "size": 8, "codec": sampling.codec}
    catalogue = {"clips": 5, "quarantined": 0, "sampling": recorded, "shards": [record]}
    storage.write_json(str(folder / "catalogue.json"), catalogue)
    return folder


def work(worker: Callable[..., Any]) -> None:
    answer = worker({"part": np.array([0])})
    for error in answer.get("error", ()):
        raise_packed(error)
    assert answer["done"].tolist() == [5]


def test_a_shard_of_several_splits_comes_back_with_the_same_bytes(
    tmp_path: Path, store: Path, sampling: SamplingConfig
) -> None:
    hub, again = tmp_path / "hub", tmp_path / "again"
    work(ShardExporter(str(store), str(hub), [FILES]))
    exported = storage.read_json(str(hub / "store/exported/00000.json"))
    assert exported["file_of_clip"] == [1, 2, 1, 0, 2]
    tables = {split: pq.read_table(hub / file) for split, file in FILES.items()}
    assert {split: len(table) for split, table in tables.items()} == {
        "": 1,
        "train": 2,
        "1k-A test": 2,
    }
    assert all(table.schema.equals(DATASET_SCHEMA) for table in tables.values())
    magic = b"\xff\xd8\xff" if sampling.codec == "jpeg" else b"\x89PNG"
    assert tables[""]["frames"][0].as_py()[0]["bytes"].startswith(magic)
    for name in ("catalogue.json", "shards/00000.json"):
        storage.write_bytes(str(hub / "store" / name), (store / name).read_bytes())
    work(ShardRestorer(str(hub), str(again)))
    name = Path(shard_uri("", 0, 1)).name
    assert (again / "shards" / name).read_bytes() == (store / "shards" / name).read_bytes()
    assert storage.read_json(record_uri(str(again), 0))["revision"] == 1


def test_a_row_comes_back_as_it_was(sampling: SamplingConfig) -> None:
    for row in rows_of(sampling):
        assert to_store_row(to_dataset_row(row, sampling), sampling) == row


def test_frames_without_bytes_or_without_a_picture_are_refused() -> None:
    raw = SamplingConfig(num_frames=1, size=8, codec="raw")
    for frame, said in ((None, "has no bytes"), (b"text", "not a picture")):
        row = {"clip_id": "a", "frames": [{"bytes": frame, "path": "a.png"}]}
        with pytest.raises(ValueError, match=said):
            to_store_row(row, raw)


def test_the_checksum_of_rows_sees_every_column_and_their_order(sampling: SamplingConfig) -> None:
    def digest(rows: list[Row]) -> str:
        found = RowsDigest()
        for row in rows:
            found.add(row)
        return found.hexdigest()

    rows = rows_of(sampling)
    seen = {digest(rows), digest(rows[::-1]), digest(rows[:-1])}
    changes: dict[str, Any] = {
        "captions": ["other"],
        "fps": 30.0,
        "split": "val",
        "salvaged": None,
        "frames": [rows[0]["frames"][0] + b"\0", *rows[0]["frames"][1:]],
    }
    seen |= {digest([{**rows[0], name: value}, *rows[1:]]) for name, value in changes.items()}
    assert len(seen) == 3 + len(changes)
    assert digest(rows_of(sampling)) == digest(rows)


def test_splits_get_names_that_files_may_have() -> None:
    names = split_names(["train", "1k-A test", "1k A/test", "", "all", "../x"])
    assert names["train"] == "train"
    assert len(set(names.values())) == 6
    for name in names.values():
        assert DATA_FILE.fullmatch(data_file(name, 0, 3))
    assert "all" not in names.values()
    # A pattern such as data/train-* must match the files of one split only.
    assert not any("-" in name for name in names.values())


@pytest.mark.parametrize(
    "path",
    [
        "../data/train-00000-of-00001.parquet",
        "data/../../x-00000-of-00001.parquet",
        "/data/train-00000-of-00001.parquet",
        "data/train.parquet",
        "store/catalogue.json",
    ],
)
def test_other_paths_are_no_files_of_a_data_set(path: str) -> None:
    assert DATA_FILE.fullmatch(path) is None


def test_row_groups_are_limited_in_bytes_and_rows() -> None:
    rows = [{"frames": [{"bytes": bytes(size)}]} for size in [10, 10, 10, 90, 200, 10]]
    groups = list(row_groups(rows, most_bytes=100))
    assert [len(group) for group in groups] == [3, 1, 1, 1]
    assert [row for group in groups for row in group] == rows
    small = [{"frames": [{"bytes": b""}]}] * 130
    assert [len(group) for group in row_groups(small)] == [64, 64, 2]


def test_the_card_and_the_schema_name_the_same_columns() -> None:
    features = {one["name"]: one for one in card_features()}
    assert list(features) == DATASET_SCHEMA.names == CLIP_SCHEMA.names
    assert features["frames"] == {"name": "frames", "sequence": "image"}
    assert features["captions"] == {"name": "captions", "sequence": "string"}
    assert features["fps"] == {"name": "fps", "dtype": "float64"}
