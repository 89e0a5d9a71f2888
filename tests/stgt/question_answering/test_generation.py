"""Answers that are generated: their loss, their likelihoods, and which parameters they train."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stgt.config import stgt_tiny
from stgt.errors import CheckpointError, SettingError
from stgt.inputs.tokenizer import TextTokens
from stgt.model import STGT
from stgt.model_folder import load_model, save_model
from stgt.question_answering.answering import rank_answers
from stgt.question_answering.generation import tokenize_answers
from stgt.question_answering.head import answer_logits, answer_losses, freeze_unused
from stgt.question_answering.objective import AnswerObjective
from stgt.question_answering.vocabulary import AnswerVocabulary
from stgt.training.footprint import training_footprint
from tests.helpers.models import small_tokenizer

ANSWERS = ("red", "blue ball", "left then right", "square")
QUESTIONS = ["a ball moves then stops", "red", "a blue square moves left"]
LENGTH = 9


@pytest.fixture
def model(tmp_path: Path) -> STGT:
    tokenizer = small_tokenizer(tmp_path)
    config = replace(
        stgt_tiny().for_tokenizer(tokenizer), num_answers=len(ANSWERS), answering="generation"
    )
    torch.manual_seed(0)
    model = STGT(config, tokenizer).eval()
    model.answers = AnswerVocabulary(ANSWERS)
    return model


def questions_of(model: STGT) -> TextTokens:
    assert model.tokenizer is not None
    return model.tokenizer(QUESTIONS, LENGTH)


def frames_of(count: int = len(QUESTIONS)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 3, 64, 64, 3), dtype=torch.uint8, generator=generator)


def log_likelihood(model: STGT, tokens: torch.Tensor, question: str, answer: str) -> float:
    """One token after the other, each by a pass over everything before it."""
    assert model.tokenizer is not None
    ids = {}
    for text in (question, answer):
        text_ids = model.tokenizer([text], 20)
        ids[text] = text_ids.input_ids[0, : int(text_ids.attention_mask.sum())].tolist()
    before = [model.config.bos_id, *ids[question][1:]]
    total = 0.0
    for word in ids[answer][1:]:
        given = torch.tensor([before])
        _, logits = model.qformer.encode_causal(tokens[None], given, torch.ones_like(given))
        total += float(logits[0, -1].log_softmax(dim=0)[word])
        before.append(word)
    return total


@torch.no_grad()
def test_likelihoods_and_losses_are_those_of_generating_word_by_word(model: STGT) -> None:
    tokens, questions = model.video_tokens(frames_of()), questions_of(model)
    expected = torch.tensor(
        [
            [log_likelihood(model, clip, question, answer) for answer in ANSWERS]
            for clip, question in zip(tokens, QUESTIONS, strict=True)
        ]
    )

    torch.testing.assert_close(answer_logits(model, tokens, questions), expected)
    for label in range(len(ANSWERS)):
        labels = torch.full((len(QUESTIONS),), label)
        losses = answer_losses(model, tokens, questions, labels)
        torch.testing.assert_close(losses, -expected[:, label])


@torch.no_grad()
def test_the_first_answers_of_a_longer_vocabulary_have_the_same_likelihoods(model: STGT) -> None:
    """Answers are scored in parts, and padding beside a longer answer changes nothing."""
    words = ("ball", "square", "moves", "left", "right")
    many = tuple(dict.fromkeys(" ".join(some) for some in itertools.product(words, repeat=4)))
    tokens, questions = model.video_tokens(frames_of()), questions_of(model)
    few = answer_logits(model, tokens, questions)

    model.answers, model.answer_tokens = AnswerVocabulary((*ANSWERS, *many)), None
    found = answer_logits(model, tokens, questions)

    assert found.shape == (len(QUESTIONS), len(ANSWERS) + 625)
    torch.testing.assert_close(found[:, : len(ANSWERS)], few)


@torch.no_grad()
def test_all_sequences_together_have_no_more_than_the_whole_probability(model: STGT) -> None:
    """Answers of one word and all continuations: an answer ends with a token of its own."""
    assert model.tokenizer is not None
    words = [entry for entry in model.tokenizer.entries() if not entry.startswith("[")]
    model.answers, model.answer_tokens = AnswerVocabulary(tuple(words)), None

    found = answer_logits(model, model.video_tokens(frames_of(1)), questions_of(model))

    assert (found.exp().sum(dim=1) < 1).all()


def test_exactly_the_parameters_that_answers_do_not_depend_on_are_frozen(model: STGT) -> None:
    labels = torch.arange(len(QUESTIONS))
    AnswerObjective(model)(frames_of(), questions_of(model), labels)["answer"].backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}

    freeze_unused(model, model.unused_when_answering())

    assert model.classifier is None
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert unused == frozen


@pytest.mark.slow
def test_a_tiny_model_learns_generated_answers_by_heart(model: STGT) -> None:
    model.train()
    frames, questions = frames_of(), questions_of(model)
    labels = torch.tensor([2, 0, 1])
    freeze_unused(model, model.unused_when_answering())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    objective = AnswerObjective(model)
    for _ in range(25):
        optimizer.zero_grad()
        objective(frames, questions, labels)["answer"].backward()
        optimizer.step()

    model.eval()
    best = rank_answers(model, model.video_tokens(frames), torch.arange(3), questions, most=2)
    assert torch.equal(best.labels[:, 0], labels)
    assert (best.probabilities[:, 0] > 0.5).all()


def test_a_saved_model_generates_the_same_answers(model: STGT, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(model, folder)

    loaded = load_model(folder).eval()

    assert isinstance(loaded, STGT)
    tokens = model.video_tokens(frames_of())
    with torch.no_grad():
        torch.testing.assert_close(
            answer_logits(loaded, tokens, questions_of(model)),
            answer_logits(model, tokens, questions_of(model)),
        )


def test_different_answers_stay_different(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path)

    found = tokenize_answers(tokenizer, AnswerVocabulary(("red", "left then right")))

    assert found.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert found.input_ids[0, 1] == found.input_ids[1, 3] == tokenizer.sep_id


def test_a_model_without_its_answers_says_so(model: STGT) -> None:
    model.answers = None

    with pytest.raises(CheckpointError, match="no answer vocabulary"):
        answer_logits(model, model.video_tokens(frames_of()), questions_of(model))


def test_texts_beyond_the_last_position_are_refused(model: STGT) -> None:
    assert model.tokenizer is not None
    questions = model.tokenizer(QUESTIONS, model.config.qformer.max_position - 2)

    with pytest.raises(SettingError, match="exceed the 64 positions of the Q-Former"):
        answer_logits(model, model.video_tokens(frames_of()), questions)


@pytest.mark.slow
def test_the_memory_of_a_training_is_estimated(model: STGT) -> None:
    generated: Any = model.config
    found = training_footprint(generated, "fp32", 4, 3, "hard")
    classified: Any = replace(model.config, answering="classification", num_answers=1500)

    assert found.flops > 0
    assert found.trained < training_footprint(classified, "fp32", 4, 3, "hard").trained
