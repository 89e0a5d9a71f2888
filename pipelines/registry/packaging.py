"""Writes the folder of an MLflow model: code, weights or a reference to them, signature, card.

One of the modules that import mlflow, since the folder has MLflow's format.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipelines
import stgt
from pipelines.artifacts import checkpoints
from pipelines.registry.inference import InferenceSettings
from pipelines.registry.weights import Weights, are_referred_to, assemble

if TYPE_CHECKING:
    from mlflow.models import Model, ModelSignature

PACKAGES = ("artifacts", "common", "video")
"""Packages of `pipelines` that a registered model imports, besides `stgt` and parts of this one."""
OWN_MODULES = ("__init__.py", "inference.py", "weights.py")
"""Modules of this package that a registered model imports."""
SCRIPT = "pyfunc_model.py"
MLMODEL = "MLmodel"
CHECKPOINT = "checkpoint"
"""Name of the folder of weights among the artifacts of a model."""
CARD = "README.md"
REQUIRED = (
    "av",
    "filelock",
    "huggingface_hub",
    "mlflow",
    "numpy",
    "pandas",
    "pebble",
    "pillow",
    "pyarrow",
    "s3fs",
    "safetensors",
    "simplejpeg",
    "tenacity",
    "timm",
    "torch",
    "torchvision",
    "transformers",
    "tyro",
)
"""Distributions that the code of a registered model imports."""
TOKENIZERS = {"spiece.model": "sentencepiece"}
"""Distributions that tokenizers with certain files need."""
DECORD = "decord"
EXAMPLE = {"caption": ["a red circle moves to the right", "a dog catches a ball"]}


def signature() -> ModelSignature:
    """Return the signature of all registered models."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema(
            [
                ColSpec("string", "caption", required=False),
                ColSpec("string", "video_uri", required=False),
                ColSpec("double", "start_s", required=False),
                ColSpec("double", "end_s", required=False),
            ]
        ),
        outputs=Schema(
            [
                ColSpec(Array("double"), "caption_embedding", required=False),
                ColSpec(Array(Array("double")), "video_embedding", required=False),
                ColSpec("double", "similarity", required=False),
                ColSpec("double", "match_probability", required=False),
                ColSpec("string", "error", required=False),
            ]
        ),
        params=ParamSchema([ParamSpec("task", "string", "auto")]),
    )


def requirements(settings: InferenceSettings, files: Collection[str] = ()) -> list[str]:
    """Return the dependencies of a registered model with the versions that are installed here.

    They name no package index and no address: the part of a version that says how a package was
    built, such as +cpu, is left out.

    Args:
        settings: How the model reads its inputs.
        files: Names of the model's files.
    """
    needs_decord = settings["sampling"]["decoder"] != "pyav"
    names = [*REQUIRED, *([DECORD] if needs_decord else [])]
    names += [package for file, package in TOKENIZERS.items() if file in files]
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in sorted(names)]


def write_model(
    folder: Path,
    mlflow_model: Model,
    weights: Weights,
    settings: InferenceSettings,
    card: str,
    scratch: Path,
) -> None:
    """Write the folder of a model.

    Args:
        folder: Folder to create.
        mlflow_model: Describes the model; it has the ids that MLflow gave it.
        weights: The model's files. They are copied unless all of them lie on S3.
        settings: How the model reads its inputs.
        card: The model card, in Markdown.
        scratch: Folder for intermediate files.
    """
    import mlflow.pyfunc
    import pandas as pd

    is_reference = are_referred_to(weights)
    config: dict[str, Any] = {**settings, "weights": weights if is_reference else None}
    artifacts = {}
    if not is_reference:
        # MLflow would copy gigabytes here before it copies them again for the upload. It gets an
        # empty folder instead, in which links are put afterwards.
        placeholder = scratch / CHECKPOINT
        placeholder.mkdir()
        (placeholder / checkpoints.COMPLETE).touch()
        artifacts = {CHECKPOINT: str(placeholder)}
    mlflow.pyfunc.save_model(
        path=str(folder),
        python_model=str(Path(__file__).with_name(SCRIPT)),
        artifacts=artifacts,
        code_paths=_copy_code(scratch / "code"),
        model_config=config,
        pip_requirements=requirements(settings, weights),
        signature=signature(),
        input_example=pd.DataFrame(EXAMPLE),
        mlflow_model=mlflow_model,
    )
    if not is_reference:
        saved = mlflow_model.flavors[mlflow.pyfunc.FLAVOR_NAME]["artifacts"][CHECKPOINT]["path"]
        shutil.rmtree(folder / saved)
        assemble(weights, folder / saved)
        mlflow_model.model_size_bytes = sum(
            one.stat().st_size for one in folder.rglob("*") if one.is_file()
        )
        mlflow_model.save(str(folder / MLMODEL))
    (folder / CARD).write_text(card, encoding="utf-8")
    for cache in list(folder.rglob("__pycache__")):
        shutil.rmtree(cache)


def _copy_code(folder: Path) -> list[str]:
    """Copy the parts of this project that a model imports, and return what to hand to MLflow."""
    ignored = shutil.ignore_patterns("__pycache__", "*.md", "templates", "synthetic")
    shutil.copytree(_place_of(stgt.__path__), folder / "stgt", ignore=ignored)
    source = _place_of(pipelines.__path__)
    target = folder / "pipelines"
    target.mkdir()
    shutil.copy(source / "__init__.py", target)
    for name in PACKAGES:
        shutil.copytree(source / name, target / name, ignore=ignored)
    (target / "registry").mkdir()
    for name in OWN_MODULES:
        shutil.copy(Path(__file__).with_name(name), target / "registry")
    return [str(folder / "stgt"), str(target)]


def _place_of(paths: Sequence[str]) -> Path:
    return Path(next(iter(paths)))
