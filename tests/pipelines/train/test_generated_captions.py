"""Training on captions that a model wrote: which are used, and what is refused."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.artifacts.generated_captions import CaptionChoice, with_generated
from pipelines.artifacts.manifest import whole_videos_table
from pipelines.artifacts.vocabulary import open_tokenizer
from pipelines.common import storage
from pipelines.feed.loader import ClipLoader
from pipelines.feed.opening import hold_out, open_sources
from pipelines.train import recipes, run_folder, validation
from pipelines.train.config import TrainConfig
from pipelines.train.preflight import check_data
from pipelines.video.config import SamplingConfig
from stgt.errors import CheckpointError, ClipStoreError, SettingError
from tests.helpers.models import WORDS, small_tokenizer
from tests.helpers.stores import write_store
from tests.helpers.training import begun

RED, BLUE, BALL, SQUARE, MOVES, LEFT = WORDS[1:7]


def generated(*captions: str) -> str:
    return with_generated("{}", captions, {"name": "m"}, {"method": "beam"})


ROWS: list[dict[str, Any]] = [
    {"clip_id": "a", "captions": [RED, BLUE], "extras": generated(BALL)},
    {"clip_id": "b", "captions": [RED], "extras": generated(RED, MOVES)},
    {"clip_id": "c", "captions": [], "extras": generated(SQUARE, LEFT)},
    {"clip_id": "d", "captions": [BLUE], "extras": "{}"},
]
EXPECTED: dict[CaptionChoice, dict[str, list[str]]] = {
    "generated": {"a": [BALL], "b": [RED, MOVES], "c": [SQUARE, LEFT]},
    "both": {"a": [RED, BLUE, BALL], "b": [RED, MOVES], "c": [SQUARE, LEFT], "d": [BLUE]},
}
SAMPLING = SamplingConfig(num_frames=6, size=64)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A training on a store of four clips in two shards."""
    small_tokenizer(tmp_path)
    store = write_store(tmp_path / "store", SAMPLING, [ROWS[:3], ROWS[3:]])
    output, vocab = str(tmp_path / "run"), str(tmp_path / "words.txt")
    recipe = recipes.pretrain_stage1_tiny((store,), output, vocab)
    return replace(recipe, global_batch=2, num_workers=1, num_frames=6, captions="both")


def used_in_an_epoch(config: TrainConfig, samples: int) -> Counter[tuple[str, str]]:
    """Clip and caption of each sample of the first epoch."""
    batch = ClipLoader(config.loader)({"id": np.arange(samples)})
    assert set(batch["error"]) == {b""}
    tokenizer: Any = open_tokenizer(config.vocab)
    words = tokenizer.entries()
    texts = [words[ids[1]] for ids in batch["input_ids"]]
    return Counter(zip(batch["clip_id"].tolist(), texts, strict=True))


