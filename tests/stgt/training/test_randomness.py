"""Generators that are seeded for a step."""

from __future__ import annotations

import pytest
import torch

from stgt.training.randomness import seed_generators


def test_the_state_is_that_after_manual_seed() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(5)
    torch.rand(3)
    seed_generators(7, torch.device("cpu"))
    assert torch.equal(torch.rand(5), wanted)


@pytest.mark.gpu
def test_the_state_of_a_gpu_is_that_after_manual_seed() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(5, device="cuda")
    seed_generators(7, torch.device("cuda"))
    assert torch.equal(torch.rand(5, device="cuda"), wanted)
