"""A tiny ALPRO trains on Ray, and its checkpoint goes on, is evaluated and is exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.artifacts import checkpoints
from pipelines.common.config import TrackingConfig
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.run import run_evaluate
from pipelines.export.weights.config import ExportConfig, ImportConfig
from pipelines.export.weights.export import run_export
from pipelines.export.weights.run import run_import
from pipelines.train import run_folder
from pipelines.train.alpro_recipes import RECIPES, alpro_didemo, alpro_msrvtt
from pipelines.train.config import TrainConfig
from pipelines.train.run import run_train
from tests.helpers.data import TinyData

PUBLISHED = {
    "alpro_msrvtt": {"lr": 2.5e-5, "batch": 8 * 8, "epochs": 5, "clip": 5.0, "tokens": 40},
    "alpro_didemo": {"lr": 4e-5, "batch": 8 * 12, "epochs": 10, "clip": 20.0, "tokens": 50},
}


@pytest.mark.parametrize("recipe", [alpro_msrvtt, alpro_didemo])
def test_recipes_have_the_published_hyperparameters(recipe) -> None:
    config: TrainConfig = recipe(("clips",), "run", "pretrained")
    wanted = PUBLISHED[config.recipe]
    optim = config.optim
    assert (optim.lr, optim.decay, optim.weight_decay) == (wanted["lr"], "linear", 1e-3)
    assert (optim.beta1, optim.beta2, optim.max_grad_norm) == (0.9, 0.98, wanted["clip"])
    assert (config.global_batch, config.epochs) == (wanted["batch"], wanted["epochs"])
    assert config.model.inputs.max_text_tokens == wanted["tokens"]
    assert config.num_frames == config.model.inputs.num_frames == 8
    assert config.label_smoothing.contrastive == 0.0
    assert (config.seed, config.frame_choice) == (42, "random_sorted")


def tiny(data: TinyData, output: Path, **changes) -> TrainConfig:
    recipe = RECIPES["alpro_msrvtt_tiny"]((data.train_store,), str(output), data.vocab)
    values = {
        "steps": 4,
        "global_batch": 8,
        "checkpoint_every": 2,
        "hold_out": 0,
        "val_store": data.val_store,
        "tracking": TrackingConfig(uri=f"sqlite:///{output.parent}/mlflow.db"),
    }
    return replace(recipe, **{**values, **changes})


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_tiny_alpro_trains_and_everything_takes_its_checkpoint(
    tiny_data: TinyData, mlflow_database: Path, tmp_path: Path
) -> None:
    (tmp_path / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    config = tiny(tiny_data, tmp_path / "run")
    summary = run_train(config)
    assert summary["step"] == 4
    assert {"loss/itc", "loss/itm"} <= summary["metrics"].keys()
    assert "loss/lm" not in summary["metrics"]
    uri = run_folder.checkpoint_uri(config.output, 4)
    assert checkpoints.describe(uri) == "ALPRO (alpro)"

    found = run_evaluate(
        EvaluateConfig(
            data=tiny_data.val_store,
            checkpoint=uri,
            output=str(tmp_path / "evaluation"),
            resamples=0,
            tracking=config.tracking,
        )
    )
    assert "reranked by cosine + match probability" in found["protocol"]["reranking"]
    assert 0 <= found["metrics"]["t2v/R10"] <= 100

    exported = run_export(ExportConfig(model=uri, output=str(tmp_path / "exported.pt")))
    again = run_import(
        ImportConfig(
            checkpoint=exported["checkpoint"],
            vocab=tiny_data.vocab,
            output=str(tmp_path / "model"),
            vision_heads=4,
            qformer_heads=4,
            fusion_layer=1,
        )
    )
    trained, imported = (checkpoints.load(one)[0] for one in (uri, again["model"]))
    for name, tensor in trained.state_dict().items():
        assert torch.equal(imported.state_dict()[name], tensor), name


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(300)
def test_losses_do_not_depend_on_the_number_of_workers(
    tiny_data: TinyData, mlflow_database: Path, tmp_path: Path
) -> None:
    (tmp_path / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    losses = []
    for workers in (1, 2):
        config = tiny(tiny_data, tmp_path / f"run-{workers}", num_workers=workers, val_store=None)
        metrics = run_train(config)["metrics"]
        losses.append([metrics[f"loss/{name}"] for name in ("itc", "itm", "total")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
