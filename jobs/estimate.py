"""Estimate hours, storage and cost of an ingest and a training.

python -m jobs.estimate pretrain_stage1 --clips 10000000 --gpus 16 --cpus 256 --price-gpu-hour PRICE
--price-cpu-hour PRICE
"""

from __future__ import annotations

import dataclasses
from typing import Any

import tyro

from jobs.entry import Job, main
from jobs.settings import CommandLine, Recipe
from pipelines.estimate.config import PLACEHOLDER, STORED_FRAMES, EstimateConfig
from pipelines.train import recipes


def _recipes() -> dict[str, Recipe]:
    """Return an estimate of each training recipe; only the number of clips must be given."""
    found = {}
    for name, recipe in recipes.RECIPES.items():
        train = recipe(data=(PLACEHOLDER,), output=PLACEHOLDER, init_from=PLACEHOLDER)
        stored = max(STORED_FRAMES, train.num_frames)
        config = EstimateConfig(train=train, clips=tyro.MISSING_NONPROP, stored_frames=stored)
        summary = (recipe.__doc__ or "").splitlines()[0]
        described = (
            f"{summary}\nThis estimates the training, and the ingest before it.\n\n"
            f"python -m jobs.estimate {name} --clips 1000000 --cpus 64"
        )
        found[name] = Recipe(described, config)
    return found


def _translate(values: dict[str, Any]) -> dict[str, Any]:
    """Move settings of the training below `train`, since files may name them as flags do."""
    own = {field.name for field in dataclasses.fields(EstimateConfig)}
    moved = {name: value for name, value in values.items() if name not in own}
    kept = {name: value for name, value in values.items() if name in own}
    if moved and isinstance(kept.get("train", {}), dict):
        kept["train"] = {**kept.get("train", {}), **moved}
    return kept


JOB = Job(
    name="estimate",
    summary=(__doc__ or "").splitlines()[0],
    command_line=CommandLine(
        EstimateConfig, __doc__ or "", recipes=_recipes(), translate=_translate
    ),
    target="pipelines.estimate.run:run_estimate",
)

if __name__ == "__main__":
    main(JOB)
