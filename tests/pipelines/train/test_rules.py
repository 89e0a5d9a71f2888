"""What a run counts, holds out, compares and continues with, without Ray."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs.config_file import read_config_file
from jobs.train import JOB
from pipelines.artifacts.checkpoints import COMPLETE, require
from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.locations import find_checkpoint
from pipelines.artifacts.manifest import SCHEMA, clip_hash
from pipelines.common import ray_errors, storage
from pipelines.feed.loader import ClipLoader
from pipelines.train import metrics_log, preflight, recipes, run_folder, validation
from pipelines.train.config import TrainConfig
from pipelines.train.estimate import Estimate, MeasuredProgress, announce_plan
from pipelines.train.state import WorkerState
from pipelines.train.step import train_step
from pipelines.train.stopping import EndOnExplained
from stgt.config import LabelSmoothing, LossWeights
from stgt.errors import CheckpointError, ClipStoreError, SettingError
from stgt.inputs.tokenizer import Tokenizer
from stgt.training.objective import TrainingObjective
from tests.helpers.data import TinyData
from tests.helpers.training import begun, resolved

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d"]
EARLIER = {
    "epoch_unit": "clips",
    "hold_out_by": "clip",
    "negatives": "published",
    "metric_names": 1,
}


@pytest.fixture
def vocab(tmp_path: Path) -> str:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return str(path)


def manifest(path: Path, captions: dict[str, list[str]], spans: int = 1) -> str:
    """Write a manifest of videos that do not exist, each with some captions and spans."""
    rows = [
        {
            "clip_hash": clip_hash(f"{video}#{number}"),
            "clip_id": f"{video}#{number}",
            "video_id": video,
            "video_uri": f"/nowhere/{video}.mp4",
            "start_s": float(number),
            "end_s": float(number + 1),
            "captions": texts,
            "split": "train",
            "source": "test",
            "extras": "{}",
        }
        for video, texts in captions.items()
        for number in range(spans)
    ]
    rows.sort(key=lambda row: row["clip_hash"])
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return str(path)


def config_of(data: str, output: Path, vocab: str, **changes: object) -> TrainConfig:
    recipe = recipes.pretrain_stage1_tiny((data,), str(output), vocab)
    return replace(recipe, **{"global_batch": 4, "num_workers": 1, **changes})  # type: ignore[arg-type]


CAPTIONS = {f"video{n}": ["a", "b", "c", "d"][: 1 + n % 4] for n in range(12)}
NUM_CAPTIONS = sum(map(len, CAPTIONS.values()))


@pytest.fixture
def captions(tmp_path: Path) -> str:
    return manifest(tmp_path / "captions.parquet", CAPTIONS)


def used(config: TrainConfig, epoch: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return the clip and the tokens of the text of each sample of an epoch."""

    class NoFrames:
        def __init__(self, *settings: object) -> None:
            pass

        def decode(self, span: object) -> object:
            class Decoded:
                frames = np.zeros((6, 64, 64, 3), np.uint8)

            return Decoded()

        def close(self) -> None:
            pass

    monkeypatch.setattr("pipelines.video.decoder.ClipDecoder", NoFrames)
    data = preflight.check_data(config)
    first = epoch * data.plan.num_samples
    batch = ClipLoader(config.loader)({"id": np.arange(first, first + data.plan.num_samples)})
    assert set(batch["fault"]) == {""}
    return list(zip(batch["clip_id"], map(str, batch["input_ids"][:, 1].tolist()), strict=True))


