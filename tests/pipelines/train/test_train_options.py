"""Training from other sources, to other places, under other settings, on a real Ray."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import simplejpeg
import torch
from mlflow import MlflowClient

from pipelines.artifacts import checkpoints
from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.manifest import whole_videos_table
from pipelines.common import storage, waiting
from pipelines.common.config import TrackingConfig
from pipelines.feed.loader import ClipLoader
from pipelines.ingest.run import run_ingest
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.run import run_manifest
from pipelines.train import metrics_log, recipes, run_folder
from pipelines.train.config import TrainConfig
from pipelines.train.preflight import check_data
from pipelines.train.run import run_train
from pipelines.train.state import WorkerState
from pipelines.train.step import train_step
from pipelines.train.worker import build_objective
from stgt.config import AugmentConfig, LossWeights, Precision
from stgt.errors import (
    CheckpointError,
    ClipStoreError,
    DataStallError,
    NonFiniteLossError,
    OutOfMemoryError,
    SettingError,
    STGTError,
)
from stgt.model import STGT
from stgt.training.objective import TrainingObjective
from tests.helpers.compilation import compile_with
from tests.helpers.data import TinyData, tiny_ingest
from tests.helpers.faulty_s3 import FaultyS3
from tests.helpers.kills import processes_seen
from tests.helpers.training import begun, resolved, tiny_train

LR = 1e-5
"""Small: the first steps from random weights magnify rounding."""

pytestmark = pytest.mark.ray


def rows_of(config: TrainConfig) -> dict[int, dict[str, float]]:
    last = run_folder.latest(config.output)
    assert last is not None
    return {
        row["step"]: row["metrics"]
        for step in range(1, last + 1)
        for row in metrics_log.read(config.output, step)
    }


@pytest.mark.slow
def test_videos_decoded_on_the_fly_in_passes_with_clips_held_out(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    """Forty rows of a manifest, one of them a damaged file; four are held out and validate."""
    config = tiny_train(
        tiny_data,
        tmp_path / "run",
        data=(tiny_data.train_manifest,),
        val_store=None,
        hold_out=4,
        global_batch=12,
        block_clips=None,
        micro_batch=4,
        steps=4,
        checkpoint_every=1,
        keep_checkpoints=1,
        select_metric="t2v/R10",
        record_samples=True,
        precision="bf16",
    )
    summary = run_train(config)
    rows = rows_of(config)
    assert sorted(rows) == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss/total"]) for row in rows.values())
    # The best is kept beside the latest.
    values = {step: row["val/t2v/R10"] for step, row in rows.items()}
    best = max(sorted(values), key=lambda step: values[step])
    assert run_folder.complete_steps(config.output) == sorted({best, 4})
    assert summary["best_checkpoint"] == run_folder.checkpoint_uri(config.output, best)
    used = [
        row
        for path in sorted((tmp_path / "run" / "samples").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    assert [row["position"] for row in used] == list(range(48))
    assert len({row["clip_id"] for row in used[:36]}) == 36  # an epoch is what is not held out
    faults = {row["clip_id"]: row["fault"] for row in used if row["fault"]}
    assert len(faults) == 1
    assert next(iter(faults.values())).startswith(("empty", "not_a_video"))
    told = [json.loads(path.read_text()) for path in (tmp_path / "run/skipped").glob("*.json")]
    assert {one["clip_id"] for rows in told for one in rows} == set(faults)
    assert rows[4]["samples/skipped"] == sum(map(len, told)) >= 1


@pytest.mark.slow
def test_a_run_on_s3_whose_mlflow_is_away(
    s3: FaultyS3,
    tiny_data: TinyData,
    mlflow_away: TrackingConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = replace(
        tiny_train(tiny_data, tmp_path / "run", steps=4, val_store=None, num_workers=1),
        output="s3://bucket/run",
        tracking=mlflow_away,
    )
    s3.fail(0.05)
    try:
        summary = run_train(config)
    finally:
        s3.fail(0.0)
    assert summary["run_id"] is None
    assert run_folder.complete_steps(config.output) == [2, 4]
    assert "training continues; its metrics are kept in s3://bucket/run/metrics" in caplog.text
    model, _ = checkpoints.load(summary["checkpoint"])
    assert model.config.num_frames == config.num_frames
    # Where MLflow is again, the same command sends what is left.
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    again = run_train(replace(config, tracking=tracking))
    assert again["run_id"] is not None
    client = MlflowClient(tracking_uri=tracking.uri)
    points = client.get_metric_history(again["run_id"], "loss/total")
    assert [(point.step, point.value) for point in points] == [
        (step, row["loss/total"]) for step, row in sorted(rows_of(config).items())
    ]
    assert client.get_run(again["run_id"]).info.status == "FINISHED"


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_at_once(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    config = resolved(tiny_train(tiny_data, tmp_path / "run", val_store=None))
    state = WorkerState(config, torch.device("cpu"))
    torch.nn.init.constant_(state.model.text_proj.weight, float("inf"))
    from stgt.inputs.tokenizer import Tokenizer

    broken = str(tmp_path / "broken")
    checkpoints.save(broken, state.model, Tokenizer(tiny_data.vocab), step=0)
    with (
        processes_seen("RayTrainWorker") as seen,
        pytest.raises(NonFiniteLossError, match="not finite at step 0") as caught,
    ):
        run_train(replace(config, init_from=broken))
    assert len(set(caught.value.clip_ids)) == config.global_batch
    # More attempts would have started others.
    assert len(seen) == config.num_workers == 2
    assert run_folder.latest(config.output) is None


@pytest.mark.slow
def test_a_cache_folder_that_cannot_be_made_ends_the_run_in_one_sentence(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    cache = str(tmp_path / "file" / "below")
    config = tiny_train(tiny_data, tmp_path / "run", cache_dir=cache, num_workers=1)
    with pytest.raises(STGTError, match="^cannot create the shard cache at .*below: Not a"):
        run_train(config)


@pytest.mark.slow
def test_data_that_does_not_come_ends_the_run_and_says_what_it_waits_for(
    s3: FaultyS3, tiny_data: TinyData, tmp_path: Path
) -> None:
    uris = {f"clip{number}": "s3://bucket/silent/video.mp4" for number in range(16)}
    manifest = str(tmp_path / "silent.parquet")
    table = whole_videos_table(uris, dict.fromkeys(uris, "a caption"), "test")
    storage.write_table(manifest, table)
    config = tiny_train(
        tiny_data,
        tmp_path / "run",
        data=(manifest,),
        val_store=None,
        max_stall_s=12.0,
        num_workers=1,
    )
    with pytest.raises(DataStallError, match=r"waited 12 s .*decoding clip\d+ from s3://.*"):
        run_train(config)


def test_images_are_clips_of_one_frame(
    ray_cluster: None, tiny_data: TinyData, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(4):
        image = generator.integers(256, size=(80, 100, 3)).astype(np.uint8)
        (folder / f"{number}.jpg").write_bytes(simplejpeg.encode_jpeg(image))
    rows = [{"image": f"{number}.jpg", "caption": f"a red {number}"} for number in range(4)]
    (tmp_path / "images.json").write_text(json.dumps(rows))
    manifest = str(tmp_path / "images.parquet")
    run_manifest(
        ManifestConfig(
            annotations=(str(tmp_path / "images.json"),),
            videos=str(folder),
            output=manifest,
            format="lavis",
        )
    )
    store = run_ingest(tiny_ingest(manifest, str(tmp_path / "clips")))["store"]
    assert ClipStore(store).num_clips == 4
    stored = ClipStore(store).read_shard(0)
    assert [len(frames) for frames in stored["frames"].to_pylist()] == [1, 1, 1, 1]
    base = tiny_train(tiny_data, tmp_path / "run", data=(store,), global_batch=4, block_clips=2)
    for frames in (1, 6):
        config = replace(base, num_frames=frames)
        check_data(config)
        batch = ClipLoader(config.loader)({"id": np.arange(4)})
        assert batch["frames"].shape == (4, frames, 64, 64, 3)
        state = WorkerState(resolved(config), torch.device("cpu"))
        objective = TrainingObjective(state.model, "hard")
        values, _ = train_step(
            state,
            objective,
            dict(batch),
            LR,
            config,
            0,
            torch.device("cpu"),  # type: ignore[arg-type]
        )
        assert np.isfinite(values["loss/total"])


def test_images_and_videos_are_mixed_by_their_shares(tiny_data: TinyData, tmp_path: Path) -> None:
    config = tiny_train(
        tiny_data, tmp_path / "run", data=(tiny_data.train_store, tiny_data.val_store), mix=(3, 1)
    )
    batch = ClipLoader(config.loader)({"id": np.arange(48)})
    ours = set(ClipStore(tiny_data.val_store).read_shard(0, ["clip_id"])["clip_id"].to_pylist())
    from_val = [clip_id in ours for clip_id in batch["clip_id"]]
    assert [sum(from_val[first : first + 4]) for first in range(0, 48, 4)] == [1] * 12
    num_val = ClipStore(tiny_data.val_store).num_clips
    firsts = [clip for clip, is_val in zip(batch["clip_id"], from_val, strict=True) if is_val]
    assert len(set(firsts[:num_val])) == min(num_val, len(firsts))
    together = replace(config, mix=())
    plan = check_data(together).plan
    assert plan.num_clips == 39 + num_val
    batch = ClipLoader(together.loader)({"id": np.arange(plan.num_clips)})
    assert len(set(batch["clip_id"])) == plan.num_clips


def steps_by(config: TrainConfig, count: int = 3) -> list[dict[str, float]]:
    """Metrics of a few steps in this process."""
    torch.set_num_threads(1)
    config = resolved(config)
    state = WorkerState(config, torch.device("cpu"))
    objective = build_objective(config, state).train()
    loader = ClipLoader(config.loader)
    found = []
    for step in range(count):
        first = step * config.global_batch
        batch = dict(loader({"id": np.arange(first, first + config.global_batch)}))
        values, _ = train_step(
            state,
            objective,
            batch,
            LR,
            config,
            0,
            torch.device("cpu"),  # type: ignore[arg-type]
        )
        state.step += 1
        found.append(values)
    return found


@pytest.fixture(scope="module")
def plain(
    tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, list[dict[str, float]]]:
    config = tiny_train(
        tiny_data,
        tmp_path_factory.mktemp("plain") / "run",
        augment=AugmentConfig(crop_scale_min=1.0, flip=False, num_ops=0),
    )
    return config, steps_by(config)


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"micro_batch": 4}, 1e-4),
        ({"micro_batch": 4, "precision": "fp16"}, 0.01),
        ({"precision": "bf16"}, 0.01),
        pytest.param({"precision": "fp16"}, 0.01, marks=pytest.mark.soak),
    ],
)
def test_passes_and_half_precision_take_the_same_steps(
    plain: tuple[TrainConfig, list[dict[str, float]]], changes: dict, tolerance: float
) -> None:
    config, wanted = plain
    found = steps_by(replace(config, **changes))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=tolerance)


def test_a_step_that_overflows_in_fp16_is_left_out(tiny_data: TinyData, tmp_path: Path) -> None:
    config = resolved(tiny_train(tiny_data, tmp_path / "run", precision="fp16"))
    state = WorkerState(config, torch.device("cpu"))
    objective = TrainingObjective(state.model, "hard").train()
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 2.0**40})
    batch: Any = dict(ClipLoader(config.loader)({"id": np.arange(16)}))
    before = [parameter.clone() for parameter in state.model.parameters()]
    device = torch.device("cpu")
    values, overflow = train_step(state, objective, batch, 1e-4, config, 0, device)
    assert overflow
    assert values["loss_scale"] == 2.0**39
    now = list(state.model.parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, now, strict=True))
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 1024.0})
    values, overflow = train_step(state, objective, batch, 1e-4, config, 0, device)
    assert not overflow
    assert not all(torch.equal(one, other) for one, other in zip(before, now, strict=True))


def test_checkpointed_activations_take_the_same_steps(
    plain: tuple[TrainConfig, list[dict[str, float]]],
) -> None:
    config, wanted = plain
    found = steps_by(replace(config, model=replace(config.model, gradient_checkpointing=True)))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_compiled_blocks_take_the_same_steps(
    plain: tuple[TrainConfig, list[dict[str, float]]],
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:
    """In soak with the code that torch generates, which takes minutes to compile on a CPU."""
    config, wanted = plain
    if backend == "aot_eager":
        compile_with(monkeypatch, backend)
    found = steps_by(replace(config, compile=True), count=2)
    for ours, theirs in zip(found, wanted[:2], strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_losses_are_weighted_in_their_sum_and_in_gradients(
    plain: tuple[TrainConfig, list[dict[str, float]]], micro_batch: int | None
) -> None:
    config, wanted = plain
    weights = LossWeights(matching=8.0)
    config = replace(config, micro_batch=micro_batch)
    (found,) = steps_by(replace(config, loss_weights=weights), count=1)
    assert found["grad_norm"] > 1.2 * wanted[0]["grad_norm"]
    losses = {name: found[f"loss/{name}"] for name in ("itc", "itm", "lm")}
    assert losses == pytest.approx({name: wanted[0][f"loss/{name}"] for name in losses}, rel=1e-5)
    total = losses["itc"] + 8 * losses["itm"] + losses["lm"]
    assert found["loss/total"] == pytest.approx(total, rel=1e-5)
    with pytest.raises(SettingError, match=r"loss_weights.matching = 8.0: is for retrieval"):
        replace(config, loss_weights=weights, questions="q.parquet", answers="a.json")


@pytest.mark.parametrize(
    ("recipe", "left"),
    [("clip_msrvtt_tiny", ("caption", "matching")), ("pretrain_stage1_tiny", ())],
)
def test_weights_that_leave_no_loss_are_refused(recipe: str, left: tuple[str, ...]) -> None:
    config = recipes.RECIPES[recipe](("clips",), "run")  # type: ignore[call-arg]
    nothing = LossWeights(contrastive=0.0, matching=0.0, caption=0.0)
    weights = replace(nothing, **dict.fromkeys(left, 1.0))
    with pytest.raises(SettingError, match="leaves no loss of this model"):
        replace(config, loss_weights=weights)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_micro_batches_are_not_replayed(
    tiny_data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    micro_batch: int | None,
) -> None:
    """They accumulate gradients, which replayed passes would overwrite."""
    asked: list[bool] = []
    monkeypatch.setattr(STGT, "compile_blocks", lambda _, cuda_graphs: asked.append(cuda_graphs))
    config = tiny_train(tiny_data, tmp_path / "run", compile=True, micro_batch=micro_batch)
    WorkerState(resolved(config), torch.device("cpu"))
    assert asked == [micro_batch is None]


@pytest.mark.parametrize("precision", ["fp16"])
def test_the_loss_scale_survives_a_restart(
    tiny_data: TinyData, tmp_path: Path, precision: Precision
) -> None:
    from stgt.inputs.tokenizer import Tokenizer

    config = resolved(tiny_train(tiny_data, tmp_path / "run", precision=precision))
    state = WorkerState(config, torch.device("cpu"))
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 512.0})
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    uri = run_folder.checkpoint_uri(config.output, 2)
    checkpoints.save(
        uri,
        state.model,
        Tokenizer(tiny_data.vocab),
        2,
        state.optimizer,
        scaler=state.scaler.state_dict(),
        skipped=3,
    )
    again = WorkerState(config, torch.device("cpu"))
    assert (again.step, again.skipped, again.scaler.get_scale()) == (2, 3, 512.0)


def test_changed_settings_are_listed_and_taken_when_asked(
    tiny_data: TinyData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_train(tiny_data, tmp_path / "run")
    run_folder.claim(replace(config, seed=9), "digest")  # came to nothing, binds nobody
    run_folder.claim(config, "digest")
    begun(config)
    other = replace(config, seed=1, optim=replace(config.optim, lr=2e-3), num_workers=1)
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.001 -> 0\.002; seed: 0 -> 1\)"):
        run_folder.claim(other, "digest")
    run_folder.claim(replace(other, allow_changes=True), "digest")
    assert "continuing with changed settings: optim.lr: 0.001 -> 0.002; seed: 0 -> 1" in caplog.text
    run_folder.claim(other, "digest")


def test_a_checkpoint_of_another_size_is_refused(tiny_data: TinyData, tmp_path: Path) -> None:
    from stgt.inputs.tokenizer import Tokenizer

    config = resolved(tiny_train(tiny_data, tmp_path / "run"))
    begun = str(tmp_path / "begun")
    state = WorkerState(config, torch.device("cpu"))
    checkpoints.save(begun, state.model, Tokenizer(tiny_data.vocab), step=0)
    wider = replace(config, init_from=begun, model=replace(config.model, embed_dim=32))
    message = r"another size \(embed_dim 64 in the checkpoint, 32 in this run\)"
    with pytest.raises(CheckpointError, match=message):
        run_train(wider)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resize": "crop"}, r"ingested with sampling\.resize = squash, but the model needs"),
        (
            {"hold_out": 39, "val_store": None},
            "contains 39 clips of 39 videos, so none would be left",
        ),
    ],
)
def test_a_store_that_does_not_suit_is_refused(
    tiny_data: TinyData, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ClipStoreError, match=message):
        check_data(tiny_train(tiny_data, tmp_path / "run", **changes))


def test_no_space_for_a_checkpoint_is_said_before_the_first_step(
    tiny_data: TinyData, small_disk: Callable[[str], Path], tmp_path: Path
) -> None:
    small = small_disk("5m")
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    config = tiny_train(tiny_data, small / "run", val_store=None, tracking=tracking)
    with pytest.raises(CheckpointError, match=r"has \d MB of free space, but a checkpoint takes"):
        run_train(config)


def test_a_checkpoint_is_chosen_by_a_metric_of_which_more_is_better(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"'t2v/MdR': must be one of t2v/R1, t2v/R5, t2v/R10"):
        check_data(tiny_train(tiny_data, tmp_path / "run", select_metric="t2v/MdR"))


def test_blocks_are_unfrozen_from_a_frozen_encoder_and_resumed(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    """The encoder's file holds all blocks; a checkpoint then holds the one that is trained."""
    from stgt import STGT
    from stgt.inputs.tokenizer import Tokenizer
    from stgt.model_folder import save_model

    base = tiny_train(tiny_data, tmp_path / "run")
    frozen = replace(base.model, vision=replace(base.model.vision, frozen=True))
    known = resolved(replace(base, model=frozen))
    whole = tmp_path / "whole"
    model = STGT(known.model)
    checkpoints.save(str(whole), model, Tokenizer(tiny_data.vocab), step=0)
    (whole / checkpoints.COMPLETE).unlink()
    save_model(model, whole, with_frozen=True)
    (whole / checkpoints.COMPLETE).touch()
    vision = replace(known.model.vision, unfreeze_last_blocks=1)
    config = replace(
        known,
        init_from=str(whole),
        model=replace(known.model, vision=vision),
        optim=replace(known.optim, layer_decay=0.5),
    )
    state = WorkerState(config, torch.device("cpu"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(state.model.state_dict()[name], tensor), name
    assert {group["lr_scale"] for group in state.optimizer.param_groups} == {1.0, 0.5}
    name = "frame_encoder.vit.blocks.1.mlp.fc1.weight"
    before = state.model.state_dict()[name].clone()
    batch: Any = dict(ClipLoader(config.loader)({"id": np.arange(16)}))
    objective = TrainingObjective(state.model, "hard").train()
    train_step(state, objective, batch, 1e-3, config, 0, torch.device("cpu"))
    assert not torch.equal(state.model.state_dict()[name], before)
    uri = run_folder.checkpoint_uri(config.output, 1)
    tokenizer = Tokenizer(tiny_data.vocab)
    checkpoints.save(uri, state.model, tokenizer, 1, state.optimizer, state.frame_encoder)
    again = WorkerState(config, torch.device("cpu"))
    assert again.step == 1
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


@pytest.mark.soak
def test_a_training_without_free_cpus_says_what_it_waits_for(
    tiny_data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(waiting, "FIRST_S", 2.0)

    @ray.remote(num_cpus=1)
    def hold() -> None:
        time.sleep(25)

    held = [hold.remote() for _ in range(int(ray.cluster_resources()["CPU"]))]
    run_train(tiny_train(tiny_data, tmp_path / "run", steps=1, val_store=None))
    ray.get(held)
    assert re.search(
        r"no worker has started after 2 s; it needs 2 CPU, and in the cluster 0 of \d+ CPUs are "
        "free; it starts as soon as other work frees them",
        caplog.text,
    )


@pytest.mark.soak
def test_a_worker_without_memory_ends_the_run_with_advice(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    """The activations of this model do not fit into the memory of any machine."""
    config = tiny_train(tiny_data, tmp_path / "run", steps=1, val_store=None)
    model = replace(config.model, qformer=replace(config.model.qformer, mlp_width=2**40))
    with pytest.raises(OutOfMemoryError, match=r"out of memory \(.*lower --micro-batch"):
        run_train(replace(config, model=model), estimate=False)
