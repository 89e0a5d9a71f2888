"""The recipes hold what was published, each has a tiny twin, and a mistyped one is named."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipelines.train import recipes
from pipelines.train.config import TrainConfig
from stgt.config import AugmentConfig, OptimConfig
from tests.helpers.data import PROJECT

FULL = sorted(name for name in recipes.RECIPES if not name.endswith("_tiny"))


def recipe(name: str) -> TrainConfig:
    return recipes.RECIPES[name](("clips",), "run", init_from="model")


@pytest.mark.parametrize(
    ("name", "epochs", "tokens"),
    [
        ("finetune_msrvtt", 9, 36),
        ("finetune_didemo", 9, 55),
        ("finetune_lsmdc", 9, 32),
        ("finetune_msvd", 12, 32),
    ],
)
def test_fine_tuning_is_as_published(name: str, epochs: int, tokens: int) -> None:
    config = recipe(name)
    assert (config.epochs, config.model.max_text_tokens) == (epochs, tokens)
    assert config.global_batch == 20 * config.num_workers
    assert (config.num_frames, config.model.vision.image_size) == (8, 224)
    assert config.frame_choice == "head_tail"
    assert config.augment == AugmentConfig(crop_scale_min=0.5, flip=True, num_ops=2, magnitude=5)
    assert config.optim == OptimConfig(
        lr=2.5e-5,
        min_lr=1e-6,
        warmup_steps=0,
        weight_decay=0.05,
        beta1=0.9,
        beta2=0.98,
    )
    assert config.select_on == "val"
    assert (config.epoch_unit, config.negatives) == ("captions", "distinct")


def test_epochs_of_the_benchmarks_count_captions() -> None:
    """MSR-VTT: 9 epochs of 20 captions of 9,000 clips; MSVD: 12 epochs of 48,774 captions."""
    msrvtt, msvd = recipe("finetune_msrvtt"), recipe("finetune_msvd")
    assert msrvtt.hold_out == 500
    assert msrvtt.steps_for(9000 * 20) == 10_125
    assert msrvtt.steps_for(8500 * 20) == 9563
    assert msvd.steps_for(48_774) == 3659


def test_the_stages_of_pre_training_differ_in_their_targets() -> None:
    assert recipe("pretrain_stage1").targets == "hard"
    assert recipe("pretrain_stage2").targets == "self_similarity"


@pytest.mark.parametrize("name", FULL)
def test_a_recipe_is_documented_and_has_a_tiny_twin(name: str) -> None:
    full, tiny = recipe(name), recipe(f"{name}_tiny")
    assert f"python -m jobs.train {name} " in (recipes.RECIPES[name].__doc__ or "")
    assert f"python -m jobs.train {name}_tiny " in (recipes.RECIPES[f"{name}_tiny"].__doc__ or "")
    assert (full.use_gpu, tiny.use_gpu) == (True, False)
    assert (tiny.targets, tiny.frame_choice) == (full.targets, full.frame_choice)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["finetune_msrvt"], "there is no recipe 'finetune_msrvt'; did you mean finetune_msrvtt"),
        (
            ["finetune_msvd", "--data=a", "--output=b", "--init-from=c", "--optim.warmup-step=3"],
            "--optim.warmup-steps",
        ),
    ],
)
def test_a_mistyped_word_gets_those_that_are_near(words: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.train", *words],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
