"""The classifier, its loss, and which parameters it trains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from stgt.config import stgt_tiny
from stgt.errors import CheckpointError, TooFewPairsError
from stgt.inputs.tokenizer import TextTokens
from stgt.model import STGT
from stgt.question_answering.answering import rank_answers
from stgt.question_answering.head import answer_logits, freeze_unused
from stgt.question_answering.objective import AnswerObjective

CLIPS, ANSWERS, LENGTH = 5, 7, 9


def make_model(num_answers: int = ANSWERS) -> STGT:
    torch.manual_seed(0)
    return STGT(replace(stgt_tiny(), num_answers=num_answers)).eval()


def make_batch() -> tuple[torch.Tensor, TextTokens, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(256, (CLIPS, 3, 64, 64, 3), dtype=torch.uint8, generator=generator)
    ids = torch.randint(1, 255, (CLIPS, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    answers = torch.randint(ANSWERS, (CLIPS,), generator=generator)
    return frames, TextTokens(ids, mask), answers


def test_a_classifier_changes_no_other_weight() -> None:
    without, with_one = make_model(0), make_model()

    theirs = with_one.state_dict()
    assert {name for name in theirs if name not in without.state_dict()} == {
        f"classifier.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    assert all(torch.equal(value, theirs[name]) for name, value in without.state_dict().items())


def test_logits_are_those_of_the_query_states_averaged() -> None:
    model = make_model()
    frames, text, _ = make_batch()
    tokens = model.video_tokens(frames)

    logits = answer_logits(model, tokens, text)

    states = model.qformer.encode_pairs(tokens, text.input_ids, text.attention_mask).mean(dim=1)
    assert model.classifier is not None
    weights = dict(model.classifier.named_parameters())
    inner = F.relu(F.linear(states, weights["0.weight"], weights["0.bias"]))
    expected = F.linear(inner, weights["2.weight"], weights["2.bias"])
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(
        model.match(tokens, text),
        model.itm_head(
            model.qformer.encode_pairs(tokens, text.input_ids, text.attention_mask)
        ).mean(dim=1),
    )


def test_a_model_without_classifier_says_so() -> None:
    model = make_model(0)
    frames, text, _ = make_batch()

    with pytest.raises(CheckpointError, match="no classifier of answers"):
        answer_logits(model, model.video_tokens(frames), text)


def test_loss_is_the_mean_cross_entropy_of_clips_that_could_be_read() -> None:
    model = make_model()
    frames, text, answers = make_batch()
    valid = torch.tensor([True, True, False, True, False])

    losses = AnswerObjective(model)(frames, text, answers, valid)

    logits = answer_logits(model, model.video_tokens(frames), text)
    expected = F.cross_entropy(logits[valid], answers[valid])
    torch.testing.assert_close(losses["answer"], expected)


def test_a_batch_without_any_readable_clip_is_an_error() -> None:
    frames, text, answers = make_batch()

    with pytest.raises(TooFewPairsError):
        AnswerObjective(make_model())(frames, text, answers, torch.zeros(CLIPS, dtype=torch.bool))


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_accumulated_passes_give_the_gradients_of_one_pass(micro_batch: int) -> None:
    model = make_model()
    frames, text, answers = make_batch()
    valid = torch.tensor([True, True, False, True, True])
    objective = AnswerObjective(model)
    losses = objective(frames, text, answers, valid)
    losses["answer"].backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    found = objective.accumulate(
        frames, text, answers, valid, micro_batch=micro_batch, seed=0, scale=2.0
    )

    torch.testing.assert_close(found["answer"], losses["answer"].detach())
    for name, gradient in expected.items():
        given = model.get_parameter(name).grad
        assert given is not None
        torch.testing.assert_close(given / 2, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_exactly_the_parameters_that_answers_do_not_depend_on_are_frozen() -> None:
    model = make_model()
    frames, text, answers = make_batch()
    AnswerObjective(model)(frames, text, answers)["answer"].backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}

    freeze_unused(model, model.unused_when_answering())

    assert unused == {name for name, p in model.named_parameters() if not p.requires_grad}


def test_ranked_answers_are_the_most_probable_ones_in_any_batch_size() -> None:
    model = make_model()
    frames, text, _ = make_batch()
    tokens = model.video_tokens(frames).detach()
    clips = torch.tensor([2, 0, 0, 4, 1])

    found = rank_answers(model, tokens, clips, text, most=3, batch_pairs=2)

    expected = answer_logits(model, tokens[clips], text).softmax(dim=1)
    order = expected.argsort(dim=1, descending=True)[:, :3]
    assert torch.equal(found.labels, order)
    torch.testing.assert_close(found.probabilities, expected.gather(1, order))


@pytest.mark.slow
def test_a_tiny_model_learns_answers_by_heart() -> None:
    model = make_model().train()
    frames, text, answers = make_batch()
    freeze_unused(model, model.unused_when_answering())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    objective = AnswerObjective(model)
    for _ in range(25):
        optimizer.zero_grad()
        objective(frames, text, answers)["answer"].backward()
        optimizer.step()

    model.eval()
    best = rank_answers(model, model.video_tokens(frames), torch.arange(CLIPS), text, most=1)
    assert torch.equal(best.labels[:, 0], answers)
