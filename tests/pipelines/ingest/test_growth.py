"""A store follows its manifest: rows are added, removed and changed without a new ingest."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.clip_store import ClipStore, record_uri
from pipelines.artifacts.frame_hashes import add_hashes, shards_without_hashes
from pipelines.artifacts.manifest import SCHEMA, ManifestRows, clip_hash
from pipelines.common import storage
from pipelines.ingest import growth
from pipelines.ingest.claim import claim_store
from pipelines.ingest.config import FilterConfig, IngestConfig
from pipelines.ingest.growth import StoredRows, compare
from pipelines.ingest.plan import plan_ingest
from pipelines.ingest.run import run_ingest
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.run import run_manifest
from stgt.errors import ClipStoreError
from tests.helpers.data import TinyData, digests, tiny_ingest

Row = dict[str, Any]


def row(clip_id: str, **changes: Any) -> Row:
    return {
        "clip_hash": clip_hash(clip_id),
        "clip_id": clip_id,
        "video_id": clip_id,
        "video_uri": f"/videos/{clip_id}.mp4",
        "start_s": None,
        "end_s": None,
        "captions": [f"caption of {clip_id}"],
        "split": "train",
        "source": "test",
        "extras": "{}",
        **changes,
    }


def write(path: Path, rows: list[Row]) -> str:
    table = pa.Table.from_pylist(sorted(rows, key=lambda one: one["clip_hash"]), schema=SCHEMA)
    storage.write_table(str(path), table, row_group_rows=7)
    return str(path)


# Comparing manifests, without a store.


def by_hand(before: list[Row], shards: dict[str, int], now: list[Row]) -> dict[str, Any]:
    """The same comparison, row by row."""
    known = {one["clip_id"]: one for one in before}
    identity = ("video_uri", "start_s", "end_s")
    stays = {
        one["clip_id"]
        for one in now
        if one["clip_id"] in known
        and all(known[one["clip_id"]][name] == one[name] for name in identity)
    }
    changed = {
        one["clip_id"] for one in now if one["clip_id"] in stays and one != known[one["clip_id"]]
    }
    gone = known.keys() - stays
    return {
        "shard_of": [shards[one["clip_id"]] if one["clip_id"] in stays else -1 for one in now],
        "removed": len(gone),
        "moved": len(gone & {one["clip_id"] for one in now}),
        "changed": len(changed),
        "recaptioned": len(
            {
                one["clip_id"]
                for one in now
                if one["clip_id"] in stays and one["captions"] != known[one["clip_id"]]["captions"]
            }
        ),
        "revised": sorted({shards[clip_id] for clip_id in gone | changed}),
    }


@pytest.mark.parametrize("piece", [3, 1000])
def test_rows_are_compared_as_if_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(growth, "COMPARED_ROWS", piece)
    random = np.random.default_rng(0)
    names = [f"clip{number}" for number in range(120)]
    changes: list[Row] = [
        {}, {}, {}, {"captions": ["one", "two"]}, {"captions": []}, {"captions": ["other"]},
        {"start_s": 1.0}, {"end_s": 2.5}, {"video_uri": "/elsewhere.mp4"}, {"split": "val"},
        {"extras": '{"a": 1}'}, {"video_id": "v"}, {"source": "s"},
    ]  # fmt: skip
    for number in range(4):
        drawn = [random.permutation(names)[: 20 + 25 * number] for _ in range(2)]
        before, now = (
            sorted(
                (row(str(name), **changes[random.integers(len(changes))]) for name in part),
                key=lambda one: one["clip_hash"],
            )
            for part in drawn
        )
        shards = {one["clip_id"]: place // 9 for place, one in enumerate(before)}
        manifests = [write(tmp_path / f"{n}.parquet", part) for n, part in enumerate((before, now))]
        found = compare(
            StoredRows(
                ManifestRows(manifests[0]),
                np.array([shards[one["clip_id"]] for one in before], dtype=np.int32),
            ),
            ManifestRows(manifests[1]),
            len(now),
        )
        expected = by_hand(before, shards, now)
        assert found.shard_of.tolist() == expected.pop("shard_of")
        assert found.revised.tolist() == expected.pop("revised")
        assert {name: getattr(found, name) for name in expected} == expected
        assert found.added == len(now) - len(before) + found.removed


def test_only_other_captions_bring_clips_back_from_quarantine(tmp_path: Path) -> None:
    """Not generated captions, for example, which are in the extras."""
    filters = FilterConfig(unique_captions=True, unique_videos=True, near_duplicates=6)
    rows = [row(f"clip{number}") for number in range(30)]
    config = ingest(tmp_path, "clips", rows, filters=filters)
    plan = claim_store(plan_ingest(config))
    quarantined = {"near_duplicate": 2, "duplicate_video": 1}
    record = {"shard": 0, "reasons": quarantined}
    storage.write_json(record_uri(plan.store, 0), record)

    def again(changes: Row) -> list[str]:
        rows[3].update(changes)
        write(tmp_path / "manifest.parquet", rows)
        now = claim_store(plan_ingest(config)).generations[-1]
        assert (now["changed"], now["added"], now["removed"]) == (1, 0, 0)
        return now["again"]

    for changes in ({"extras": '{"generated": {}}'}, {"split": "val"}, {"video_id": "v"}):
        assert again(changes) == []
    assert again({"captions": ["other"]}) == [
        "duplicate_caption", "duplicate_video", "near_duplicate",
    ]  # fmt: skip


def test_scattered_rows_of_a_manifest_are_read(tmp_path: Path) -> None:
    names = [f"clip{number}" for number in range(100)]
    manifest = ManifestRows(write(tmp_path / "m.parquet", [row(name) for name in names]))
    whole = manifest.read(0, 100)
    for rows in ([], [3], [0, 6, 7, 50, 99], list(range(100))):
        assert manifest.take(np.array(rows, dtype=np.int64)) == [whole[place] for place in rows]


# Stores.


@pytest.fixture
def videos(tiny_data: TinyData) -> list[str]:
    paths = sorted(Path(tiny_data.videos).rglob("*.mp4"))
    return [str(path) for path in paths if path.stat().st_size]


def rows_of(store: str) -> dict[str, Row]:
    """What is stored or quarantined of each clip; numbers of attempts aside."""
    opened = ClipStore(store)
    found: dict[str, Row] = {}
    for shard in range(len(opened.shard_sizes)):
        for one in opened.read_shard(shard).to_pylist():
            assert one["clip_id"] not in found
            found[one["clip_id"]] = one
    assert len(found) == opened.num_clips
    for path in sorted(Path(opened.quarantine).iterdir()):
        for one in pq.read_table(path).to_pylist():
            assert one["clip_id"] not in found
            found[one["clip_id"]] = one
    return found


def ingest(tmp_path: Path, name: str, rows: list[Row], **changes: Any) -> IngestConfig:
    values = {"clips_per_shard": 4, "max_bad_fraction": 0.5, **changes}
    return tiny_ingest(write(tmp_path / "manifest.parquet", rows), str(tmp_path / name), **values)


def copied(store: str, folder: Path) -> str:
    return str(shutil.copytree(store, folder / Path(store).name))


@pytest.mark.ray
def test_a_grown_store_has_the_rows_of_one_made_at_once(
    tiny_data: TinyData, videos: list[str], tmp_path: Path
) -> None:
    store, old = (copied(tiny_data.train_store, tmp_path / name) for name in ("grown", "old"))
    before, was = digests(store), ClipStore(store)
    rows = storage.read_table(tiny_data.train_manifest).to_pylist()
    # One row leaves, two get other captions, one another span, and five are added.
    shards = [was.read_shard(shard, ["clip_id"])["clip_id"].to_pylist() for shard in range(3)]
    (broken,) = [number for number in range(3) if was.catalogue["shards"][number]["quarantined"]]
    harmed = next(number for number in range(3) if number != broken)
    untouched = 3 - broken - harmed
    first = [one for one in rows if one["clip_id"] in shards[harmed]]
    first[0].update(captions=["other", "captions"], split="val")
    first[1].update(start_s=0.5, end_s=1.5)
    stored = {clip_id for clip_ids in shards for clip_id in clip_ids}
    (bad,) = [one for one in rows if one["clip_id"] not in stored]
    bad["captions"] = ["still broken"]
    rows.remove(first[2])
    rows += [row(f"new{number}", video_uri=videos[number], end_s=1.0) for number in range(4)]
    rows.append(row("gone", video_uri="/nowhere/at/all.mp4"))
    config = ingest(tmp_path, "grown", rows, clips_per_shard=14)
    summary = run_ingest(config)
    at_once = run_ingest(replace(config, output=str(tmp_path / "at_once")))
    assert rows_of(store) == rows_of(at_once["store"])
    assert (summary["clips"], summary["reasons"]) == (at_once["clips"], at_once["reasons"])
    assert summary["reasons"] == {"empty": 1, "missing": 1}
    # All other files keep their bytes.
    after, now = digests(store), ClipStore(store)
    assert now.catalogue["digest"] != was.catalogue["digest"]
    for name in ("shards/{}.parquet", "shards/{}.json", "quarantine/{}.parquet"):
        assert after[name.format(f"{untouched:05d}")] == before[name.format(f"{untouched:05d}")]
    revised = f"shards/{harmed:05d}"
    assert f"{revised}.r1.parquet" in after
    assert f"{revised}.parquet" not in after
    assert {"manifest.g1.parquet", "members.g1.parquet"} <= after.keys()
    assert "manifest.parquet" not in after
    report = json.loads(Path(store, "report.json").read_text())
    assert report["changes"] == [
        {
            "clips": 44, "added": 6, "removed": 2, "moved": 1, "changed": 2,
            "shards_added": 1, "shards_rewritten": 2,
        }
    ]  # fmt: skip
    assert "Changes of the manifest" in Path(store, "report.html").read_text()
    assert run_ingest(replace(config, verify=True))["clips"] == summary["clips"]

    # A run that was killed in the middle leaves the old catalogue, which can still be read.
    for name in (
        "store.json", "manifest.g1.parquet", "members.g1.parquet", f"{revised}.r1.parquet",
        f"quarantine/{harmed:05d}.r1.parquet", f"hashes/{harmed:05d}.r1.parquet",
        f"{revised}.json",
    ):  # fmt: skip
        shutil.copyfile(Path(store, name), Path(old, name))
    Path(old, "shards", "00003.parquet").write_bytes(b"half a shard")
    assert (
        ClipStore(old)
        .read_shard(harmed)
        .equals(ClipStore(tiny_data.train_store).read_shard(harmed))
    )
    killed = replace(config, output=str(tmp_path / "old"))
    with pytest.raises(ClipStoreError, match="has not been brought up to date with its changed"):
        run_ingest(replace(killed, verify=True))
    run_ingest(killed)
    assert digests(old) == after


@pytest.mark.ray
def test_the_store_of_an_earlier_version_grows(
    tiny_data: TinyData, videos: list[str], tmp_path: Path
) -> None:
    store = Path(copied(tiny_data.train_store, tmp_path / "grown"))
    rows = storage.read_table(tiny_data.train_manifest).to_pylist()
    config = ingest(tmp_path, "grown", rows, clips_per_shard=14)
    shutil.copyfile(tiny_data.train_manifest, config.manifest)
    # Earlier versions kept no manifest, recorded no captions, and wrote no hashes of frames.
    shutil.rmtree(store / "hashes")
    (store / "manifest.parquet").unlink()
    (store / "config.json").unlink()
    for path in (*store.glob("shards/*.json"), store / "catalogue.json"):
        values = json.loads(path.read_text())
        for one in (values, *values.get("shards", ())):
            one.pop("captions", None)
        path.write_text(json.dumps(values))
    assert run_ingest(replace(config, verify=True))["clips"] == 39
    before = digests(str(store))
    # What is in quarantine is tried again, since its earlier span is not known.
    (bad,) = [one for one in rows if not Path(one["video_uri"]).stat().st_size]
    rows.append(row("added", video_uri=videos[20]))
    write(Path(config.manifest), rows)
    summary = run_ingest(config)
    assert (summary["clips"], summary["reasons"]) == (40, {"empty": 1})
    after, found = digests(str(store)), rows_of(str(store))
    assert len([name for name in before if after.get(name) == before[name]]) == 6
    assert found.keys() == {one["clip_id"] for one in rows}
    assert found[bad["clip_id"]]["attempts"] == 2
    # The new and the rewritten shard have hashes; the others get them when they are needed.
    assert len(shards_without_hashes(ClipStore(str(store)))) == 2
    for shard in shards_without_hashes(ClipStore(str(store))):
        add_hashes(ClipStore(str(store)), shard)
    assert shards_without_hashes(ClipStore(str(store))) == []
    assert run_ingest(replace(config, verify=True))["clips"] == 40
    assert sum(one[0] for one in ClipStore(str(store)).captions_per_shard) == 40


@pytest.mark.ray
def test_the_reported_case_of_one_more_row(
    videos: list[str], tmp_path: Path, cases_dir: Path
) -> None:
    for name, video in zip(("a.mp4", "b.mp4", "link.mp4"), videos, strict=False):
        shutil.copyfile(video, tmp_path / name)
    manifest = str(tmp_path / "manifest.parquet")
    config = tiny_ingest(manifest, str(tmp_path / "clips"))

    def annotate(case: str) -> None:
        annotations = str(cases_dir / "22_incremental" / case)
        run_manifest(
            ManifestConfig(
                annotations=(annotations,),
                videos=(str(tmp_path),),
                output=manifest,
                format="generic",
            )
        )

    annotate("inc1.jsonl")
    assert run_ingest(config)["clips"] == 2
    annotate("inc2.jsonl")
    store = run_ingest(config)["store"]
    assert ClipStore(store).num_clips == 3
    # The way back would remove a third of the clips.
    before = digests(store)
    annotate("inc1.jsonl")
    said = r"1 of the 3 clips of .* more than 10%, because .*parquet does not contain them \(1\)"
    with pytest.raises(ClipStoreError, match=said):
        run_ingest(config)
    with pytest.raises(ClipStoreError, match="made with another manifest than .* --verify"):
        run_ingest(replace(config, verify=True))
    assert digests(store) == before


@pytest.mark.ray
@pytest.mark.soak
def test_duplicates_of_a_grown_store_are_those_of_one_made_at_once(
    videos: list[str], tmp_path: Path
) -> None:
    both = FilterConfig(unique_captions=True, unique_videos=True)
    names = sorted((f"clip{number}" for number in range(10)), key=clip_hash)
    rows = [row(name, video_uri=videos[number]) for number, name in enumerate(names)]
    # Rows 0 and 5 are one video, and 2 and 7 have one caption. Rows 1 and 6 are added later.
    rows[5]["video_uri"], rows[6]["video_uri"] = rows[0]["video_uri"], rows[0]["video_uri"]
    rows[7]["captions"] = rows[2]["captions"]
    rows[1]["captions"] = rows[2]["captions"]
    states = [
        [*rows[:1], *rows[2:6], *rows[7:]],
        rows,
        [one for number, one in enumerate(rows) if number not in (0, 1)],
    ]
    expected = [
        {"duplicate_video": 1, "duplicate_caption": 1},
        {"duplicate_video": 2, "duplicate_caption": 2},
        {"duplicate_video": 1, "duplicate_caption": 1},
    ]
    for number, (state, reasons) in enumerate(zip(states, expected, strict=True)):
        config = ingest(tmp_path, "grown", state, filters=both, allow_removals=True)
        summary = run_ingest(config)
        assert summary["reasons"] == reasons
        at_once = run_ingest(ingest(tmp_path, f"at_once{number}", state, filters=both))
        assert rows_of(summary["store"]) == rows_of(at_once["store"])
    assert run_ingest(replace(config, verify=True))["clips"] == 6


@pytest.mark.ray
@pytest.mark.soak
def test_many_bad_clips_among_those_added_are_refused_and_the_store_stays_readable(
    videos: list[str], tmp_path: Path
) -> None:
    rows = [row(f"clip{number}", video_uri=videos[number % 30]) for number in range(60)]
    config = ingest(tmp_path, "clips", rows, clips_per_shard=64, max_bad_fraction=0.2)
    store = run_ingest(config)["store"]
    rows += [row(f"bad{number}", video_uri="/nowhere.mp4") for number in range(10)]
    write(tmp_path / "manifest.parquet", rows)
    with pytest.raises(ClipStoreError, match="10 of the 10 clips that were added are bad"):
        run_ingest(config)
    assert ClipStore(store).num_clips == 60
    assert run_ingest(replace(config, max_bad_fraction=1.0))["reasons"] == {"missing": 10}


@pytest.mark.ray
@pytest.mark.soak
def test_a_sample_follows_its_manifest_and_a_grown_store_is_retried(
    videos: list[str], tmp_path: Path
) -> None:
    names = sorted((f"clip{number}" for number in range(30)), key=clip_hash)
    rows = [row(name, video_uri=videos[number]) for number, name in enumerate(names)]
    hidden = rows[2]["video_uri"] = str(tmp_path / "hidden.mp4")
    limited = {"limit": 20, "allow_removals": True}
    run_ingest(ingest(tmp_path, "grown", rows[:1] + rows[5:], **limited))
    config = ingest(tmp_path, "grown", rows, **limited)
    summary = run_ingest(config)
    at_once = run_ingest(replace(config, output=str(tmp_path / "at_once")))
    assert rows_of(summary["store"]) == rows_of(at_once["store"])
    assert summary["reasons"] == {"missing": 1}
    assert rows_of(summary["store"]).keys() == set(names[:20])
    shutil.copyfile(videos[2], hidden)
    assert run_ingest(replace(config, retry_quarantined=()))["clips"] == 20
    assert run_ingest(replace(config, verify=True))["clips"] == 20
