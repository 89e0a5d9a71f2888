"""Settings of a sweep over trainings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from pipelines.common.config import require
from pipelines.train.config import TrainConfig
from stgt.field_marks import Common, Earlier, FieldMark

Search = Literal["random", "grid", "optuna", "pbt"]
Scheduler = Literal["asha", "none"]
MIN_POPULATION = 4


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Search for the best settings of a training. Each trial is a Ray Train run."""

    train: Annotated[
        TrainConfig,
        arg(name=""),  # so that flags have the names that they have in jobs.train
        Common(
            "training, shared by all trials",
            only=(
                "data",
                "val_store",
                "vocab",
                "output",
                "init_from",
                "epochs",
                "num_workers",
                "tracking",
            ),
        ),
    ]
    """Settings that all trials share. Its output is the folder of the sweep, and its name that of
    the parent run in MLflow."""
    space: Annotated[tuple[str, ...], Common("sweep")]
    """Settings to search, as NAME=uniform(LOW,HIGH), loguniform, randint, choice(VALUES) or grid.
    NAME is any setting of the training. Bounds are included. YAML files that map names to
    distributions are taken as well."""
    search: Annotated[Search, Common("sweep"), Earlier("grid")] = "random"
    """How settings are chosen.
    random draws values, and those of grids take turns. grid tries all combinations of lists.
    optuna learns from the trials before. pbt lets the members of a population copy the best ones
    and perturb their settings during the training."""
    trials: Annotated[int | None, Common("sweep")] = None
    """Number of settings to try, or of members of a population. None tries the whole grid, or 10
    settings in other searches."""
    scheduler: Annotated[Scheduler | None, Common("sweep"), Earlier("asha")] = None
    """asha stops trials that are behind others at the same step.
    none trains all of them to the end. None takes asha, or none with pbt or repeats."""
    repeats: Annotated[int, Common("sweep"), Earlier(1)] = 1
    """Number of trials of each setting, with consecutive seeds. Settings are judged by the
    mean."""
    metric: Annotated[str, Common("sweep"), Earlier("val/t2v/R10")] = "val/t2v/R1"
    """Validation metric to maximize."""
    grace_steps: Annotated[int | None, Earlier(1)] = None
    """Minimum number of steps before asha may stop a trial. None takes the steps between
    validations."""
    reduction_factor: Annotated[int, Earlier(2)] = 2
    """Of the trials that reach a rung of asha, one in this many continues."""
    round_steps: Annotated[int | None, FieldMark.OPERATIONAL] = None
    """Steps between perturbations with pbt. None perturbs at every checkpoint."""
    max_concurrent_trials: Annotated[int | None, FieldMark.OPERATIONAL] = None
    """Maximum number of trials at the same time. None runs as many as fit the cluster."""
    refit: Annotated[bool, Common("sweep"), FieldMark.OPERATIONAL] = False
    """At the end, train the best setting on training and validation clips."""

    def __post_init__(self) -> None:
        for name in ("trials", "grace_steps", "repeats", "round_steps", "max_concurrent_trials"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1")
        require(
            self.reduction_factor >= 2,
            "reduction_factor",
            self.reduction_factor,
            "must be at least 2",
        )
        if self.search == "pbt":
            require(
                self.trials is None or self.trials >= MIN_POPULATION,
                "trials",
                self.trials,
                f"a population needs at least {MIN_POPULATION} members",
            )
            require(self.repeats == 1, "repeats", self.repeats, "must be 1 with search = pbt")
        alone = self.search == "pbt" or self.repeats > 1
        require(
            not (alone and self.scheduler == "asha"),
            "scheduler",
            self.scheduler,
            "must be none with search = pbt, which replaces its worst members itself, and with "
            "repeats, since a setting is judged by all of its seeds",
        )

    @property
    def uses_asha(self) -> bool:
        """Whether ASHA stops trials."""
        if self.scheduler is None:
            return self.search != "pbt" and self.repeats == 1
        return self.scheduler == "asha"

    @property
    def first_rung(self) -> int:
        """Steps before ASHA may stop a trial."""
        if self.grace_steps is not None:
            return self.grace_steps
        return max(self.train.checkpoint_every, self.train.validate_every or 0)

    @property
    def output(self) -> str:
        """Folder of the sweep."""
        return self.train.output

    @property
    def name(self) -> str:
        """Name of the parent run in MLflow."""
        return self.train.name
