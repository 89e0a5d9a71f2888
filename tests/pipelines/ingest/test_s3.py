"""Manifest, videos, store and quarantine on S3, on a server that fails as S3 does."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.manifest import SCHEMA, clip_hash
from pipelines.common import storage
from pipelines.ingest.run import run_ingest
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.run import run_manifest
from pipelines.video.synthetic import dataset
from tests.helpers.data import tiny_ingest
from tests.helpers.faulty_s3 import FaultyS3

CLIPS = 12


@pytest.fixture
def faulty(s3: FaultyS3) -> Iterator[FaultyS3]:
    yield s3
    s3.fail(0)


@pytest.fixture(scope="module")
def uploaded(s3: FaultyS3, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prefix with videos, and annotations that name three more: missing, forbidden, empty."""
    s3.fail(0)
    folder = tmp_path_factory.mktemp("videos")
    videos = dataset.plan_videos(num_train=CLIPS + 8, num_val=1, seed=0)["train"]
    videos = [video for video in videos if video.damaged is None][:CLIPS]
    dataset.write_videos({"id": np.arange(len(videos))}, str(folder), videos)
    prefix = "s3://bucket/set"
    ids, pages = [], []
    for video in videos:
        uri = storage.join(prefix, "videos", video.page_dir, f"{video.video_id}.mp4")
        storage.put_file(folder / video.page_dir / f"{video.video_id}.mp4", uri)
        ids.append(video.video_id)
        pages.append(video.page_dir)
    storage.write_bytes(storage.join(prefix, "videos", "p", "hollow.mp4"), b"")
    ids += ["absent", "closed", "hollow"]
    pages += ["p", "forbidden", "p"]
    captions = [f"caption number {number}" for number in range(len(ids))]
    text = dataset.webvid_csv(ids, pages, captions)
    storage.write_bytes(storage.join(prefix, "results.csv"), text.encode())
    return prefix


