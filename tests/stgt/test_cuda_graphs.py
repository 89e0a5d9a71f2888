"""Passes that a GPU replays compute what they computed before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from stgt.config import ModelConfig, stgt_tiny
from stgt.cuda_graphs import ReplayedPass
from stgt.inputs.tokenizer import TextTokens
from stgt.model import STGT
from stgt.training.objective import Losses, TrainingObjective, total_loss

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CLIPS, SHAPE = 4, (2, 64, 64, 3)
SUMS = 1e-4
"""Tolerance: sums of gradients are in another order."""


def config(dropout: float) -> ModelConfig:
    tiny = stgt_tiny()
    return replace(
        tiny,
        graph=replace(tiny.graph, attention_dropout=0.0),
        qformer=replace(tiny.qformer, dropout=dropout),
    )


def make(device: str, replays: bool, dropout: float = 0.0) -> STGT:
    """Make a model without compilation, which would choose other kernels."""
    torch.manual_seed(0)
    model = STGT(config(dropout)).to(device).train()
    if replays:
        compiled = (model.frame_encoder, model.graph, model.qformer)
        names = ("compile_blocks", "compile_blocks", "compile_layers")
        for part, name in zip(compiled, names, strict=True):
            setattr(part, name, lambda: None)
        model.compile_blocks(cuda_graphs=True)
    return model


def lose(model: STGT, clips: int = CLIPS, seed: int = 0) -> Losses:
    device = model.temperature.device
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (clips, *SHAPE), dtype=torch.uint8, generator=generator)
    ids = torch.randint(1, 50, (clips, 6), generator=generator)
    text = TextTokens(ids, torch.ones_like(ids)).to(device)
    torch.manual_seed(seed)
    positions = torch.arange(clips, device=device)
    return TrainingObjective(model, "hard")(frames.to(device), text, positions, seed)


def gradients(model: STGT) -> dict[str, torch.Tensor]:
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def step(model: STGT, clips: int = CLIPS, seed: int = 0) -> Losses:
    model.zero_grad(set_to_none=True)
    losses = lose(model, clips, seed)
    total_loss(losses).backward()
    return {name: loss.detach().clone() for name, loss in losses.items()}


def counted() -> tuple[Callable[[torch.Tensor], tuple[torch.Tensor]], list[int], nn.Linear]:
    calls, layer = [0], nn.Linear(3, 3)

    def function(given: torch.Tensor) -> tuple[torch.Tensor]:
        calls[0] += 1
        return (layer(given),)

    return function, calls, layer


def test_without_a_gpu_a_pass_is_its_function() -> None:
    function, calls, layer = counted()
    replayed = ReplayedPass(function, [layer])
    given = torch.randn(2, 3, requires_grad=True)
    (found,) = replayed(given)
    torch.testing.assert_close(found, layer(given))
    assert calls == [1]


def test_a_model_without_a_gpu_has_the_same_losses_names_and_gradients() -> None:
    found, wanted = make("cpu", replays=True), make("cpu", replays=False)
    assert list(found.state_dict()) == list(wanted.state_dict())
    assert step(found) == step(wanted)
    assert gradients(found).keys() == gradients(wanted).keys()


def test_gradients_of_replayed_passes_are_not_accumulated() -> None:
    model = make("cpu", replays=True)
    ids, positions = torch.ones(2, 6, dtype=torch.int64), torch.arange(2)
    given = torch.zeros(2, *SHAPE, dtype=torch.uint8), TextTokens(ids, torch.ones_like(ids))
    with pytest.raises(ValueError, match="cannot be accumulated"):
        TrainingObjective(model, "hard").accumulate(*given, positions, 0, micro_batch=1, seed=0)


@pytest.mark.gpu
@needs_gpu
def test_replayed_passes_have_the_losses_and_gradients_of_the_functions() -> None:
    found, wanted = make("cuda", replays=True), make("cuda", replays=False)
    for seed in (0, 1, 2, 0):
        torch.testing.assert_close(step(found, seed=seed), step(wanted, seed=seed))
        ours, theirs = gradients(found), gradients(wanted)
        assert ours.keys() == theirs.keys()
        torch.testing.assert_close(ours, theirs, rtol=SUMS, atol=SUMS)


@pytest.mark.gpu
@needs_gpu
def test_replayed_passes_see_changed_weights() -> None:
    found, wanted = make("cuda", replays=True), make("cuda", replays=False)
    for model in (found, wanted):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for seed in range(3):
            step(model, seed=seed)
            optimizer.step()
    torch.testing.assert_close(step(found), step(wanted), rtol=SUMS, atol=SUMS)


@pytest.mark.gpu
@needs_gpu
def test_other_sizes_evaluation_and_no_gradients_run_the_function() -> None:
    found, wanted = make("cuda", replays=True), make("cuda", replays=False)
    step(found)
    torch.testing.assert_close(step(found, clips=3), step(wanted, clips=3))
    with torch.no_grad():
        torch.testing.assert_close(lose(found), lose(wanted))
    torch.testing.assert_close(step(found.eval()), step(wanted.eval()))
    torch.testing.assert_close(step(found.train()), step(wanted.train()))


@pytest.mark.gpu
@needs_gpu
def test_dropout_depends_on_the_seed_alone() -> None:
    """A training that was resumed captures in another step than one that was not."""
    whole, resumed = make("cuda", True, dropout=0.3), make("cuda", True, dropout=0.3)
    losses = [step(whole, seed=seed) for seed in (1, 2, 3)]
    torch.testing.assert_close(step(resumed, seed=3), losses[2])
    assert not torch.equal(step(whole, seed=1)["lm"], step(whole, clips=CLIPS, seed=2)["lm"])
    torch.testing.assert_close(step(whole, seed=1), losses[0])
    plain = make("cuda", False, dropout=0.3)
    torch.testing.assert_close(step(plain, seed=3), losses[2])


@pytest.mark.gpu
@needs_gpu
def test_a_pass_is_captured_once() -> None:
    function, calls, layer = counted()
    layer.cuda()
    replayed = ReplayedPass(function, [layer])
    given = torch.randn(2, 3, device="cuda", requires_grad=True)
    (first,) = replayed(given)
    first.sum().backward()
    captured = calls[0]
    (again,) = replayed(given)
    again.sum().backward()
    assert calls == [captured]
    replayed(torch.randn(5, 3, device="cuda", requires_grad=True))
    assert calls == [captured + 1]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_replayed_passes_agree_in_half_precision(dtype: torch.dtype) -> None:
    found, wanted = make("cuda", replays=True), make("cuda", replays=False)
    for seed in (0, 1):
        with torch.autocast("cuda", dtype):
            ours, theirs = lose(found, seed=seed), lose(wanted, seed=seed)
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
        for model, losses in ((found, ours), (wanted, theirs)):
            model.zero_grad(set_to_none=True)
            total_loss(losses).backward()
        norms = [torch.nn.utils.get_total_norm(gradients(one).values()) for one in (found, wanted)]
        torch.testing.assert_close(*norms, rtol=0.05, atol=0.05)


@pytest.mark.gpu
@needs_gpu
def test_a_copy_leaves_the_weights_of_the_original_alone() -> None:
    model, wanted = make("cuda", replays=True), make("cuda", replays=False)
    step(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for one in (copied, wanted):
            one.itm_head.weight.mul_(2)
    kept = model.itm_head.weight.detach().clone()
    torch.testing.assert_close(step(copied), step(wanted))
    torch.testing.assert_close(model.itm_head.weight, kept, rtol=0, atol=0)


@pytest.mark.gpu
@needs_gpu
def test_new_parameters_are_noticed() -> None:
    function, calls, layer = counted()
    layer.cuda()
    replayed = ReplayedPass(function, [layer])
    given = torch.randn(2, 3, device="cuda", requires_grad=True)
    replayed(given)[0].sum().backward()
    captured = calls[0]
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    (found,) = replayed(given)
    assert calls[0] == captured + 1
    torch.testing.assert_close(found, layer.bias.expand_as(found))
