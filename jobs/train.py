"""Train one stage from clip stores or manifests."""

from __future__ import annotations

import inspect

import tyro

from jobs.entry import ClusterSize, Job, main
from jobs.settings import CommandLine, Recipe
from pipelines.train import recipes
from pipelines.train.config import TrainConfig

BATCHES_AT_ONCE = 6
"""Batches that fit into a local object store: being made, waiting, prefetched and in use."""
FROM_CALLER = ("data", "output", "init_from")
WITH_QUESTIONS = ("questions", "answers")
"""Locations that recipes with questions take from the command line, whatever their defaults."""


def _recipes() -> dict[str, Recipe]:
    """Return all recipes, in which locations that the caller must give are required settings."""
    found = {}
    for name, recipe in recipes.RECIPES.items():
        needed = [
            argument.name
            for argument in inspect.signature(recipe).parameters.values()
            if argument.name in WITH_QUESTIONS
            or (argument.name in FROM_CALLER and argument.default is inspect.Parameter.empty)
        ]
        config = recipe(**dict.fromkeys(needed, tyro.MISSING_NONPROP))
        found[name] = Recipe(inspect.getdoc(recipe) or "", config)
    return found


def local_cluster(config: TrainConfig) -> ClusterSize:
    """Return the size of a local cluster that suits a training."""
    return ClusterSize(
        cpus=config.num_cpus(), object_store_bytes=BATCHES_AT_ONCE * config.batch_bytes
    )


JOB = Job(
    name="train",
    summary=(__doc__ or "").splitlines()[0],
    command_line=CommandLine(TrainConfig, __doc__ or "", recipes=_recipes()),
    target="pipelines.train.run:run_train",
    cluster=local_cluster,
)

if __name__ == "__main__":
    main(JOB)
