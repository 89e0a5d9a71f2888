"""The recipes of question answering hold what was published, or say that they are our own."""

from __future__ import annotations

import pytest

from pipelines.train import recipes
from pipelines.train.config import TrainConfig
from pipelines.video.synthetic.questions import answer_vocabulary
from stgt.alpro.config import AlproConfig
from stgt.config import AugmentConfig, ModelConfig


def recipe(name: str) -> TrainConfig:
    return recipes.RECIPES[name](("clips",), "run", init_from="model")


@pytest.mark.parametrize(
    ("name", "epochs", "norm", "questions", "steps"),
    [("qa_msrvtt_alpro", 10, 5.0, 158_581, 8260), ("qa_msvd_alpro", 15, 20.0, 30_933, 2417)],
)
def test_alpro_is_as_published(
    name: str, epochs: int, norm: float, questions: int, steps: int
) -> None:
    config = recipe(name)

    assert isinstance(config.model, AlproConfig)
    assert (config.epochs, config.optim.lr, config.optim.weight_decay) == (epochs, 5e-5, 1e-3)
    assert (config.optim.beta1, config.optim.beta2, config.optim.decay) == (0.9, 0.98, "linear")
    assert config.optim.max_grad_norm == norm
    assert (config.global_batch, config.micro_batch, config.num_workers) == (8 * 12 * 2, 12, 8)
    assert (config.num_frames, config.model.num_frames) == (16, 16)
    assert config.frame_choice == "random_sorted"
    assert config.augment == AugmentConfig(crop_scale_min=1.0, flip=True, num_ops=2, magnitude=5)
    assert (config.seed, config.model.gradient_checkpointing) == (42, True)
    assert config.steps_for(questions) == steps
    assert config.optim.warmup_steps == pytest.approx(steps / 10, rel=0.02)


@pytest.mark.parametrize("name", ["qa_msrvtt_stgt", "qa_msvd_stgt"])
def test_stgt_has_the_published_sizes_and_says_that_the_rest_is_ours(name: str) -> None:
    config = recipe(name)

    assert isinstance(config.model, ModelConfig)
    assert (config.model.max_text_tokens, config.num_frames) == (44, 16)
    assert (config.model.vision.frozen, config.model.qformer.query_tokens) == (True, 32)
    described = " ".join((recipes.RECIPES[name].__doc__ or "").split())
    assert "The settings are our own" in described
    assert "results differ from the paper's" in described


@pytest.mark.parametrize("name", [name for name in recipes.RECIPES if name.startswith("qa_")])
def test_the_best_checkpoint_is_the_one_with_the_best_answers(name: str) -> None:
    assert recipe(name).best_metric == "val/answers/accuracy"


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("qa_msrvtt_stgt", 1500),
        ("qa_msvd_stgt", 2423),
        ("qa_msrvtt_alpro", 1500),
        ("qa_msvd_alpro", 2423),
        ("qa_msvd_alpro_tiny", len(answer_vocabulary())),
    ],
)
def test_estimates_count_a_classifier_of_the_expected_size(name: str, answers: int) -> None:
    model = recipe(name).model

    assert isinstance(model, AlproConfig | ModelConfig)
    assert model.num_answers == answers
