"""A tiny checkpoint, its evaluation, and MLflow databases with versions of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.common.config import TrackingConfig
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.run import run_evaluate
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.run import run_manifest
from pipelines.registry.run import RegisterSummary, run_register
from pipelines.video.synthetic import dataset
from tests.helpers.checkpoint import save_untrained
from tests.helpers.data import TinyData
from tests.helpers.evaluated import Evaluated


@pytest.fixture(scope="session")
def evaluated(mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copy(mlflow_database, folder / "mlflow.db")
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", experiment="retrieval")
    videos = dataset.plan_videos(num_train=1, num_val=5, seed=0)["val"]
    annotations = dataset.write_split(str(folder), "val", videos)
    manifest = str(folder / "val.parquet")
    run_manifest(
        ManifestConfig(
            annotations=(annotations,),
            videos=str(folder / "videos"),
            output=manifest,
            split="val",
        )
    )
    dataset.write_vocabulary(str(folder / "vocab.txt"))
    data = TinyData(str(folder / "videos"), str(folder / "vocab.txt"), manifest, "", "")
    checkpoint = save_untrained(data, folder)
    run_evaluate(
        EvaluateConfig(
            data=manifest,
            checkpoint=checkpoint,
            output=str(folder / "evaluation"),
            k_rerank=3,
            tracking=tracking,
        )
    )
    return Evaluated(
        checkpoint=checkpoint,
        manifest=manifest,
        evaluation=str(folder / "evaluation"),
        videos=tuple(
            str(folder / "videos" / one.page_dir / f"{one.video_id}.mp4") for one in videos
        ),
        captions=tuple(one.scene.caption() for one in videos),
        tracking=tracking,
    )


@pytest.fixture(scope="session")
def registered(evaluated: Evaluated) -> RegisterSummary:
    """The checkpoint as version 1 of `retrieval`, in the database of its evaluation."""
    return run_register(evaluated.config())


@pytest.fixture
def apart(evaluated: Evaluated, mlflow_database: Path, tmp_path: Path) -> Evaluated:
    """The same, with an MLflow database of its own that knows no run of it."""
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="apart")
    return replace(evaluated, tracking=tracking)


@pytest.fixture
def another_checkpoint(evaluated: Evaluated, tmp_path: Path) -> Callable[[str], str]:
    """Copies the checkpoint with other weights."""
    import torch
    from safetensors.torch import load_file, save_file

    def copy(name: str) -> str:
        folder = tmp_path / name
        shutil.copytree(evaluated.checkpoint, folder)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        key = sorted(one for one in tensors if one.endswith("text_proj.weight"))[0]
        generator = torch.Generator().manual_seed(len(name))
        tensors[key] = tensors[key] + 0.05 * torch.randn(tensors[key].shape, generator=generator)
        save_file(tensors, file)
        return str(folder)

    return copy
