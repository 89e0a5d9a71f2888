"""Reads shards through one cache, in one process a key: `python -m ... FOLDER KEY...`."""

from __future__ import annotations

import functools
import multiprocessing
import sys
from pathlib import Path

import pyarrow as pa

from pipelines.feed.shard_cache import ShardCache
from tests.helpers.waiting import wait_until

TABLE = pa.table({"number": list(range(1000))})


def _load(folder: Path, key: str, readers: int) -> pa.Table:
    """A shard, once all processes are there; leaves a file that tells how often it was loaded."""
    times = 1 + len(list(folder.glob(f"loaded.{key}.*")))
    (folder / f"loaded.{key}.{times}").touch()
    wait_until(lambda: len(list(folder.glob("reader.*"))) == readers)
    return TABLE


def _read(folder: Path, number: int, keys: list[str]) -> None:
    cache = ShardCache(folder / "cache")
    (folder / f"reader.{number}").touch()
    load = functools.partial(_load, folder, keys[number], len(keys))
    assert cache.table(keys[number], load).equals(TABLE)


def main() -> None:
    """Run the processes; the exit code is 0 if all of them read the table."""
    folder, keys = Path(sys.argv[1]), sys.argv[2:]
    context = multiprocessing.get_context("fork")  # each import takes a second
    readers = [
        context.Process(target=_read, args=(folder, number, keys)) for number in range(len(keys))
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    sys.exit(any(reader.exitcode for reader in readers))


if __name__ == "__main__":
    main()
