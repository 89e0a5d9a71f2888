"""Dual encoders in the pipeline: zero-shot evaluation, fine-tuning, and clear refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import mlflow
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

from pipelines.artifacts import checkpoints
from pipelines.artifacts.locations import find_checkpoint
from pipelines.artifacts.vocabulary import open_tokenizer
from pipelines.common.config import TrackingConfig
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.run import run_evaluate
from pipelines.registry.config import RegisterConfig
from pipelines.registry.run import run_register
from pipelines.train.config import TrainConfig
from pipelines.train.dual_encoder_recipes import RECIPES, clip_msrvtt
from pipelines.train.preflight import (
    check_initial_weights,
    with_absolute_paths,
    with_architecture,
    with_vocabulary,
)
from pipelines.train.run import run_train
from stgt.config import OptimConfig
from stgt.dual_encoder import hub
from stgt.dual_encoder.config import DualEncoderConfig
from stgt.dual_encoder.model import DualEncoder
from stgt.errors import CheckpointError, SettingError
from tests.helpers.data import TinyData
from tests.helpers.hub_models import change_json, clip_folder, siglip_folder

STORED_SIZE = 64


def evaluation(data: TinyData, checkpoint: str, output: Path, **changes: object) -> EvaluateConfig:
    config = EvaluateConfig(
        data=data.val_store,
        checkpoint=checkpoint,
        output=str(output),
        num_frames=6,
        resamples=0,
        num_pictures=1,
        tracking=TrackingConfig(uri=f"sqlite:///{output.parent}/mlflow.db"),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def fine_tuning(data: TinyData, start: str, output: Path) -> TrainConfig:
    """The recipe of MSR-VTT at a size for tests, from a model of the hub."""
    recipe = clip_msrvtt((data.train_store,), str(output), start)
    return replace(
        recipe,
        num_frames=6,
        model=replace(recipe.model, num_frames=6, max_text_tokens=16),
        precision="fp32",
        resize="squash",
        optim=OptimConfig(lr=1e-3, warmup_steps=1),
        steps=4,
        epochs=None,
        global_batch=16,
        micro_batch=4,
        num_workers=1,
        num_loaders=0,
        use_gpu=False,
        checkpoint_every=2,
        progress_every=1,
        hold_out=0,
        val_store=data.val_store,
        val_clips=16,
        tracking=TrackingConfig(uri=f"sqlite:///{output.parent}/mlflow.db"),
    )


@pytest.mark.slow
def test_a_model_of_the_hub_is_evaluated_as_it_is(tiny_data: TinyData, tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "hub", size=STORED_SIZE)
    before = sorted(path.name for path in folder.iterdir())
    summary = run_evaluate(evaluation(tiny_data, str(folder), tmp_path / "out"))
    assert 0 <= summary["metrics"]["sim/t2v/R1"] <= 100
    told = summary["protocol"]
    assert told["reranking"] == "none: the model does not match pairs"
    assert "64 pixels" in told["frames"]
    assert told["text tokens"] == "captions truncated to 16 tokens"
    assert sorted(path.name for path in folder.iterdir()) == before
    # The metrics are those of the model itself, on the same frames.
    again = run_evaluate(evaluation(tiny_data, str(folder), tmp_path / "again"))
    assert again["metrics"] == summary["metrics"]


@pytest.mark.ray
def test_a_model_of_the_hub_is_fine_tuned_and_evaluated(
    ray_cluster: None, tiny_data: TinyData, tmp_path: Path
) -> None:
    folder = clip_folder(tmp_path / "hub", size=STORED_SIZE)
    config = fine_tuning(tiny_data, str(folder), tmp_path / "run")
    summary = run_train(config, estimate=False)
    assert summary["step"] == 4
    trained, tokenizer = checkpoints.load(summary["checkpoint"])
    assert isinstance(trained, DualEncoder)
    start = hub.load(folder)
    assert tokenizer.entries() == start.tokenizer.entries()
    with torch.no_grad():
        moved = trained.encode_text(["a red ball"]) - start.encode_text(["a red ball"])
    assert moved.abs().max() > 1e-3
    # The same command finds the result, and the checkpoint is a model like any other.
    assert run_train(config, estimate=False)["metrics"] == summary["metrics"]
    found = run_evaluate(evaluation(tiny_data, str(tmp_path / "run"), tmp_path / "out"))
    assert found["captions"] > 0
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["model"]["kind"] == "dual_encoder"
    # It is registered with its own tokenizer.
    registered = run_register(
        RegisterConfig(
            checkpoint=summary["checkpoint"], name="dual_encoder", tracking=config.tracking
        )
    )
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(str(config.tracking.uri))
    try:
        served = mlflow.pyfunc.load_model(registered["model_uri"])
    finally:
        mlflow.set_tracking_uri(before)
    answer = served.predict(pd.DataFrame({"caption": ["a red ball"]}))
    with torch.no_grad():
        expected = trained.encode_text(["a red ball"])[0]
    found = torch.tensor(answer["caption_embedding"][0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # Matching and captioning have no loss in such a model.
    client = MlflowClient(tracking_uri=str(config.tracking.uri))
    losses = [one for one in client.get_run(summary["run_id"]).data.metrics if "loss/" in one]
    assert sorted(losses) == ["loss/itc", "loss/total"]


@pytest.mark.slow
def test_the_architecture_comes_from_the_weights(tiny_data: TinyData, tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "hub", size=STORED_SIZE)
    config = with_architecture(
        with_absolute_paths(fine_tuning(tiny_data, str(folder), tmp_path / "run"))
    )
    assert config.model.inputs.image_size == STORED_SIZE
    assert config.vocab == str(folder)
    config = with_vocabulary(config)
    check_initial_weights(config)
    tiny = RECIPES["clip_msrvtt_tiny"]((tiny_data.train_store,), "out", tiny_data.vocab)
    random = with_vocabulary(with_architecture(with_absolute_paths(tiny)))
    check_initial_weights(random)
    words = len(open_tokenizer(tiny_data.vocab))
    assert isinstance(random.model, DualEncoderConfig)
    assert random.model.hub["text_config"]["vocab_size"] == words


@pytest.mark.slow
def test_wrong_weights_are_refused_in_one_sentence(tiny_data: TinyData, tmp_path: Path) -> None:
    def prepared(start: str | None) -> None:
        config = replace(fine_tuning(tiny_data, "", tmp_path / "run"), init_from=start)
        config = with_vocabulary(with_architecture(with_absolute_paths(config)))
        check_initial_weights(config)

    with pytest.raises(CheckpointError, match="takes its architecture from its weights"):
        prepared(None)
    folder = clip_folder(tmp_path / "hub", size=STORED_SIZE)
    change_json(folder / "config.json", model_type="vit")
    with pytest.raises(CheckpointError, match=r"type 'vit'.*may be clip, siglip"):
        prepared(str(folder))
    change_json(folder / "config.json", model_type="siglip2")
    with pytest.raises(CheckpointError, match="NaFlex"):
        prepared(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        prepared(str(tmp_path / "empty"))


@pytest.mark.slow
def test_siglip_takes_no_other_text_length(tiny_data: TinyData, tmp_path: Path) -> None:
    folder = siglip_folder(tmp_path / "hub")
    config = fine_tuning(tiny_data, str(folder), tmp_path / "run")
    short = replace(config, model=replace(config.model, max_text_tokens=8))
    with pytest.raises(SettingError, match="takes no other length"):
        with_architecture(with_absolute_paths(short))
    evaluated = evaluation(tiny_data, str(folder), tmp_path / "out", max_text_tokens=8)
    with pytest.raises(SettingError, match="takes no other length"):
        run_evaluate(evaluated)


@pytest.mark.slow
def test_pickled_weights_are_refused_before_anything_is_written(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    folder = clip_folder(tmp_path / "hub", size=STORED_SIZE)
    (folder / hub.WEIGHTS).rename(folder / "pytorch_model.bin")
    for run in (
        lambda: run_evaluate(evaluation(tiny_data, str(folder), tmp_path / "out")),
        lambda: run_train(fine_tuning(tiny_data, str(folder), tmp_path / "run"), estimate=False),
    ):
        with pytest.raises(CheckpointError, match="pickled weights only"):
            run()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_model_in_the_cache_of_the_hub_is_read_at_its_commit(
    tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, commit = tmp_path / "cache" / "models--someone--clip", "0123456789" * 4
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    clip_folder(cache / "snapshots" / commit, size=STORED_SIZE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_checkpoint("hf:someone/clip") == f"hf:someone/clip@{commit}"
    assert checkpoints.describe("hf:someone/clip") == "CLIP (dual_encoder), in the form of the hub"
    config = fine_tuning(tiny_data, "hf:someone/clip", tmp_path / "run")
    config = with_vocabulary(with_architecture(with_absolute_paths(config)))
    assert config.init_from == config.vocab == f"hf:someone/clip@{commit}"
    check_initial_weights(config)
    model, tokenizer = checkpoints.load("hf:someone/clip")
    assert isinstance(model, DualEncoder)
    assert len(tokenizer) == len(open_tokenizer("hf:someone/clip"))
    assert checkpoints.weights_version("hf:someone/clip") == commit


def test_a_name_on_the_hub_is_not_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert checkpoints.is_hub_name("hf:openai/clip")
    with pytest.raises(CheckpointError, match=r"hf:nobody/nothing cannot be downloaded"):
        checkpoints.model_config("hf:nobody/nothing")


class AcrossClips(DualEncoderConfig):
    """A model with batch statistics, for example."""

    accumulates = False


@pytest.mark.slow
def test_passes_are_refused_for_a_model_that_looks_across_clips(tiny_data: TinyData) -> None:
    config = RECIPES["clip_msrvtt_tiny"]((tiny_data.train_store,), "out", tiny_data.vocab)
    assert isinstance(config.model, DualEncoderConfig)
    across = AcrossClips(**config.model.to_dict())
    assert replace(config, model=across).model is across
    with pytest.raises(SettingError, match="micro_batch = 8: must be None"):
        replace(config, model=across, micro_batch=8)
