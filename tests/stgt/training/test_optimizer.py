"""The learning rate rises during the warm-up and then falls along its curve."""

from __future__ import annotations

import pytest

from stgt.config import OptimConfig
from stgt.errors import SettingError
from stgt.training.optimizer import learning_rate


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
