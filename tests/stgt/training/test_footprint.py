"""The estimated memory of a training step, against a count of what a real one keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stgt.config import OptimConfig, Precision
from stgt.inputs.tokenizer import TextTokens
from stgt.interface.inputs import VideoTextConfig
from stgt.interface.kinds import build
from stgt.model import STGT
from stgt.precision import autocast, keep_frozen_weights_in
from stgt.training.footprint import training_footprint
from stgt.training.objective import TrainingObjective, total_loss
from stgt.training.optimizer import build_optimizer
from tests.helpers.models import CONFIGS

CPU = torch.device("cpu")


def frozen_stgt() -> VideoTextConfig:
    config = CONFIGS["stgt"]()
    return replace(config, vision=replace(config.vision, frozen=True))  # type: ignore[attr-defined]


def checkpointed_stgt() -> VideoTextConfig:
    return replace(CONFIGS["stgt"](), gradient_checkpointing=True)  # type: ignore[type-var]


def real_bytes(config: VideoTextConfig, precision: Precision, count: int) -> tuple[int, int, int]:
    """Train one step, and return the bytes of weights, of gradients and moments, and of what is
    kept for the backward pass."""
    torch.manual_seed(0)
    model = build(config).train()
    keep_frozen_weights_in(precision, model)
    optimizer = build_optimizer(model, OptimConfig())
    inputs = config.inputs
    shape = (count, inputs.num_frames, inputs.image_size, inputs.image_size, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8)
    ids = torch.randint(1, 100, (count, inputs.max_text_tokens))
    text = TextTokens(ids, torch.ones_like(ids))
    weights = {
        one.untyped_storage().data_ptr(): one.untyped_storage() for one in model.parameters()
    }
    kept: dict[int, torch.UntypedStorage] = {}

    def count_once(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    objective = TrainingObjective(model, "hard")
    with (
        autocast(precision, CPU),
        torch.autograd.graph.saved_tensors_hooks(count_once, lambda tensor: tensor),
    ):
        losses = objective(frames, text, torch.arange(count), 0)
    total_loss(losses).backward()
    optimizer.step()
    gradients = sum(one.grad.nbytes for one in model.parameters() if one.grad is not None)
    moments = sum(
        tensor.nbytes
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    )
    return (
        sum(storage.nbytes() for storage in weights.values()),
        gradients + moments,
        sum(storage.nbytes() for storage in kept.values()),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "precision"),
    [
        pytest.param(CONFIGS["stgt"], "fp32", id="stgt"),
        pytest.param(frozen_stgt, "bf16", id="frozen encoder in bf16"),
        pytest.param(CONFIGS["stgt"], "bf16", id="stgt in bf16", marks=pytest.mark.soak),
        pytest.param(checkpointed_stgt, "fp32", id="checkpointing", marks=pytest.mark.soak),
        pytest.param(CONFIGS["alpro"], "fp32", id="alpro", marks=pytest.mark.soak),
        pytest.param(CONFIGS["dual_encoder"], "fp32", id="clip"),
    ],
)
def test_the_estimate_is_what_a_step_keeps(make, precision: Precision) -> None:
    config = make()
    estimated = training_footprint(config, precision, 4, config.inputs.num_frames, "hard")
    weights, of_optimizer, kept = real_bytes(config, precision, 4)
    assert estimated.weight_bytes == pytest.approx(weights, rel=0.01)
    assert estimated.optimizer_bytes == pytest.approx(of_optimizer, rel=0.01)
    assert estimated.activation_bytes == pytest.approx(kept, rel=0.03)


def test_twice_the_clips_keep_twice_as_much() -> None:
    config = CONFIGS["stgt"]()
    kept = [real_bytes(config, "fp32", count)[2] for count in (4, 8)]
    assert kept[1] == pytest.approx(2 * kept[0], rel=0.05)


def test_a_frozen_encoder_is_counted_at_half_size() -> None:
    model = build(frozen_stgt())
    assert isinstance(model, STGT)
    encoder = sum(one.nbytes for one in model.frame_encoder.parameters())
    whole = real_bytes(frozen_stgt(), "fp32", 4)[0]
    assert real_bytes(frozen_stgt(), "bf16", 4)[0] == pytest.approx(whole - encoder / 2, rel=0.01)
