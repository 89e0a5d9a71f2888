"""Train one stage. `python -m jobs.train pretrain_stage1_tiny --store DIR --output DIR --help`."""

import tyro

from jobs.entry import run_job, start_ray
from pipelines import recipes

PROG = "python -m jobs.train"

RECIPES = {
    name: (
        (recipe.__doc__ or "").splitlines()[0],
        recipe(store=tyro.MISSING, output=tyro.MISSING, **more),
    )
    for name, recipe, more in (
        ("pretrain_stage1_tiny", recipes.pretrain_stage1_tiny, {"vocab": "bert-base-uncased"}),
        (
            "pretrain_stage2_tiny",
            recipes.pretrain_stage2_tiny,
            {"vocab": "bert-base-uncased", "init_from": tyro.MISSING},
        ),
    )
}


def main() -> None:
    """Run the train job."""
    config = tyro.extras.overridable_config_cli(RECIPES, prog=PROG, description=__doc__)

    def work() -> dict:
        from pipelines.train import run_train

        start_ray(cpus=config.num_workers + config.num_loaders + 1)
        return dict(run_train(config))

    run_job(work)


if __name__ == "__main__":
    main()
