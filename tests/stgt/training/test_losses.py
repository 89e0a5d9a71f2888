"""Tests of the losses against hand-computed values, and of the choice of hard negatives."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from stgt.config import Targets
from stgt.network.similarity import video_text_similarity
from stgt.training.losses import (
    Pairs,
    caption_loss,
    choose_hard_negatives,
    contrastive_loss,
    matching_losses,
    same_pairs,
    self_similarity_targets,
)


def test_similarity_takes_the_best_query_token() -> None:
    videos = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    texts = torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    assert video_text_similarity(videos, texts).tolist() == [[pytest.approx(0.8), 1.0]]


def test_hard_contrastive_loss_of_two_pairs() -> None:
    embeds = torch.eye(2)
    pairs = Pairs(embeds[:, None], embeds)
    loss = contrastive_loss(pairs, pairs, torch.arange(2), torch.tensor(1.0), "hard")
    right, wrong = -math.log(math.e / (math.e + 1)), -math.log(1 / (math.e + 1))
    # label smoothing 0.1 over two classes: 0.95 for the correct one, 0.05 for the other
    assert loss.item() == pytest.approx(0.95 * right + 0.05 * wrong)


def test_pairs_that_resemble_each_other_share_the_target() -> None:
    embeds = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.1, 0.0], [0.0, 0.0, 1.0]]), dim=1
    )
    targets = self_similarity_targets(
        Pairs(embeds[:, None], embeds), Pairs(embeds[:, None], embeds)
    )
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(3))
    assert targets[0, 1] > 0.4
    assert targets[0, 2] == 0
    assert targets[2].tolist() == [0, 0, 1]


def test_gradients_flow_through_self_similarity_targets() -> None:
    embeds = torch.nn.functional.normalize(1 + torch.rand(4, 8), dim=1).requires_grad_()
    pairs = Pairs(embeds[:, None], embeds)
    self_similarity_targets(pairs, pairs)[0, 1].backward()
    assert embeds.grad is not None
    assert embeds.grad.abs().sum() > 0


def test_an_unknown_kind_of_target_is_refused() -> None:
    pairs = Pairs(torch.ones(2, 1, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match="soft"):
        contrastive_loss(pairs, pairs, torch.arange(2), torch.tensor(1.0), "soft")  # type: ignore[arg-type]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 1e-7])
def test_a_negative_is_never_the_own_pair(uniform: float) -> None:
    logits = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) + 50 * torch.eye(16)
    chosen = choose_hard_negatives(logits, torch.full((16,), uniform))
    assert (chosen != torch.arange(16)).all()


def test_negatives_follow_the_softmax() -> None:
    logits = torch.tensor([[9.0, 0.0, math.log(3.0)]]).expand(3, 3).clone()
    uniform = torch.linspace(0, 1, 10_001)[:-1]
    first = torch.stack([choose_hard_negatives(logits, u.expand(3))[0] for u in uniform[::10]])
    assert (first == 2).float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert (first == 1).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_one_pair_leaves_no_negative() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        choose_hard_negatives(torch.zeros(1, 1), torch.zeros(1))


def test_padding_does_not_count_in_the_caption_loss() -> None:
    logits = torch.zeros(1, 4, 5)
    ids = torch.tensor([[1, 2, 3, 0]])
    total, count = caption_loss(logits, ids, torch.tensor([[1, 1, 1, 0]]))
    assert count.item() == 2
    assert total.item() == pytest.approx(2 * math.log(5))


def random_pairs(count: int) -> Pairs:
    generator = torch.Generator().manual_seed(2)
    return Pairs(
        F.normalize(torch.randn(count, 2, 8, generator=generator), dim=-1),
        F.normalize(torch.randn(count, 8, generator=generator), dim=-1),
    )


@pytest.mark.parametrize(("targets", "published"), [("hard", 0.1), ("self_similarity", 0.01)])
@pytest.mark.parametrize("smoothing", [None, 0.0, 0.3])
def test_label_smoothing_of_the_contrastive_loss(
    targets: Targets, published: float, smoothing: float | None
) -> None:
    pairs, temperature = random_pairs(5), torch.tensor(0.2)
    loss = contrastive_loss(
        pairs, pairs, torch.arange(5), temperature, targets, label_smoothing=smoothing
    )
    share = published if smoothing is None else smoothing
    wanted = torch.eye(5) if targets == "hard" else self_similarity_targets(pairs, pairs)
    spread = (1 - share) * wanted + share / 5
    logits = video_text_similarity(pairs.video_embeds, pairs.text_embeds) / temperature
    by_hand = [-(spread * one.log_softmax(dim=1)).sum(dim=1).mean() for one in (logits, logits.T)]
    assert float(loss) == pytest.approx(float(sum(by_hand)) / 2, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing_of_the_matching_loss(smoothing: float) -> None:
    """With label m and smoothing s, the target of m is 1 - s / 2 and that of the other s / 2."""
    logits = torch.tensor([[0.3, 1.7], [2.0, -1.0]])
    found = matching_losses(logits, torch.tensor([1, 0]), smoothing)
    logs = logits.log_softmax(dim=1)
    first = -(1 - smoothing / 2) * logs[0, 1] - smoothing / 2 * logs[0, 0]
    second = -(1 - smoothing / 2) * logs[1, 0] - smoothing / 2 * logs[1, 1]
    assert found.tolist() == pytest.approx([float(first), float(second)], rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_label_smoothing_of_the_caption_loss(smoothing: float) -> None:
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[1, 2, 3, 0], [1, 4, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    total, count = caption_loss(logits, ids, mask, smoothing)
    steps = torch.cat([logits[0, :2], logits[1, :3]])
    wanted = F.one_hot(torch.tensor([2, 3, 4, 5, 6]), 7) * (1 - smoothing) + smoothing / 7
    assert int(count) == 5
    assert float(total) == pytest.approx(float(-(wanted * steps.log_softmax(dim=1)).sum()))


def test_pairs_of_the_same_clip_or_text_are_the_same() -> None:
    keys = torch.tensor([1, 2, 1, 3])
    ids = torch.tensor([[5, 6], [7, 0], [8, 0], [7, 0]])
    expected = torch.eye(4, dtype=torch.bool)
    expected[0, 2] = expected[2, 0] = True  # the clip
    expected[1, 3] = expected[3, 1] = True  # the text
    assert torch.equal(same_pairs(keys, ids), expected)


def test_hard_targets_are_shared_by_the_same_clip_or_text() -> None:
    """Worked by hand: two texts match video 0, so each has half of its target."""
    pairs = Pairs(
        F.normalize(torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0)), dim=-1),
        F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)), dim=-1),
    )
    same = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)
    loss = contrastive_loss(pairs, pairs, torch.arange(3), torch.tensor(0.5), "hard", same)
    logits = video_text_similarity(pairs.video_embeds, pairs.text_embeds) / 0.5
    targets = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
    targets = 0.9 * targets + 0.1 / 3
    by_hand = [-(targets * one.log_softmax(dim=1)).sum(dim=1).mean() for one in (logits, logits.T)]
    assert float(loss) == pytest.approx(float(sum(by_hand)) / 2, rel=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.7, 0.999999])
def test_the_same_clip_or_text_is_never_drawn_as_a_hard_negative(uniform: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 40 * torch.randn(24, 24, generator=generator)
    clips = torch.randint(0, 6, (24,), generator=generator)
    same = clips[:, None] == clips
    chosen = choose_hard_negatives(logits, torch.full((24,), uniform), same)
    assert not same[torch.arange(24), chosen].any()


def test_a_row_without_a_negative_gets_itself() -> None:
    same = torch.ones(3, 3, dtype=torch.bool)
    chosen = choose_hard_negatives(torch.zeros(3, 3), torch.full((3,), 0.5), same)
    assert chosen.tolist() == [0, 1, 2]