@pytest.mark.parametrize("choice", ["generated", "both"])
def test_an_epoch_uses_each_chosen_caption_once(
    config: TrainConfig, choice: CaptionChoice, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(config, captions=choice)
    with caplog.at_level(logging.WARNING):
        plan = check_data(config).plan
    expected = [(clip, text) for clip, texts in EXPECTED[choice].items() for text in texts]
    assert plan.num_samples == len(expected)
    assert used_in_an_epoch(config, len(expected)) == Counter(expected)
    left_out = "1 of the 4 clips to train on have no caption and are not used"
    assert (left_out in caplog.text) == (choice == "generated")


def test_original_captions_are_the_default_and_clips_without_are_refused(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, captions="original")
    assert recipes.pretrain_stage1_tiny(("x",), "y", "z").captions == "original"
    with pytest.raises(ClipStoreError, match=r"1 clips without a caption.*jobs\.caption"):
        check_data(config)
    store = write_store(tmp_path / "captioned", SAMPLING, [[ROWS[0], ROWS[1], ROWS[3]]])
    config = replace(config, data=(store,))
    assert check_data(config).plan.num_samples == 4
    expected = [("a", RED), ("a", BLUE), ("b", RED), ("d", BLUE)]
    assert used_in_an_epoch(config, 4) == Counter(expected)


@pytest.mark.parametrize("choice", ["generated", "both"])
def test_data_without_generated_captions_are_refused(
    config: TrainConfig, tmp_path: Path, choice: CaptionChoice
) -> None:
    without = write_store(tmp_path / "without", SAMPLING, [[{**ROWS[3], "clip_id": "e"}] * 2])
    alone = replace(config, data=(without,), captions=choice)
    with pytest.raises(ClipStoreError, match=r"no clip has generated captions.*jobs\.caption"):
        check_data(alone)
    together = replace(config, data=(config.data[0], without), captions=choice)
    if choice == "both":
        assert check_data(together).plan.num_samples == 10
    else:
        with pytest.raises(ClipStoreError, match=f"{without}: no clip has generated captions"):
            check_data(together)


def test_an_epoch_of_clips_needs_a_caption_of_every_clip(config: TrainConfig) -> None:
    clips = replace(config, epoch_unit="clips")
    assert check_data(clips).plan.num_samples == 4
    with pytest.raises(ClipStoreError, match="1 of 4 clips have no caption for --captions gen"):
        check_data(replace(clips, captions="generated"))


def test_captions_of_a_manifest_are_chosen_as_those_of_a_store(
    config: TrainConfig, tmp_path: Path
) -> None:
    names = {row["clip_id"]: f"/{row['clip_id']}.mp4" for row in ROWS}
    table = whole_videos_table(names, names, "test")
    by_id = {row["clip_id"]: row for row in ROWS}
    rows = [{**row, **by_id[row["clip_id"]]} for row in table.to_pylist()]
    manifest = str(tmp_path / "m.parquet")
    storage.write_table(manifest, table.from_pylist(rows, schema=table.schema))
    loader = replace(config, data=(manifest,)).loader
    (source,) = open_sources(loader)
    assert source.captions_per_shard() == [[4, 3, 1]]
    found = {clip["clip_id"]: clip["captions"] for clip in source.clips(0, range(4))}
    assert found == EXPECTED["both"]


def test_held_out_clips_are_validated_with_the_chosen_captions(config: TrainConfig) -> None:
    held = replace(config, hold_out=2, captions="generated", val_clips=4)
    original = replace(held, captions="original")
    measured, before = validation.measured_on(held), validation.measured_on(original)
    assert "first of the generated captions" in measured["protocol"]
    assert "first caption" in before["protocol"]
    assert measured["content"] != before["content"]


def test_another_choice_is_another_run(config: TrainConfig) -> None:
    original = replace(config, captions="original")
    run_folder.claim(original, "digest")
    begun(original)
    record = storage.read_json(storage.join(config.output, "config.json"))
    record.pop("captions")  # as an earlier version wrote it
    storage.write_json(storage.join(config.output, "config.json"), record)
    run_folder.claim(original, "digest")
    with pytest.raises(CheckpointError, match="captions: 'original' -> 'both'"):
        run_folder.claim(config, "digest")


def test_questions_take_the_place_of_captions(config: TrainConfig) -> None:
    with pytest.raises(SettingError, match="must be original with questions"):
        replace(config, questions="q.parquet", answers="a.json")


def manifest_of(path: Path, captioned: set[int]) -> str:
    """Write a manifest of 60 clips, of which only some have a caption."""
    names = {f"{number:02d}": f"/{number:02d}.mp4" for number in range(60)}
    table = whole_videos_table(names, names, "test")
    rows = table.to_pylist()
    for place, row in enumerate(rows):
        row["captions"] = [RED] if place in captioned else []
    storage.write_table(str(path), table.from_pylist(rows, schema=table.schema))
    return str(path)


def test_clips_without_captions_are_not_validated(config: TrainConfig, tmp_path: Path) -> None:
    whole = manifest_of(tmp_path / "whole.parquet", set(range(60)))
    held = replace(config, data=(whole,), captions="original", hold_out=6, val_clips=4)
    (source,) = open_sources(held.loader)
    rows = hold_out([source], held.loader).rows[0]
    assert len(rows) == 6
    others = [row for row in range(60) if row not in rows]
    one, three = {int(rows[0]), *others[:9]}, {*rows[3:].tolist(), *others[:9]}

    lacking = manifest_of(tmp_path / "lacking.parquet", one)
    said = "hold_out = 6: 1 of the 6 held-out clips has a caption, and validation needs at least 2"
    with pytest.raises(SettingError, match=f"{said}.*jobs.caption"):
        check_data(replace(held, data=(lacking,)))

    enough = replace(held, data=(manifest_of(tmp_path / "enough.parquet", three),))
    assert check_data(enough).plan.num_samples == 9
    assert validation.measured_on(enough)["clips"] == 3
    assert validation.measured_on(replace(enough, val_clips=2))["clips"] == 2
    assert validation.measured_on(held)["clips"] == 4