def test_an_epoch_uses_every_caption_of_every_clip_once(
    captions: str, vocab: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(captions, tmp_path / "run", vocab)
    expected = {
        (f"{video}#0", str(WORDS.index(text)))
        for video, texts in CAPTIONS.items()
        for text in texts
    }
    orders = []
    for epoch in range(2):
        samples = used(config, epoch, monkeypatch)
        assert len(samples) == len(expected) == NUM_CAPTIONS
        assert set(samples) == expected
        first_pass = [clip for clip, _ in samples[: len(CAPTIONS)]]
        assert len(set(first_pass)) == len(CAPTIONS)  # no clip repeats within a pass
        orders.append(samples)
    assert orders[0] != orders[1]
    assert used(config, 0, monkeypatch) == orders[0]


def test_epochs_of_clips_use_each_clip_once(
    captions: str, vocab: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(captions, tmp_path / "run", vocab, epoch_unit="clips")
    samples = used(config, 0, monkeypatch)
    assert Counter(clip for clip, _ in samples) == Counter({f"{v}#0": 1 for v in CAPTIONS})


def test_the_plan_is_announced_in_captions(
    captions: str, vocab: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(captions, tmp_path / "run", vocab, epochs=8)
    plan = preflight.check_data(config).plan
    config = replace(config, steps=config.steps_for(plan.num_samples))
    assert config.steps == 8 * NUM_CAPTIONS / 4
    with caplog.at_level(logging.INFO):
        announce_plan(config, plan)
    assert f"8 epochs of {NUM_CAPTIONS} captions of 12 clips" in caplog.text


def test_whole_videos_are_held_out_and_listed(
    vocab: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = manifest(tmp_path / "spans.parquet", {f"v{n}": ["a"] for n in range(10)}, spans=3)
    config = config_of(data, tmp_path / "run", vocab, hold_out=4)
    found = preflight.check_data(config)
    assert (found.held_out.num_clips, found.plan.num_clips) == (6, 24)
    out = set(found.held_out.videos)
    assert out == set(sorted((f"v{n}" for n in range(10)), key=clip_hash)[:2])
    trained = {clip.partition("#")[0] for clip, _ in used(config, 0, monkeypatch)}
    assert not out & trained
    assert len(trained) == 8


def test_earlier_runs_hold_out_their_last_clips(vocab: str, tmp_path: Path) -> None:
    data = manifest(tmp_path / "spans.parquet", {f"v{n}": ["a"] for n in range(10)}, spans=3)
    config = config_of(data, tmp_path / "run", vocab, hold_out=4, hold_out_by="clip")
    assert preflight.check_data(config).held_out.places() == [(0, row) for row in range(26, 30)]


def test_a_run_of_an_earlier_version_continues_under_its_rules(
    captions: str, vocab: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = resolved(config_of(captions, tmp_path / "run", vocab, hold_out=2))
    digest = preflight.check_data(config).digest
    run_folder.claim(replace(config, **EARLIER), digest)  # type: ignore[arg-type]
    begun(config)
    path = tmp_path / "run" / "config.json"
    record = json.loads(path.read_text())
    for name in EARLIER:
        del record[name]
    path.write_text(json.dumps(record))

    with caplog.at_level(logging.INFO):
        continued = run_folder.with_earlier_rules(config)
    assert {name: getattr(continued, name) for name in EARLIER} == EARLIER
    assert "was begun by an earlier version" in caplog.text
    run_folder.claim(continued, digest)  # the same run
    # Its config file gives the same rules in another folder.
    path.write_text(json.dumps(record))
    again = read_config_file(path, "train", JOB.command_line)
    assert {name: getattr(again, name) for name in EARLIER} == EARLIER
    # New rules in this folder are a change of settings.
    with pytest.raises(CheckpointError, match="epoch_unit: 'clips' -> 'captions'"):
        run_folder.claim(replace(continued, epoch_unit="captions"), digest)


@pytest.mark.parametrize(
    ("name", "recorded", "other", "refusals"),
    [
        (
            "label_smoothing",
            {"contrastive": None, "matching": 0.0, "caption": 0.1},
            LabelSmoothing(contrastive=0.2, caption=0.0),
            ("contrastive: None -> 0.2", "caption: 0.1 -> 0.0"),
        ),
        (
            "loss_weights",
            {"contrastive": 1.0, "matching": 1.0, "caption": 1.0},
            LossWeights(matching=8.0),
            ("matching: 1.0 -> 8.0",),
        ),
    ],
)
def test_a_run_that_did_not_record_a_group_of_settings_continues_with_the_published_values(
    captions: str,
    vocab: str,
    tmp_path: Path,
    name: str,
    recorded: dict[str, float | None],
    other: LabelSmoothing | LossWeights,
    refusals: tuple[str, ...],
) -> None:
    config = resolved(config_of(captions, tmp_path / "run", vocab, hold_out=2))
    digest = preflight.check_data(config).digest
    run_folder.claim(config, digest)
    begun(config)
    path = tmp_path / "run" / "config.json"
    record = json.loads(path.read_text())
    assert record.pop(name) == recorded
    path.write_text(json.dumps(record))

    continued = run_folder.with_earlier_rules(config)
    assert continued == config
    run_folder.claim(continued, digest)  # the same run
    path.write_text(json.dumps(record))
    again = read_config_file(path, "train", JOB.command_line)
    assert getattr(again, name) == type(other)()
    # Other values are a change of settings.
    changed = replace(config, **{name: other})
    with pytest.raises(CheckpointError) as refused:
        run_folder.claim(run_folder.with_earlier_rules(changed), digest)
    for refusal in refusals:
        assert f"{name}.{refusal}" in str(refused.value)


def row(step: int, value: float, clips: int, content: str = "a") -> metrics_log.StepRecord:
    return {
        "step": step,
        "time_ms": 0,
        "metrics": {"val/t2v/R1": value},
        "measured_on": {"clips": clips, "content": content, "protocol": "cosine"},
    }


def test_the_best_checkpoint_is_chosen_among_values_of_the_same_clips(
    vocab: str, captions: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(captions, tmp_path / "run", vocab, hold_out=2)
    assert run_folder.record_if_best(config, row(10, 100.0, 2)) is None
    message = run_folder.record_if_best(config, row(20, 48.6, 105, "b"))
    assert message is not None
    assert "step 10 with val/t2v/R1 100.0, was measured on 2 clips" in message
    assert "now uses 105 clips" in message
    assert run_folder.best(config.output)["step"] == 20  # type: ignore[index]
    assert run_folder.record_if_best(config, row(30, 48.0, 105, "b")) is None
    assert run_folder.record_if_best(config, row(40, 50.0, 105, "b")) is None
    assert run_folder.best(config.output)["step"] == 40  # type: ignore[index]


def test_the_best_of_an_earlier_version_stays_comparable(
    vocab: str, captions: str, tmp_path: Path
) -> None:
    config = config_of(captions, tmp_path / "run", vocab, hold_out=2)
    earlier = {"step": 10, "metric": "val/t2v/R1", "value": 60.0}
    storage.write_json(f"{config.output}/best.json", earlier)
    assert run_folder.record_if_best(config, row(20, 50.0, 105)) is None
    assert run_folder.best(config.output) == earlier


def test_the_last_checkpoint_can_be_the_result(vocab: str, captions: str, tmp_path: Path) -> None:
    config = config_of(captions, tmp_path / "run", vocab, hold_out=2, select_on="last")
    assert run_folder.record_if_best(config, row(10, 100.0, 2)) is None
    assert run_folder.best(config.output) is None


def test_a_data_set_smaller_than_its_share_of_a_batch_is_reported(
    vocab: str, captions: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = manifest(tmp_path / "few.parquet", {"x": ["a"], "y": ["b"]})
    config = config_of(captions, tmp_path / "run", vocab, global_batch=8)
    config = replace(config, data=(captions, few), mix=(1, 1))
    preflight.report_repeated_clips(config, preflight.check_data(config).plan)
    assert (
        f"{few} has 2 clips to train on, but each batch of 8 takes approximately 4" in caplog.text
    )
    assert captions not in caplog.text


def test_validation_videos_that_are_trained_on_are_reported(
    vocab: str, captions: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = manifest(tmp_path / "more.parquet", {"video0": ["a"], "video1": ["a"], "new": ["b"]})
    config = config_of(captions, tmp_path / "run", vocab, hold_out=6)
    config = replace(config, data=(captions, more))
    data = preflight.check_data(config)
    shared = len({"video0", "video1"} & set(data.held_out.videos))
    preflight.report_shared_videos(config, data)
    assert (
        f"{shared} of the 6 videos of the held-out clips are also in {more}" in caplog.text
    ) == (shared > 0)
    alone = replace(config, data=(captions,))
    caplog.clear()
    preflight.report_shared_videos(alone, preflight.check_data(alone))
    assert caplog.text == ""


def test_a_batch_with_fewer_than_two_readable_clips_names_them(
    vocab: str, captions: str, tmp_path: Path
) -> None:
    config = resolved(config_of(captions, tmp_path / "run", vocab))
    state = WorkerState(config, torch.device("cpu"))
    objective = TrainingObjective(state.model, config.targets)
    batch = ClipLoader(config.loader)({"id": np.arange(config.global_batch)})
    assert all(batch["fault"])  # none of the videos exists
    with pytest.raises(ClipStoreError, match=r"step 1: 4 of its 4 clips could not be used") as one:
        train_step(state, objective, batch, 1e-4, config, 0, torch.device("cpu"))
    assert batch["clip_id"][0] in str(one.value)


def test_the_estimate_is_corrected_by_the_first_steps(
    vocab: str,
    captions: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = config_of(captions, tmp_path / "run", vocab, steps=100)
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("pipelines.train.estimate.time", clock)
    progress = MeasuredProgress(config, 0, Estimate(seconds=51))
    with caplog.at_level(logging.INFO):
        for step in range(1, 8):
            now[0] = 2.22 * step
            progress.reach(step)
    measured = [line for line in caplog.messages if line.startswith("measured")]
    assert measured == [
        "measured 2.22 s per step over 3 steps, so the training takes approximately 3 m 42 s in "
        "all, without the start (estimated before: 51 s)"
    ]


def test_keys_of_clips_depend_on_video_and_span(vocab: str, tmp_path: Path) -> None:
    data = manifest(tmp_path / "spans.parquet", {"v": ["a"], "w": ["a"]}, spans=2)
    config = config_of(data, tmp_path / "run", vocab)
    twice = replace(config, data=(data, data))
    batch = ClipLoader(twice.loader)({"id": np.arange(8)})
    keys = dict(zip(batch["clip_id"], batch["clip_key"].tolist(), strict=True))
    assert len(set(keys.values())) == 4
    assert sorted(Counter(batch["clip_key"].tolist()).values()) == [2, 2, 2, 2]


def test_a_store_that_a_data_worker_cannot_reach_ends_the_run_with_its_message(
    vocab: str, captions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with new starts of the data worker, since storage has tried many times already."""
    config = config_of(captions, tmp_path / "run", vocab)
    away = storage.UnreachableError("s3://bucket/clips could not be reached in 20 attempts")

    def unreachable(*settings: object) -> None:
        raise away

    monkeypatch.setattr("pipelines.feed.loader.open_sources", unreachable)
    batch = ClipLoader(config.loader)({"id": np.arange(4)})
    with pytest.raises(storage.UnreachableError, match="could not be reached in 20") as caught:
        ray_errors.raise_packed(batch["error"][0])
    with pytest.raises(storage.UnreachableError, match="could not be reached in 20"):
        EndOnExplained().after_exception(None, {0: caught.value})


def test_a_connection_that_breaks_does_not_end_the_run() -> None:
    """The worker group starts again, as after a lost worker."""
    assert EndOnExplained().after_exception(None, {0: ConnectionError("reset by peer")}) is None


def test_the_best_of_an_earlier_choice_does_not_stand_for_a_run_that_takes_the_last(
    vocab: str, captions: str, tmp_path: Path
) -> None:
    config = config_of(captions, tmp_path / "run", vocab, hold_out=2)
    for step in (10, 20):
        complete = Path(run_folder.checkpoint_uri(config.output, step)) / COMPLETE
        complete.parent.mkdir(parents=True)
        complete.touch()
    run_folder.record_if_best(config, row(10, 90.0, 2))
    assert find_checkpoint(config.output).endswith("step-00000010")
    run_folder.record_best(replace(config, select_on="last"))
    assert find_checkpoint(config.output).endswith("step-00000020")


@pytest.mark.parametrize("changes", [{"hold_out": 1}, {"hold_out": 2, "val_clips": 1}])
def test_too_few_validation_clips_are_refused_before_the_start(
    vocab: str, captions: str, tmp_path: Path, changes: dict[str, object]
) -> None:
    config = config_of(captions, tmp_path / "run", vocab, **changes)
    with pytest.raises(SettingError, match="validation needs at least 2 clips"):
        preflight.check_data(config)


def test_clips_without_captions_are_reported(
    vocab: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = manifest(tmp_path / "some.parquet", {f"v{n}": ["a"] * (n % 3) for n in range(12)})
    plan = preflight.check_data(config_of(data, tmp_path / "run", vocab)).plan
    assert (plan.num_clips, plan.num_samples) == (8, 12)
    assert "4 of the 12 clips to train on have no caption and are not used" in caplog.text


def test_a_data_worker_does_not_read_the_captions_of_a_whole_manifest(
    vocab: str, captions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(captions, tmp_path / "run", vocab)
    plan = preflight.check_data(config).plan
    loader = ClipLoader(config.loader, plan=plan)

    def whole(self: object) -> None:
        raise AssertionError("it read the captions of all rows")

    monkeypatch.setattr("pipelines.artifacts.manifest.ManifestRows.caption_counts", whole)
    assert len(loader({"id": np.arange(NUM_CAPTIONS)})["clip_id"]) == NUM_CAPTIONS


@pytest.mark.ray
def test_held_out_clips_cost_their_rows_and_not_whole_shards(
    vocab: str, tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are a few rows of many shards."""
    config = config_of(tiny_data.train_store, tmp_path / "run", tiny_data.vocab, hold_out=4)
    whole: list[object] = []
    read = ClipStore.read_shard

    def noted(self: ClipStore, index: int, columns: list[str] | None = None) -> pa.Table:
        if columns is None or "frames" in columns:
            whole.append(index)
        return read(self, index, columns)

    monkeypatch.setattr(ClipStore, "read_shard", noted)
    preflight.check_data(config)
    state = WorkerState(preflight.with_vocabulary(config), torch.device("cpu"))
    found = validation.validate(
        state.model, Tokenizer(tiny_data.vocab), config, torch.device("cpu")
    )
    assert "val/t2v/R1" in found
    assert whole == []


def test_a_run_of_a_recipe_with_another_warm_up_keeps_it(
    vocab: str, captions: str, tmp_path: Path
) -> None:
    """Fine-tuning had 200 steps of warm-up before it had none, as published."""
    now = replace(
        recipes.finetune_msrvtt((captions,), str(tmp_path / "run"), "", vocab), init_from=None
    )
    assert now.optim.warmup_steps == 0
    before = replace(now, **EARLIER, optim=replace(now.optim, warmup_steps=200))  # type: ignore[arg-type]
    run_folder.claim(before, "digest")
    begun(before)
    continued = run_folder.with_earlier_rules(now)
    assert continued.optim.warmup_steps == 200
    run_folder.claim(continued, "digest")  # the same run
    # A number that was asked for is a change.
    asked = replace(now, optim=replace(now.optim, warmup_steps=7))
    with pytest.raises(CheckpointError, match=r"optim\.warmup_steps: 200 -> 7"):
        run_folder.claim(run_folder.with_earlier_rules(asked), "digest")


def before_muon(config: TrainConfig) -> TrainConfig:
    """A run of a tiny recipe with questions, as earlier versions began it."""
    return replace(
        config, steps=800, global_batch=64, optim=replace(config.optim, optimizer="adamw", lr=1e-3)
    )


@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_run_of_a_tiny_recipe_with_questions_keeps_its_steps_and_optimizer(
    vocab: str, captions: str, tmp_path: Path, is_recorded: bool
) -> None:
    data, output = (captions,), str(tmp_path / "run")
    now = replace(
        recipes.RECIPES["qa_msrvtt_stgt_tiny"](data, output, "", vocab),
        init_from=None,
        questions=None,
        answers=None,
        select_metric="t2v/R1",
    )
    before = before_muon(now)
    run_folder.claim(before, "digest")
    begun(before)
    if not is_recorded:  # versions before Muon did not record the optimizer
        path = tmp_path / "run" / "config.json"
        record = json.loads(path.read_text())
        del record["optim"]["optimizer"]
        path.write_text(json.dumps(record))
    continued = run_folder.with_earlier_rules(now)
    assert continued == before
    # Trials have the values that their sweep gives them.
    assert run_folder.with_earlier_rules(now, keep_recipe=False).steps == now.steps
    run_folder.claim(continued, "digest")  # the same run
    asked = replace(now, steps=7)
    with pytest.raises(CheckpointError, match=r"steps: 800 -> 7"):
        run_folder.claim(run_folder.with_earlier_rules(asked), "digest")


def test_a_folder_with_the_name_of_a_vocabulary_does_not_replace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bert-base-uncased").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = recipes.pretrain_stage1_tiny(("s3://bucket/clips.parquet",), str(tmp_path / "run"))
    assert recipe.vocab == "bert-base-uncased"
    assert preflight.with_absolute_paths(recipe).vocab == "bert-base-uncased"


def test_an_interrupted_checkpoint_is_no_model_of_others(tmp_path: Path) -> None:
    for name, files in (
        ("step-00000008", ("config.json", "model.safetensors")),
        ("copied", ("config.json", "model.safetensors", "optimizer.safetensors")),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file in files:
            (folder / file).write_text('{"model": {}}')
        with pytest.raises(CheckpointError, match="has no COMPLETE marker"):
            require(str(folder))
