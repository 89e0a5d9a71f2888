"""Clips that look alike, and clips that their captions do not describe, among those that are fine.

The model is made so that it knows its clips: its projections map each clip and its captions to one
direction, and other clips to others.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.artifacts import checkpoints
from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.manifest import clip_hash, whole_videos_table
from pipelines.common import storage
from pipelines.ingest.claim import claim_store
from pipelines.ingest.config import FilterConfig, IngestConfig
from pipelines.ingest.plan import plan_ingest, recorded_filters, store_uri
from pipelines.ingest.run import run_ingest
from pipelines.quickstart.store import tiny_sampling
from pipelines.video import frame_codec
from pipelines.video.decoder import ClipDecoder, ClipSpan
from stgt.errors import CheckpointError, ClipStoreError, SettingError
from stgt.inputs.frame_choice import choose_frames
from stgt.model import STGT
from tests.helpers.data import digests, tiny_ingest
from tests.helpers.models import WORDS, small_model
from tests.helpers.videos import encode_video, moving_pictures

CLIPS = 6
PICTURES = 14
BITS = 6


def brighter(pictures: list[np.ndarray]) -> list[np.ndarray]:
    return [np.clip(one.astype(int) + 25, 0, 255).astype(np.uint8) for one in pictures]


def noisy(pictures: list[np.ndarray]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [
        np.clip(one + random.integers(-1, 2, one.shape), 0, 255).astype(np.uint8)
        for one in pictures
    ]


COPIES: dict[str, tuple[int, str, Callable[[list], list]]] = {
    "encoded": (0, "mpeg4", list),
    "brighter": (1, "libx264", brighter),
    "noisy": (2, "libx264", noisy),
}
"""Copies of clips: number of the clip, codec, and change of its pictures."""


@dataclass(frozen=True)
class Planted:
    """Clips with copies and with captions of others."""

    rows: list[dict[str, Any]]
    """Rows of a manifest: clip_id, video_uri, captions."""
    checkpoint: str
    expected: dict[str, str]
    """Reason of each clip that is to be left out."""

    def manifest(self, path: Path, left_out: tuple[str, ...] = ()) -> str:
        rows = [row for row in self.rows if row["clip_id"] not in left_out]
        uris = {row["clip_id"]: row["video_uri"] for row in rows}
        table = whole_videos_table(uris, uris, "test")
        captions = {row["clip_id"]: row["captions"] for row in rows}
        filled = [{**row, "captions": captions[row["clip_id"]]} for row in table.to_pylist()]
        storage.write_table(str(path), table.from_pylist(filled, schema=table.schema))
        return str(path)


def caption_of(number: int) -> str:
    return f"a {WORDS[number + 1]}"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    folder = tmp_path_factory.mktemp("planted")
    rows = []
    for number in range(CLIPS):
        uri = str(folder / f"{number}.mp4")
        pictures = moving_pictures(PICTURES, seed=number)
        encode_video(Path(uri), "libx264", pictures, crf="18")
        # The first caption is that of another clip, and the second one is right.
        captions = [caption_of((number + 1) % CLIPS), caption_of(number)]
        rows.append({"clip_id": f"clip{number}", "video_uri": uri, "captions": captions})
    for name, (number, codec, change) in COPIES.items():
        uri = str(folder / f"{name}.mp4")
        encode_video(Path(uri), codec, change(moving_pictures(PICTURES, seed=number)))
        rows.append({"clip_id": name, "video_uri": uri, "captions": [caption_of(number)]})
    expected = {
        max(name, f"clip{number}", key=clip_hash): "near_duplicate"
        for name, (number, _, _) in COPIES.items()
    }
    # Other videos, one with captions of other clips and one without any.
    for name, captions in (("wrong", [caption_of(0), caption_of(1)]), ("silent", [])):
        uri = str(folder / f"{name}.mp4")
        encode_video(Path(uri), "libx264", moving_pictures(PICTURES, seed=90 + len(captions)))
        rows.append({"clip_id": name, "video_uri": uri, "captions": captions})
    expected["wrong"] = "low_similarity"
    checkpoint = str(folder / "checkpoint")
    model = knowing_model(folder, rows)
    checkpoints.save(checkpoint, model, model.tokenizer, step=0)  # type: ignore[arg-type]
    return Planted(rows, checkpoint, expected)


@torch.no_grad()
def knowing_model(folder: Path, rows: list[dict[str, Any]]) -> STGT:
    """A model for which clip n and caption n have the cosine 1, and others 0."""
    model = small_model("stgt", folder)
    assert isinstance(model, STGT)
    width = model.config.embed_dim
    sampling = tiny_sampling()
    decoder = ClipDecoder(sampling, codec=sampling.codec)
    states, targets = [], []
    numbers = {f"clip{number}": number for number in range(CLIPS)} | {"wrong": CLIPS}
    numbers |= {name: number for name, (number, _, _) in COPIES.items()}
    for row in rows:
        if row["clip_id"] not in numbers:
            continue
        coded = decoder.decode(ClipSpan(row["clip_id"], row["video_uri"], None, None)).coded
        assert coded is not None
        frames = frame_codec.decode_frames(coded, sampling.codec, sampling.size)
        chosen = choose_frames(len(frames), model.config.num_frames, "uniform")
        tokens = model.video_tokens(torch.from_numpy(frames[chosen])[None])
        states.append(model.qformer.encode_queries(tokens)[0])
        targets += [torch.eye(width)[numbers[row["clip_id"]]]] * len(states[-1])
    decoder.close()
    fit(model.video_proj, torch.cat(states), torch.stack(targets))
    text = model.tokenize([caption_of(number) for number in range(CLIPS)])
    encoded = model.qformer.encode_text(text.input_ids, text.attention_mask)[:, 0]
    fit(model.text_proj, encoded, torch.eye(width)[:CLIPS])
    return model


def fit(layer: torch.nn.Linear, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
    """Set a layer to the ridge regression of some outputs on inputs."""
    ones = torch.ones(len(inputs), 1, dtype=torch.float64)
    known = torch.cat([inputs.double(), ones], dim=1)
    small = 1e-6 * torch.eye(len(known), dtype=torch.float64)
    solved = known.T @ torch.linalg.solve(known @ known.T + small, outputs.double())
    layer.weight.copy_(solved[:-1].T.float())
    layer.bias.copy_(solved[-1].float())


def filtered(planted: Planted, folder: Path, **changes: Any) -> IngestConfig:
    filters = FilterConfig(near_duplicates=BITS, min_similarity=0.5, checkpoint=planted.checkpoint)
    manifest = folder / "manifest.parquet"
    if not manifest.exists():
        planted.manifest(manifest)
    values = {"filters": filters, "clips_per_shard": 4, "num_workers": 1, **changes}
    return tiny_ingest(str(manifest), str(folder / "clips"), **values)


def left_out(store: str) -> dict[str, str]:
    """Reason of each clip in quarantine."""
    rows = [
        row
        for path in sorted(Path(store, "quarantine").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    return {row["clip_id"]: row["reason"] for row in rows}


def messages(store: str) -> str:
    paths = sorted(Path(store, "quarantine").glob("*.parquet"))
    return " ".join(text for path in paths for text in pq.read_table(path)["message"].to_pylist())


@pytest.mark.ray
def test_planted_clips_are_found_and_no_others(
    ray_cluster: None, planted: Planted, tmp_path: Path
) -> None:
    config = filtered(planted, tmp_path)
    summary = run_ingest(config)
    store = summary["store"]
    assert left_out(store) == planted.expected
    assert summary["clips"] == len(planted.rows) - len(planted.expected)
    assert summary["reasons"] == {"low_similarity": 1, "near_duplicate": 3}
    first = min("encoded", "clip0", key=clip_hash)
    assert f"(clip {first})" in messages(store)
    assert "filters.min_similarity (cosine " in messages(store)
    assert all(word in Path(summary["report"]).read_text() for word in planted.expected.values())
    whole = digests(store)
    # As a kill leaves it in the middle of taking clips out: some shards written anew, some not.
    Path(store, "catalogue.json").unlink()
    again = run_ingest(config)
    assert (again["reasons"], digests(store)) == (summary["reasons"], whole)


@pytest.mark.ray
@pytest.mark.soak
def test_the_store_does_not_depend_on_the_workers(
    ray_cluster: None, planted: Planted, tmp_path: Path
) -> None:
    found = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        config = filtered(planted, folder, num_workers=workers)
        store = run_ingest(config)["store"]
        found.append(digests(store))
        assert run_ingest(replace(config, verify=True))["clips"] == 7
    assert found[0] == found[1]


@pytest.mark.ray
@pytest.mark.soak
def test_a_grown_store_leaves_out_the_clips_of_one_made_at_once(
    ray_cluster: None, planted: Planted, tmp_path: Path
) -> None:
    order = sorted((row["clip_id"] for row in planted.rows), key=clip_hash)
    for number, later in enumerate((tuple(order[:4]), tuple(order[5:]), ("wrong", "clip0"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        planted.manifest(folder / "manifest.parquet", later)
        config = filtered(planted, folder, allow_removals=True)
        store = run_ingest(config)["store"]
        planted.manifest(folder / "manifest.parquet")
        grown = run_ingest(replace(config, num_workers=2))
        assert (grown["store"], left_out(store)) == (store, planted.expected)
        planted.manifest(folder / "manifest.parquet", ("clip0", "clip1"))
        run_ingest(config)
        expected = dict(planted.expected)
        for name in ("encoded", "clip0", "brighter", "clip1"):
            expected.pop(name, None)
        assert left_out(store) == expected
        assert run_ingest(replace(config, verify=True))["clips"] == len(planted.rows) - 4


@pytest.mark.ray
@pytest.mark.soak
def test_other_captions_are_judged_anew_without_decoding(
    ray_cluster: None, planted: Planted, tmp_path: Path
) -> None:
    config = filtered(planted, tmp_path)
    store = run_ingest(config)["store"]
    swapped = [
        {**row, "captions": [caption_of(4 if row["clip_id"] == "clip3" else 3)]}
        if row["clip_id"] in ("clip3", "clip4")
        else row
        for row in planted.rows
    ]
    replace(planted, rows=swapped).manifest(tmp_path / "manifest.parquet")
    run_ingest(config)
    wrong = {"clip3": "low_similarity", "clip4": "low_similarity"}
    assert left_out(store) == planted.expected | wrong
    planted.manifest(tmp_path / "manifest.parquet")
    run_ingest(config)
    assert left_out(store) == planted.expected
    assert ClipStore(store).num_clips == len(planted.rows) - len(planted.expected)


@pytest.mark.ray
@pytest.mark.soak
def test_generated_captions_reach_a_filtered_store_whose_videos_are_gone(
    ray_cluster: None, planted: Planted, tmp_path: Path
) -> None:
    rows = []
    for one in planted.rows:
        uri = str(shutil.copyfile(one["video_uri"], tmp_path / f"{one['clip_id']}.mp4"))
        rows.append({**one, "video_uri": uri})
    copied = replace(planted, rows=rows)
    config = filtered(copied, tmp_path)
    store = run_ingest(config)["store"]
    for path in tmp_path.glob("*.mp4"):
        path.unlink()
    table = storage.read_table(config.manifest)
    changed = [{**one, "extras": '{"generated": {}}'} for one in table.to_pylist()]
    storage.write_table(config.manifest, table.from_pylist(changed, schema=table.schema))
    run_ingest(config)
    assert left_out(store) == planted.expected
    opened = ClipStore(store)
    assert opened.num_clips == len(rows) - len(planted.expected)
    for shard in range(len(opened.shard_sizes)):
        assert set(opened.read_shard(shard)["extras"].to_pylist()) <= {'{"generated": {}}'}


# Settings, without Ray.


def test_stores_without_the_new_filters_stay_the_same() -> None:
    before = {
        "min_short_side": 100, "min_duration_s": None, "max_duration_s": None,
        "min_caption_words": None, "max_caption_words": None,
        "unique_captions": False, "unique_videos": False,
    }  # fmt: skip
    assert recorded_filters(FilterConfig(min_short_side=100)) == before
    assert recorded_filters(FilterConfig(min_short_side=100, near_duplicates=4)) == {
        **before,
        "near_duplicates": 4,
    }
    config = IngestConfig(manifest="m", output="/o", filters=FilterConfig(min_short_side=100))
    # The name that the version before gave to this store.
    assert store_uri(config) == "/o/a24925635664"


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        ({"near_duplicates": 8}, "near_duplicates = 8: must not exceed 7 bits"),
        ({"near_duplicates": -1}, "near_duplicates = -1: must not be negative"),
        ({"min_similarity": 0.2}, "min_similarity = 0.2: needs a model; give its checkpoint"),
        ({"min_similarity": 2.0, "checkpoint": "c"}, r"min_similarity = 2.0: must lie in \[-1, 1"),
        ({"checkpoint": "c"}, "checkpoint = 'c': is only used with filters.min_similarity"),
    ],
)
def test_filters_out_of_range_are_named(filters: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        FilterConfig(**filters)


@pytest.mark.slow
def test_a_model_that_does_not_suit_the_store_is_refused(planted: Planted, tmp_path: Path) -> None:
    config = filtered(planted, tmp_path)
    for sampling in (replace(config.sampling, size=32), replace(config.sampling, num_frames=2)):
        with pytest.raises(SettingError, match=r"filters\.checkpoint: .* takes 6 frames of 64 pi"):
            plan_ingest(replace(config, sampling=sampling))
    nowhere = replace(config.filters, checkpoint=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="has no COMPLETE marker"):
        plan_ingest(replace(config, filters=nowhere))


@pytest.mark.slow
def test_a_store_is_that_of_the_weights_and_not_of_their_place(
    planted: Planted, tmp_path: Path
) -> None:
    config = filtered(planted, tmp_path)
    store = plan_ingest(config).store

    def of(checkpoint: Path) -> IngestConfig:
        return replace(config, filters=replace(config.filters, checkpoint=str(checkpoint)))

    moved = Path(shutil.copytree(planted.checkpoint, tmp_path / "moved"))
    plan = claim_store(plan_ingest(of(moved)))
    assert plan.store == store
    record = storage.read_json(str(Path(store) / "store.json"))
    assert record["filters"]["weights"] == checkpoints.weights_digest(planted.checkpoint)
    assert str(moved) not in str(record)
    # As a finished shard leaves it; otherwise the store would begin anew.
    (Path(store) / "shards").mkdir()
    (Path(store) / "shards" / "00000.json").write_text("{}")
    assert claim_store(plan_ingest(config)).store == store
    # A store can be verified after its model has gone.
    shutil.rmtree(moved)
    verified = replace(of(moved), verify=True)
    assert claim_store(plan_ingest(verified)).store == store
    with pytest.raises(CheckpointError, match="has no COMPLETE marker"):
        plan_ingest(of(moved))
    # Other weights make another store.
    other = Path(shutil.copytree(planted.checkpoint, tmp_path / "other"))
    tensors = load_file(other / checkpoints.WEIGHTS)
    save_file({name: values + 1 for name, values in tensors.items()}, other / checkpoints.WEIGHTS)
    plan = claim_store(plan_ingest(of(other)))
    assert plan.store != store
    with pytest.raises(ClipStoreError, match=r"moved is gone, and 2 stores in .* differ only in"):
        plan_ingest(verified)
