"""Train one stage. `python -m jobs.train RECIPE --help` lists its settings."""

import difflib
import inspect
import sys

import tyro

from jobs.entry import EXIT_USAGE, run_job, start_ray
from pipelines.train import recipes
from pipelines.train.config import TrainConfig

PROG = "python -m jobs.train"
BATCHES_AT_ONCE = 6
"""Batches that a local object store has room for: those made, waiting, prefetched and used."""
FROM_CALLER = ("data", "output", "init_from")


def _defaults() -> dict[str, tuple[str, TrainConfig]]:
    """Each recipe's summary and config, with what only the caller knows left open."""
    found = {}
    for name, recipe in recipes.RECIPES.items():
        needed = [
            argument.name
            for argument in inspect.signature(recipe).parameters.values()
            if argument.name in FROM_CALLER and argument.default is inspect.Parameter.empty
        ]
        config = recipe(**dict.fromkeys(needed, tyro.MISSING_NONPROP))
        found[name] = (inspect.getdoc(recipe) or "", config)
    return found


def _check_recipe() -> None:
    """Name the recipes that are near a mistyped one."""
    name = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    if name is None or name in recipes.RECIPES:
        return
    near = difflib.get_close_matches(name, recipes.RECIPES, n=3, cutoff=0.4)
    did_you_mean = f"did you mean {' or '.join(near)}? " if near else ""
    print(
        f"error: there is no recipe {name!r}; {did_you_mean}All: {', '.join(recipes.RECIPES)}",
        file=sys.stderr,
    )
    sys.exit(EXIT_USAGE)


def main() -> None:
    """Run the train job."""
    _check_recipe()
    config = tyro.extras.overridable_config_cli(_defaults(), prog=PROG, description=__doc__)

    def work() -> dict:
        from pipelines.train.run import run_train

        start_ray(cpus=config.num_cpus(), object_store_bytes=BATCHES_AT_ONCE * config.batch_bytes)
        return dict(run_train(config))

    run_job(work)


if __name__ == "__main__":
    main()