def add_span(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add a clip that is a part of a video of another clip."""
    usable = [row for row in rows if row["clip_id"] not in ("absent", "closed", "hollow")]
    name = "added"
    row = {**usable[0], "clip_id": name, "clip_hash": clip_hash(name), "start_s": 0.5, "end_s": 1.0}
    return sorted([*rows, row], key=lambda one: one["clip_hash"])


def objects(prefix: str) -> dict[str, bytes]:
    """Objects below a prefix, without what tells of the run that made them."""
    fs, path = storage.filesystem(prefix)
    of_the_run = ("report.html", "report.json", "mlflow_run.json", "config.json")
    return {
        name.removeprefix(path): storage.read_bytes(f"s3://{name}")
        for name in fs.find(path)
        if not name.endswith(of_the_run)
    }


@pytest.mark.slow
@pytest.mark.parametrize("shares", [(0.0, 0.2), (0.0, 0.1, 0.5)], ids=str)
@pytest.mark.soak
def test_a_server_that_fails_changes_nothing(
    ray_cluster: None, faulty: FaultyS3, uploaded: str, shares: tuple[float, ...]
) -> None:
    made = {}
    for share in shares:
        faulty.fail(share)
        folder = f"s3://bucket/made{len(shares)}-{share:g}"
        manifest = storage.join(folder, "manifest.parquet")
        found = run_manifest(
            ManifestConfig(
                annotations=(storage.join(uploaded, "results.csv"),),
                videos=storage.join(uploaded, "videos"),
                output=manifest,
            )
        )
        assert found["clips"] == CLIPS + 3
        config = tiny_ingest(
            manifest,
            storage.join(folder, "clips"),
            quarantine=storage.join(folder, "bad"),
            max_bad_fraction=0.25,
            clips_per_shard=6,
        )
        summary = run_ingest(config)
        assert summary["clips"] == CLIPS
        assert summary["reasons"] == {"empty": 1, "forbidden": 1, "missing": 1}
        if share == shares[-1]:
            assert run_ingest(replace(config, verify=True))["clips"] == CLIPS
        # Another caption, and another span of a video, are taken over in the same way.
        rows = storage.read_table(manifest).to_pylist()
        rows[0].update(captions=["another caption"])
        storage.write_table(manifest, pa.Table.from_pylist(add_span(rows), schema=SCHEMA))
        grown = run_ingest(config)
        assert (grown["clips"], grown["reasons"]) == (CLIPS + 1, summary["reasons"])
        counts = ClipStore(grown["store"]).captions_per_shard
        assert sum(one[0] for one in counts) == CLIPS + 1
        assert (faulty.failed() > 0) == (share > 0)
        faulty.fail(0)
        made[share] = objects(folder)
        assert any("/bad/" in name for name in made[share])
        for name in ("store.json", "catalogue.json"):  # they name the folder
            made[share] = {
                key: data.replace(folder.encode(), b"") for key, data in made[share].items()
            }
            assert any(key.endswith(name) for key in made[share])
    assert all(made[share] == made[0.0] for share in shares)


@pytest.mark.slow
def test_storage_reads_back_what_it_wrote_while_half_of_the_requests_fail(
    faulty: FaultyS3, tmp_path: Path
) -> None:
    faulty.fail(0.5)
    data = bytes(range(256)) * 4000
    uri = "s3://bucket/half/data"
    storage.write_bytes(uri, data)
    assert storage.read_bytes(uri) == data
    assert storage.size_bytes(uri) == len(data)
    storage.fetch_file(uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    storage.put_file(tmp_path / "copy", "s3://bucket/half/again")
    assert storage.list_names("s3://bucket/half") == ["again", "data"]
    assert storage.digest(uri) == storage.digest_of(data)
    storage.remove(uri)
    assert not storage.exists(uri)


@pytest.mark.slow
def test_what_is_not_there_or_forbidden_is_an_answer_at_once(faulty: FaultyS3) -> None:
    faulty.fail(0)
    with pytest.raises(FileNotFoundError, match="it does not exist: 's3://bucket/nothing'"):
        storage.read_bytes("s3://bucket/nothing")
    with pytest.raises(FileNotFoundError, match="bucket does not exist: 's3://no-bucket/x'"):
        storage.write_bytes("s3://no-bucket/x", b"1")
    with pytest.raises(PermissionError, match=r"no permission \(\w+\): 's3://bucket/forbidden/x'"):
        storage.read_bytes("s3://bucket/forbidden/x")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each pause between two attempts would have been; none is made."""
    made: list[float] = []
    this_thread, sleep = threading.current_thread(), time.sleep

    def pause(seconds: float) -> None:
        if threading.current_thread() is this_thread:
            made.append(seconds)
        else:  # a thread of another test
            sleep(seconds)

    monkeypatch.setattr(time, "sleep", pause)
    return made


def test_what_stays_broken_is_given_up_with_what_to_do(pauses: list[float]) -> None:
    calls = []

    @storage.patient
    def read(uri: str) -> None:
        calls.append(uri)
        raise OSError(errno.EBUSY, "Slow Down")

    with pytest.raises(storage.UnreachableError, match=r"s3://b/k could not be reached.*Slow Down"):
        read("s3://b/k")
    assert len(calls) == storage.ATTEMPTS == 1 + len(pauses)
    with pytest.raises(OSError, match="Slow Down"):
        read("/a/local/path")
    assert len(calls) == storage.ATTEMPTS + 1


def test_pauses_between_attempts_are_random_and_bounded(pauses: list[float]) -> None:
    @storage.patient
    def read(uri: str) -> None:
        raise OSError(errno.EBUSY, "Slow Down")

    for _ in range(3):
        with pytest.raises(storage.UnreachableError):
            read("s3://b/k")
    assert len(pauses) == 3 * (storage.ATTEMPTS - 1)
    assert len(set(pauses)) > 0.9 * len(pauses)
    assert max(pauses) <= storage.LONGEST_PAUSE_S
    # They grow: the last ones reach further than any of the first.
    assert max(pauses[-5:]) > max(pauses[:3])
