"""Stored tokens give what encoding the frames gives, and belong to one store and one encoder."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.artifacts import checkpoints
from pipelines.artifacts.clip_store import CATALOGUE, ClipStore
from pipelines.artifacts.frame_features import FrameFeatures, shard_uri
from pipelines.artifacts.loaded_model import encoder_fingerprint
from pipelines.artifacts.manifest import clip_hash
from pipelines.common import storage
from pipelines.feed.config import TrainingFeatures
from pipelines.feed.features.run import run_features
from pipelines.feed.loader import Batch, ClipLoader, ShareOfWorker, load_in_process
from pipelines.feed.stored_tokens import open_reader
from pipelines.sweep.again import refit_config
from pipelines.sweep.config import SweepConfig
from pipelines.train import features as train_features
from pipelines.train import preflight, run_folder
from pipelines.train.config import TrainConfig
from pipelines.train.state import WorkerState
from pipelines.train.step import train_step
from pipelines.train.tracing import estimate_footprint
from stgt.alpro.config import alpro_tiny
from stgt.config import AugmentConfig, ModelConfig
from stgt.dual_encoder.config import dual_encoder_tiny
from stgt.errors import SettingError, STGTError
from stgt.inputs.tokenizer import Tokenizer
from stgt.inputs.transforms import augment_clip
from stgt.training.objective import TrainingObjective
from tests.helpers.features import SHARDS, FeatureData, make_feature_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> FeatureData:
    return make_feature_data(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def stored(data: FeatureData) -> str:
    return run_features(data.features("fp16"))["output"]


@pytest.fixture(scope="module")
def exact(data: FeatureData) -> str:
    return run_features(data.features("fp32", format="fp32"))["output"]


def resolved(config: TrainConfig) -> TrainConfig:
    config = preflight.with_vocabulary(preflight.with_absolute_paths(config))
    train_features.check_features(config)
    return config


def batches(config: TrainConfig) -> Iterator[Batch]:
    share = ShareOfWorker(0, 1, config.global_batch)
    loaded = load_in_process(
        ClipLoader(config.loader), 0, config.steps * config.global_batch, 2, share
    )
    read = train_features.reading_tokens(config) if config.features.store else None
    for batch in loaded:
        assert not any(batch["error"])
        yield batch if read is None else read(batch)


def losses_of(config: TrainConfig, until: int | None = None) -> list[float]:
    """Losses of the steps from the latest checkpoint on; `until` writes one after that step."""
    config = resolved(config)
    state = WorkerState(config, CPU, writes_encoder=True)
    train_features.check_encoder(config, state.model)
    objective = TrainingObjective(state.model, config.targets).train()
    found = []
    for batch in itertools.islice(batches(config), state.step, until):
        values, _ = train_step(state, objective, batch, 1e-4, config, 0, CPU)
        found.append(values["loss/total"])
        state.step += 1
    if until is not None:
        uri = run_folder.checkpoint_uri(config.output, state.step)
        tokenizer = Tokenizer(config.vocab)
        checkpoints.save(
            uri, state.model, tokenizer, state.step, state.optimizer, state.frame_encoder
        )
    return found


@pytest.mark.slow
def test_ten_steps_with_stored_tokens_have_the_losses_of_ten_steps_with_frames(
    data: FeatureData, stored: str, exact: str
) -> None:
    wanted = losses_of(data.train("plain"))
    assert len(set(wanted)) == 10
    assert losses_of(data.train("exact", exact)) == wanted
    half = losses_of(data.train("half", stored))
    assert half == pytest.approx(wanted, rel=1e-4)
    assert half != wanted  # the tokens were rounded, so they were not computed from frames


@pytest.mark.slow
def test_a_training_resumes_exactly_with_the_encoder_that_it_froze(
    data: FeatureData, exact: str
) -> None:
    """The initial checkpoint has trained the encoder, so the run keeps a copy of it."""
    config = data.train("resumed", exact, steps=4)
    losses = [*losses_of(config, until=2), *losses_of(config)]
    assert losses == losses_of(data.train("at once", exact, steps=4))
    saved = run_folder.checkpoint_uri(config.output, 2)
    model, _ = checkpoints.load(saved)
    assert model.frames_are_fixed
    assert encoder_fingerprint(model) == FrameFeatures(exact).encoder
    # The checkpoint of the training takes the same features.
    again = data.train("second", exact, steps=2, init_from=saved)
    assert len(losses_of(again)) == 2


@pytest.mark.slow
def test_accumulated_passes_take_stored_tokens(data: FeatureData, exact: str) -> None:
    wanted = losses_of(data.train("plain", micro_batch=2, steps=3))
    assert losses_of(data.train("passes", exact, micro_batch=2, steps=3)) == wanted


@pytest.mark.parametrize("how", ["random", "head_tail", "uniform"])
@pytest.mark.parametrize("unit", ["captions", "clips"])
def test_the_same_frames_of_the_same_clips_are_chosen(
    data: FeatureData, exact: str, how: Any, unit: Any
) -> None:
    changes = {"frame_choice": how, "epoch_unit": unit, "steps": 6, "seed": 3}
    plain = data.train("plain", **changes)
    model, _ = checkpoints.load(data.checkpoint)
    pairs = zip(
        batches(resolved(plain)), batches(resolved(data.train("a", exact, **changes))), strict=True
    )
    for frames, tokens in pairs:
        assert "frames" in frames
        assert "tokens" in tokens
        for name in ("position", "input_ids", "clip_id", "clip_key", "answer"):
            assert np.array_equal(frames[name], tokens[name])  # type: ignore[literal-required]
        with torch.no_grad():
            encoded = model.eval().encode_frames(torch.from_numpy(frames["frames"]))
        torch.testing.assert_close(tokens["tokens"].to(CPU).values, encoded)


def test_eight_bits_keep_each_number_within_a_sixteenth(data: FeatureData, exact: str) -> None:
    small = run_features(data.features("fp8", format="fp8"))
    places = np.array([[0, shard, 1, 0, 0, 3] for shard in range(len(SHARDS))])
    values = open_reader([exact], data.folder / "cache", 1).read(places).to(CPU).values
    rounded = open_reader([small["output"]], data.folder / "cache", 1).read(places).to(CPU).values
    scale = values.abs().amax(dim=-1, keepdim=True)
    # Numbers far below the largest of their token have fewer digits.
    assert bool(((rounded - values).abs() <= values.abs() / 16 + scale * 2**-18).all())
    assert small["bytes"] < 0.3 * FrameFeatures(exact).num_bytes


@pytest.mark.slow
def test_views_are_drawn_by_seed_epoch_and_sample_and_made_by_seed_clip_and_view(
    data: FeatureData,
) -> None:
    augment = AugmentConfig(crop_scale_min=0.6, flip=True, num_ops=1)
    folder = run_features(data.features("views", views=3, augment=augment, format="fp32", seed=5))[
        "output"
    ]
    features = TrainingFeatures(store=(folder,), views=3)
    config = resolved(data.train("v", augment=augment, features=features, steps=9))
    model, _ = checkpoints.load(data.checkpoint)
    store = ClipStore(data.store)
    seen: dict[str, set[int]] = {}
    for batch, again in zip(batches(config), batches(config), strict=True):
        assert "stored" in batch
        assert "stored" in again
        assert "tokens" in batch
        assert np.array_equal(batch["stored"], again["stored"])
        tokens = batch["tokens"].to(CPU).values
        for place, clip_id, found in zip(batch["stored"], batch["clip_id"], tokens, strict=True):
            _, shard, row, view = place[:4].tolist()
            seen.setdefault(clip_id, set()).add(view)
            clip = store.read_shard(shard).slice(row, 1).to_pylist()[0]
            assert clip["clip_id"] == clip_id
            generator = np.random.default_rng((5, clip_hash(clip_id), view))
            frames = augment_clip(store.decode(clip["frames"]), augment, generator)
            with torch.no_grad():
                wanted = model.eval().encode_frames(torch.from_numpy(frames[place[4:]])[None])[0]
            torch.testing.assert_close(found, wanted)
    assert set().union(*seen.values()) == {0, 1, 2}
    assert max(len(views) for views in seen.values()) > 1


def test_augmentation_without_views_is_refused_with_both_ways_out(
    data: FeatureData, stored: str
) -> None:
    with pytest.raises(SettingError) as refused:
        data.train("augmented", stored, augment=AugmentConfig())
    told = str(refused.value)
    off = "--augment.crop-scale-min 1 --augment.no-flip --augment.num-ops 0"
    assert off in told
    assert "--features.views N" in told
    assert "jobs.features --views N" in told


def test_models_that_train_their_frame_encoder_are_refused(data: FeatureData, stored: str) -> None:
    frozen = data.train("frozen", stored).model
    assert isinstance(frozen, ModelConfig)
    for vision in (
        replace(frozen.vision, frozen=False),
        replace(frozen.vision, unfreeze_last_blocks=1),
    ):
        with pytest.raises(SettingError, match=r"trains the part that looks at frames; .* freeze"):
            data.train("trained", stored, model=replace(frozen, vision=vision))
    for model in (dual_encoder_tiny(), alpro_tiny()):
        with pytest.raises(SettingError, match="this .* trains the part .* out --features.store$"):
            data.train("other", stored, model=model)


def test_features_of_another_state_or_kind_are_refused(data: FeatureData, stored: str) -> None:
    def refused(message: str, *features: str, **changes: Any) -> None:
        with pytest.raises((STGTError, SettingError), match=message):
            resolved(data.train("refused", *features, **changes))

    views = run_features(data.features("some views", views=1))["output"]
    augmented = {"augment": AugmentConfig()}
    refused("no features.json, so it holds no finished frame features", str(data.folder))
    refused("holds 1 augmented views of each clip, and this training has no augm", views)
    more = TrainingFeatures(store=(views,), views=2)
    refused(
        "holds 1 augmented views of each clip, and features.views = 2", features=more, **augmented
    )
    other = {"augment": AugmentConfig(num_ops=1)}
    one = TrainingFeatures(store=(views,), views=1)
    refused("augment.num_ops is 2 in the features and 1 in the run", features=one, **other)
    plain = TrainingFeatures(store=(stored,), views=1)
    refused("holds no augmented views", features=plain, **augmented)
    refused("must have one folder for each of the 1 data sets", stored, stored)
    refused("num_frames = 7: the model takes at most 6 frames", stored, num_frames=7)
    changed = data.folder / "changed"
    shutil.copytree(data.store, changed)
    catalogue = storage.read_json(str(changed / CATALOGUE))
    storage.write_json(str(changed / CATALOGUE), {**catalogue, "digest": "another"})
    refused(
        "but .*changed has another; give the features of this store", stored, data=(str(changed),)
    )


def test_features_of_another_encoder_are_refused(data: FeatureData, stored: str) -> None:
    model, tokenizer = checkpoints.load(data.checkpoint)
    with torch.no_grad():
        model.frame_encoder.vit.blocks[0].attn.proj.bias[0] += 1e-3
    other = str(data.folder / "other checkpoint")
    checkpoints.save(other, model, tokenizer, step=0)
    with pytest.raises(STGTError, match="features of a frame encoder with the fingerprint"):
        losses_of(data.train("another encoder", stored, init_from=other))
    with pytest.raises(STGTError, match=r"holds other features \(encoder: "):
        run_features(data.features("fp16", checkpoint=other))
    with pytest.raises(STGTError, match=r"holds other features \(format: 'fp16' -> 'fp8'\)"):
        run_features(data.features("fp16", format="fp8"))


def test_a_damaged_file_is_found_and_written_again_with_equal_bytes(data: FeatureData) -> None:
    config = data.features("damaged")
    output = run_features(config)["output"]
    digest = FrameFeatures(output).digest
    file = Path(shard_uri(output, 1))
    whole = file.read_bytes()
    assert run_features(replace(config, verify=True))["clips"] == sum(SHARDS)
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(STGTError, match="1 of 3 files failed verification: .*00001.arrow has chan"):
        run_features(replace(config, verify=True))
    file.write_bytes(whole[:middle])  # too short, which is noticed without reading all of it
    with pytest.raises(STGTError, match="00001.arrow cannot be used"):
        list(batches(resolved(data.train("damaged run", output))))
    file.unlink()
    with pytest.raises(STGTError, match="00001.arrow is missing"):
        run_features(replace(config, verify=True))
    run_features(config)
    assert file.read_bytes() == whole
    assert FrameFeatures(output).digest == digest


def test_only_changed_shards_of_a_store_are_encoded_again(data: FeatureData) -> None:
    store = data.folder / "growing"
    shutil.copytree(data.store, store)
    config = data.features("grown", store=str(store))
    output = run_features(config)["output"]
    before = [Path(shard_uri(output, shard)).stat().st_mtime_ns for shard in range(3)]
    shards = storage.read_json(str(store / CATALOGUE))
    shutil.copy(store / "shards/00000.parquet", store / "shards/00002.parquet")
    shards["shards"][2] |= {"clips": SHARDS[0], "sha256": shards["shards"][0]["sha256"]}
    changed = {**shards, "clips": sum(SHARDS[:2]) + SHARDS[0], "digest": "grown"}
    storage.write_json(str(store / CATALOGUE), changed)
    assert run_features(config)["clips"] == changed["clips"]
    after = [Path(shard_uri(output, shard)).stat().st_mtime_ns for shard in range(3)]
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, True, False]
    assert Path(shard_uri(output, 2)).read_bytes() == Path(shard_uri(output, 0)).read_bytes()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_encoded(
    data: FeatureData, small_disk: Callable[[str], Path]
) -> None:
    folder = small_disk("256k") / "features"
    with pytest.raises(
        STGTError, match=r"has 0.2\d MB of free space, but the features take 0.\d+ MB"
    ):
        run_features(data.features("full", output=str(folder)))
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "config.json"]


@pytest.mark.slow
def test_the_estimate_of_a_training_leaves_out_the_encoder(data: FeatureData, stored: str) -> None:
    plain, from_tokens = (
        estimate_footprint(data.train("a", *features)) for features in ((), (stored,))
    )
    assert from_tokens.flops < plain.flops
    assert from_tokens.trained == plain.trained


def test_a_refit_trains_on_the_stored_tokens_of_the_validation_clips_too(data: FeatureData) -> None:
    def refitted(**changes: Any) -> TrainConfig:
        best = data.train("best", val_store="/val", **changes)
        return refit_config(
            SweepConfig(train=best, space=("optim.lr=loguniform(1e-4,1e-3)",)), best
        )

    both = TrainingFeatures(store=("/of data",), val_store="/of val")
    found = refitted(features=both)
    assert found.data == (data.store, "/val")
    assert found.features == TrainingFeatures(store=("/of data", "/of val"))
    assert refitted(features=TrainingFeatures(store=("/of data",))).features == TrainingFeatures()
    views = replace(both, views=2)
    assert refitted(features=views, augment=AugmentConfig()).features == TrainingFeatures()
