"""Search the best settings of a training.

python -m jobs.sweep finetune_msrvtt --data CLIPS --init-from MODEL --output SWEEP --space
"optim.lr=loguniform(1e-6,1e-4)" "num_frames=choice(4,8)" --trials 20 --search optuna
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jobs.entry import ClusterSize, Job, main
from jobs.settings import CommandLine, Recipe
from jobs.train import JOB as TRAIN
from jobs.train import local_cluster
from pipelines.quickstart.store import quickstart_store
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.recipes import sweep_of, sweep_tiny

QUICKSTART = "quickstart-output"

RENAMED = {
    "--lr": "--space 'optim.lr=grid(VALUES)'",
    "--similarity-threshold": "--space 'model.graph.similarity_threshold=grid(VALUES)'",
}
"""Flags of earlier versions, and their spelling today."""


def _renamed(flag: str) -> str | None:
    if flag.startswith("--train."):
        return f"--{flag.removeprefix('--train.')}"
    return RENAMED.get(flag)


def _translate(values: dict[str, Any]) -> dict[str, Any]:
    """Move settings of the training below `train`, since files may name them as flags do."""
    from pipelines.sweep.earlier import is_earlier, translated

    if is_earlier(values):
        return translated(values)
    own = {field.name for field in dataclasses.fields(SweepConfig)}
    moved = {name: value for name, value in values.items() if name not in own}
    kept = {name: value for name, value in values.items() if name in own}
    if moved and isinstance(kept.get("train", {}), dict):
        kept["train"] = {**kept.get("train", {}), **moved}
    return kept


def _cluster(config: SweepConfig) -> ClusterSize:
    return local_cluster(config.train)


JOB = Job(
    name="sweep",
    summary=(__doc__ or "").splitlines()[0],
    command_line=CommandLine(
        SweepConfig,
        __doc__ or "",
        default=sweep_tiny(
            train_store=quickstart_store(QUICKSTART, "train"),
            val_store=quickstart_store(QUICKSTART, "val"),
            vocab=f"{QUICKSTART}/vocab.txt",
            uri=f"sqlite:///{QUICKSTART}/mlflow.db",
            output="sweep-output",
        ),
        default_description="Without a recipe, four short trainings on the clips of the quickstart "
        "try two learning rates and two graph thresholds.",
        recipes={
            name: Recipe(
                recipe.description.replace("python -m jobs.train", "python -m jobs.sweep"),
                sweep_of(name, recipe.config),
            )
            for name, recipe in TRAIN.command_line.recipes.items()
        },
        translate=_translate,
        renamed=_renamed,
    ),
    target="pipelines.sweep.run:run_sweep",
    cluster=_cluster,
)

if __name__ == "__main__":
    main(JOB)
