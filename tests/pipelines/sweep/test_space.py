"""Spaces as users write them: names, distributions and values that a config accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.sweep.recipes import space_of, sweep_of
from pipelines.sweep.space import check_values, read_space, with_values
from pipelines.train.config import TrainConfig
from pipelines.train.preflight import selectable_metrics
from pipelines.train.recipes import RECIPES, finetune_msrvtt, pretrain_stage1_tiny
from stgt.errors import SettingError, STGTError

TINY = pretrain_stage1_tiny(("clips",), "out", "vocab.txt")
FULL = finetune_msrvtt(("clips",), "out", "model")


def test_a_space_of_every_kind_of_setting() -> None:
    space = read_space(
        [
            "optim.lr=loguniform(1e-6,1e-4)",
            "model.graph.similarity_threshold=uniform(0.3, 0.9)",
            "num_frames=choice(4,8,16)",
            "optim.weight_decay=grid(0.01,0.05)",
            "optim.warmup_steps=randint(0,100)",
            "precision=choice(fp32,'bf16')",
            "compile=choice(true,false)",
            "init_from=choice('runs/a','runs/b')",
        ],
        TINY,
    )
    assert {name: (one.kind, one.values) for name, one in space.items()} == {
        "optim.lr": ("loguniform", (1e-6, 1e-4)),
        "model.graph.similarity_threshold": ("uniform", (0.3, 0.9)),
        "num_frames": ("choice", (4, 8, 16)),
        "optim.weight_decay": ("grid", (0.01, 0.05)),
        "optim.warmup_steps": ("randint", (0, 100)),
        "precision": ("choice", ("fp32", "bf16")),
        "compile": ("choice", (True, False)),
        "init_from": ("choice", ("runs/a", "runs/b")),
    }
    written = [f"{name}={one}" for name, one in space.items()]
    assert read_space(written, TINY) == space


def test_a_space_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("optim.lr: loguniform(1e-6,1e-4)\nnum_frames: [4, 8]\n")
    space = read_space([str(path), "seed_of_nothing=choice(1)"][:1], TINY)
    assert str(space["optim.lr"]) == "loguniform(1e-06, 0.0001)"
    assert space["num_frames"].values == (4, 8)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "the space is empty; give --space"),
        (["optim.learning_rate=uniform(0,1)"], "no setting 'optim.learning_rate'"),
        (["lr=uniform(0,1)"], "no setting 'lr' to search; did you mean .*optim.lr"),
        (["similarity_threshold=uniform(0,1)"], "did you mean .*model.graph.similarity_threshold"),
        (["optim=choice(1)"], "there is no setting 'optim' to search"),
        (["compile=uniform(0,1)"], "compile is on or off; use choice"),
        (["optim.lr=choice(1e999)"], "values must be finite"),
        (["threads_per_worker=grid(64)"], "all trials use the same resources"),
        (["num_workers=choice(1,2)"], "all trials use the same resources"),
        (["keep_checkpoints=choice(1,2)"], "it does not change what is learned"),
        (["seed=choice(1,2)"], "seed cannot be searched: use --repeats"),
        (["tracking.uri=choice(a,b)"], "tracking.uri cannot be searched"),
        (["optim.lr"], "is not a part of a space; write NAME=DISTRIBUTION"),
        (["optim.lr=1e-4"], "is not a distribution; write one of uniform, loguniform"),
        (["optim.lr=loguniform(1e-4"], "is not a distribution"),
        (["optim.lr=__import__('os').getpid()"], "is not a distribution"),
        (["optim.lr=logunifrom(1,2)"], "no distribution 'logunifrom'; did you mean loguniform"),
        (["optim.lr=uniform(1)"], "needs two bounds"),
        (["optim.lr=uniform(1e-3,1e-4)"], "the lower bound must be below the upper"),
        (["optim.lr=loguniform(0,1)"], "bounds of loguniform must be positive"),
        (["optim.lr=uniform(a,b)"], "needs numbers as bounds"),
        (["num_frames=uniform(4,8)"], "num_frames is an integer; use randint"),
        (["num_frames=choice(4,eight)"], "'eight' is not valid"),
        (["optim.lr=choice()"], "has no values"),
        (["optim.lr=choice(1e-4,0.0001)"], "contains a value twice"),
        (["optim.lr=choice(1)", "optim.lr=choice(2)"], "gives optim.lr twice"),
        (["steps=choice(10)", "epochs=choice(1)"], "both steps and epochs"),
        (["nowhere.yaml"], "the space nowhere.yaml cannot be read"),
    ],
)
def test_a_wrong_space_is_one_sentence(texts: list[str], message: str) -> None:
    with pytest.raises(STGTError, match=message) as raised:
        read_space(texts, TINY)
    assert "\n" not in str(raised.value)


def test_a_combination_that_the_config_refuses_is_named() -> None:
    space = read_space(["optim.lr=choice(1e-3,1e-6)", "optim.weight_decay=choice(0.1)"], TINY)
    refused = r"optim.lr = 1e-06, optim.weight_decay = 0.1 is refused: optim.lr = 1e-06: must be"
    with pytest.raises(SettingError, match=refused):
        check_values(space, TINY)
    space = read_space(["optim.lr=uniform(1e-6,1e-3)"], TINY)
    with pytest.raises(SettingError, match="optim.lr = 1e-06"):
        check_values(space, TINY)


def test_values_of_a_large_space_are_each_checked() -> None:
    names = ("lr", "weight_decay", "max_grad_norm", "layer_decay")
    texts = [f"optim.{name}=grid({','.join(f'0.0{n}' for n in range(1, 10))})" for name in names]
    space = read_space([*texts, "optim.warmup_steps=grid(0,-1)"], TINY)
    with pytest.raises(SettingError, match="warmup_steps = -1"):
        check_values(space, TINY)


def test_what_decides_the_data_is_checked_with_the_data() -> None:
    space = read_space(["num_frames=choice(4,8)", "optim.lr=choice(1e-3)"], TINY)
    assert [one.num_frames for one in check_values(space, TINY)] == [4, 8]


def test_values_replace_nested_settings() -> None:
    values = {"optim.lr": 0.5, "model.graph.similarity_threshold": 0.4, "num_frames": 4}
    found = with_values(TINY, values)
    assert (found.optim.lr, found.model.graph.similarity_threshold, found.num_frames) == (
        0.5,
        0.4,
        4,
    )
    assert FULL.epochs is not None
    assert with_values(FULL, {"steps": 7}).epochs is None


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_space_that_suits_it(name: str) -> None:
    recipe: TrainConfig = RECIPES[name](("clips",), "out", init_from="model")  # type: ignore[call-arg]
    kind = recipe.model.kind
    space = read_space(space_of(name, kind), recipe)
    check_values(space, recipe)
    assert {"optim.lr", "optim.weight_decay", "optim.warmup_steps"} <= space.keys()
    assert ("model.graph.similarity_threshold" in space) == (kind == "stgt")
    answers = name.startswith("qa_")  # its only loss has no label smoothing
    assert answers or any(one.startswith("label_smoothing.") for one in space)
    if name.startswith("finetune") and not name.endswith("_tiny"):
        assert {"num_frames", "global_batch", "model.vision.unfreeze_last_blocks"} <= space.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_the_default_metric_of_a_sweep_is_one_that_its_training_measures(name: str) -> None:
    recipe: TrainConfig = RECIPES[name](("clips",), "out", init_from="model")  # type: ignore[call-arg]
    metric = sweep_of(name, recipe).metric.partition("/")[2]
    assert metric in selectable_metrics(recipe)


def test_a_recipe_without_a_space_searches_the_optimizer() -> None:
    assert all(one.startswith("optim.") for one in space_of("another_recipe", "another_kind"))
    assert all(one.startswith("optim.") for one in space_of("another_recipe_tiny", "another_kind"))
