"""The learning rate follows its curve, and steps are those of AdamW."""

from __future__ import annotations

import pytest
import torch

from stgt.config import OptimConfig
from stgt.errors import SettingError
from stgt.precision import gradient_scaler
from stgt.training.optimizer import build_optimizer, learning_rate

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("decay", "halfway"),
    [("linear", 0.1 + 0.9 * 3 / 4), ("cosine", 0.1 + 0.9 * (1 + 2**-0.5) / 2)],
)
def test_the_learning_rate_by_hand(decay: str, halfway: float) -> None:
    """Two steps of warm-up, eight of decay from 1 to 0.1; step 4 has a quarter of it behind it."""
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=2, decay=decay)  # type: ignore[arg-type]
    rates = [learning_rate(step, 10, config) for step in range(11)]
    assert rates[:2] == pytest.approx([0.55, 1.0])
    assert rates[2] == pytest.approx(1.0)
    assert rates[4] == pytest.approx(halfway)
    assert rates[10] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_another_decay_is_refused() -> None:
    with pytest.raises(SettingError, match=r"optim\.decay = 'steps': must be cosine or linear"):
        OptimConfig(decay="steps")  # type: ignore[arg-type]


def linear() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def test_steps_are_those_of_adamw_by_hand() -> None:
    """With one gradient g, the first step is lr * g / (|g| + eps), after the decay of matrices."""
    layer, config = linear(), OptimConfig(lr=0.1, weight_decay=0.5)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    optimizer = build_optimizer(layer, config)
    layer(torch.tensor([[1.0, -2.0, 3.0]])).sum().backward()
    optimizer.step()
    direction = torch.tensor([1.0, -1.0, 1.0]).expand(2, 3)
    weight = before[0] * (1 - 0.1 * 0.5) - 0.1 * direction
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.bias.detach(), before[1] - 0.1, rtol=1e-5, atol=1e-6)


def test_an_overflow_changes_neither_weights_nor_moments() -> None:
    layer = linear()
    optimizer, scaler = build_optimizer(layer, OptimConfig(lr=0.1)), gradient_scaler("fp16", CPU)
    before = layer.weight.detach().clone()
    for factor in (torch.inf, 1.0):
        scaler.scale((layer(torch.ones(1, 3)) * factor).sum()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if factor == torch.inf:
            assert torch.equal(layer.weight, before)
            moments = (state["exp_avg"] for state in optimizer.state.values())
            assert all(bool((one == 0).all()) for one in moments)
    assert not torch.equal(layer.weight, before)
    assert [float(state["step"]) for state in optimizer.state.values()] == [1.0, 1.0]
