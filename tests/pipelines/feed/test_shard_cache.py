"""Shards that the data workers of a node share."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.artifacts.clip_store import ClipStore
from pipelines.common import storage
from pipelines.feed.loader import ClipLoader
from pipelines.feed.shard_cache import ShardCache
from pipelines.feed.sources import StoreSource
from stgt.errors import STGTError
from tests.helpers.data import PROJECT, TinyData
from tests.helpers.faulty_s3 import FaultyS3
from tests.helpers.training import loader_config

TABLE = pa.table({"number": list(range(1000)), "word": [f"word {n}" for n in range(1000)]})


def refuse() -> pa.Table:
    raise AssertionError("it is there already")


@pytest.mark.slow
def test_one_of_many_processes_loads_a_shard(tmp_path: Path) -> None:
    """Six processes that ask for two shards, and all have asked before one is loaded."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.read_shards", str(tmp_path), *("a", "b") * 3],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("loaded.*")) == ["loaded.a.1", "loaded.b.1"]


def test_a_shard_is_mapped_and_not_copied(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path)
    cache.table("a", lambda: TABLE)
    before = pa.total_allocated_bytes()
    found = cache.table("a", refuse)
    assert pa.total_allocated_bytes() - before < 10_000 < found.nbytes


def test_the_least_recently_used_goes_and_whoever_reads_it_keeps_it(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, most_bytes=int(2.5 * TABLE.nbytes))
    first = cache.table("first", lambda: TABLE)
    cache.table("second", lambda: TABLE)
    os.utime(tmp_path / "second.arrow", (1, 1))
    cache.table("third", lambda: TABLE)
    assert {path.stem for path in tmp_path.glob("*.arrow")} == {"first", "third"}
    os.utime(tmp_path / "first.arrow", (1, 1))
    cache.table("fourth", lambda: TABLE)
    assert {path.stem for path in tmp_path.glob("*.arrow")} == {"third", "fourth"}
    assert first.equals(TABLE)


def test_a_cache_too_small_for_one_shard_still_gives_it(tmp_path: Path) -> None:
    assert ShardCache(tmp_path, most_bytes=1).table("a", lambda: TABLE).equals(TABLE)


@pytest.mark.parametrize("left", [0, 100, 20_000])
def test_what_a_lost_machine_left_damaged_is_made_again(tmp_path: Path, left: int) -> None:
    cache = ShardCache(tmp_path)
    cache.table("a", lambda: TABLE)
    whole = (tmp_path / "a.arrow").read_bytes()
    assert left < len(whole)
    (tmp_path / "a.arrow").write_bytes(whole[:left])
    assert ShardCache(tmp_path).table("a", lambda: TABLE).equals(TABLE)
    assert (tmp_path / "a.arrow").read_bytes() == whole


def test_what_is_needed_soon_is_fetched_unless_another_is_at_it(tmp_path: Path) -> None:
    cache, other = ShardCache(tmp_path), ShardCache(tmp_path)
    begun, go_on = threading.Event(), threading.Event()

    def slowly() -> pa.Table:
        begun.set()
        assert go_on.wait(20)
        return TABLE

    ahead = threading.Thread(target=cache.prepare, args=("a", slowly))
    ahead.start()
    assert begun.wait(20)
    other.prepare("a", refuse)  # does not wait
    go_on.set()
    ahead.join()
    other.prepare("a", refuse)
    assert other.table("a", refuse).equals(TABLE)


def test_no_space_and_a_folder_that_cannot_be_used_are_one_sentence(
    small_disk: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = small_disk("16k")
    with pytest.raises(STGTError, match="no space for a shard of .* give another --cache-dir"):
        ShardCache(small).table("a", lambda: TABLE)
    assert not [path for path in small.iterdir() if path.suffix != ".lock"]
    (tmp_path / "file").touch()
    with pytest.raises(STGTError, match="cannot create the shard cache at"):
        ShardCache(tmp_path / "file" / "below").table("a", refuse)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(STGTError, match="belongs to another user"):
        ShardCache(tmp_path).table("a", refuse)


@pytest.mark.ray
def test_no_more_shards_are_fetched_ahead_than_there_is_room_for(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    store = ClipStore(tiny_data.train_store)
    source = StoreSource(tiny_data.train_store, ShardCache(tmp_path))
    source.prepare([2, 0, 1], store.shard_bytes(2) + store.shard_bytes(0) + 1)
    (ahead,) = [one for one in threading.enumerate() if one.name.startswith("shards_ahead")]
    del source  # its thread does what it was asked for, and ends
    ahead.join(60)
    assert not ahead.is_alive()
    fetched = {path.stem.partition("-")[0] for path in tmp_path.glob("*.arrow")}
    assert fetched == {store.shard_key(2), store.shard_key(0)}


@pytest.mark.ray
def test_data_workers_fetch_each_shard_of_a_remote_store_once(
    tiny_data: TinyData, s3: FaultyS3, tmp_path: Path
) -> None:
    remote = storage.filesystem("s3://bucket")[0]
    remote.put(tiny_data.train_store, "bucket/cached/store", recursive=True)
    local = loader_config(tiny_data)
    config = replace(local, data=("s3://bucket/cached/store",), cache_dir=str(tmp_path / "cache"))
    workers = [ClipLoader(config) for _ in range(3)]
    alone = ClipLoader(local)
    for number in range(2 * 39 // 3):  # two epochs, clip by clip in turns
        block = {"id": np.arange(3 * number, 3 * number + 3)}
        found, wanted = workers[number % 3](block), alone(block)
        assert found["clip_id"].tolist() == wanted["clip_id"].tolist()
        assert np.array_equal(found["frames"], wanted["frames"])
    shards = [Path(path) for path in Path(tiny_data.train_store).glob("shards/*.parquet")]
    size = sum(path.stat().st_size for path in shards)
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == len(shards) == 3
    # Each once, and the footers of Parquet.
    assert s3.bytes_read("cached/store/shards/0") < 1.3 * size
