"""Matrices of linear layers are updated by Muon, all other parameters by AdamW."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from stgt.config import OptimConfig, stgt_tiny
from stgt.errors import CheckpointMismatchError, SettingError
from stgt.model import STGT
from stgt.model_folder import load_optimizer, save_optimizer
from stgt.precision import gradient_scaler
from stgt.training.footprint import training_footprint
from stgt.training.muon import matrices_for_muon
from stgt.training.optimizer import build_optimizer

MUON = OptimConfig(lr=0.1, weight_decay=0.0, optimizer="muon")
ADAMW = OptimConfig(lr=0.1, weight_decay=0.0)


class Small(nn.Module):
    """A model with every sort of parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(10, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.wide = nn.Linear(8, 24)
        self.head = nn.Linear(24, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states = self.words(ids)
        states = self.norm(states + self.attention(states, states, states)[0])
        return self.head(self.wide(self.second(self.first(states).relu()).relu()))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(10, (4, 5), generator=generator)
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten() % 2).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_an_update_is_the_orthogonal_matrix_next_to_the_momentum() -> None:
    """Of the gradient U S V^T, whose singular values span a factor of 1,000, remains U V^T."""
    torch.manual_seed(1)
    layer = nn.Linear(12, 6, bias=False)
    before = layer.weight.detach().clone()
    u, _, vh = torch.linalg.svd(torch.randn(6, 12), full_matrices=False)
    layer.weight.grad = u @ torch.diag(torch.logspace(0, -3, 6)) @ vh
    build_optimizer(layer, MUON).step()
    update = (before - layer.weight.detach()) / (0.1 * 0.2 * 12**0.5)
    along = torch.diagonal(u.T @ update @ vh.T)
    # Five iterations bring singular values close to 1: Jordan et al. give the range 0.7 to 1.2.
    assert along[:4].min() > 0.6
    assert along.max() < 1.3
    assert along[5] > 0.1  # 0.001 of the largest in the gradient
    rest = u.T @ update @ vh.T - torch.diag(along)
    assert rest.abs().max() < 1e-4


def test_updates_have_the_size_of_those_of_adamw() -> None:
    torch.manual_seed(2)
    for rows, columns in ((32, 32), (96, 32), (32, 96)):
        layer = nn.Linear(columns, rows, bias=False)
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.randn(rows, columns)
        build_optimizer(layer, MUON).step()
        size = (layer.weight.detach() - before).square().mean().sqrt() / 0.1
        assert 0.12 < size < 0.25  # 0.2 if all singular values were 1


def test_matrices_of_linear_layers_are_updated_by_muon_and_nothing_else() -> None:
    model = Small()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(matrix)] for matrix in matrices_for_muon(model)} == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "first.weight",
        "second.weight",
        "wide.weight",
    }
    model.first.weight.requires_grad_(False)
    assert "first.weight" not in {names[id(matrix)] for matrix in matrices_for_muon(model)}


def test_the_tiny_model_keeps_its_embeddings_and_its_match_head_with_adamw() -> None:
    model = STGT(stgt_tiny())
    with_muon = {id(matrix) for matrix in matrices_for_muon(model)}
    others = {
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in with_muon and parameter.ndim >= 2
    }
    assert others == {
        "frame_encoder.vit.cls_token",
        "frame_encoder.vit.pos_embed",
        "frame_encoder.vit.patch_embed.proj.weight",
        "graph.time_embed",
        "graph.proj",
        "qformer.query_tokens",
        "qformer.word_embeddings.weight",
        "qformer.position_embeddings.weight",
        "itm_head.weight",
    }


def test_other_parameters_take_the_steps_of_adamw() -> None:
    models = Small(), Small()
    for model, config in zip(models, (MUON, ADAMW), strict=True):
        train(model, build_optimizer(model, config), 1)
    with_muon = {id(matrix) for matrix in matrices_for_muon(models[0])}
    for (name, one), other in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        if id(one) in with_muon:
            assert not torch.equal(one, other), name
        else:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_matrices_of_one_shape_do_not_influence_each_other() -> None:
    """They are orthogonalized in one batch."""
    torch.manual_seed(3)
    gradients = torch.randn(2, 8, 8)
    first, second, alone = (nn.Linear(8, 8, bias=False) for _ in range(3))
    alone.load_state_dict(second.state_dict())
    first.weight.grad, second.weight.grad = gradients[0], gradients[1].clone()
    alone.weight.grad = gradients[1].clone()
    build_optimizer(nn.Sequential(first, second), MUON).step()
    build_optimizer(alone, MUON).step()
    torch.testing.assert_close(second.weight, alone.weight, rtol=1e-5, atol=1e-6)


def test_a_resumed_training_takes_the_same_steps(tmp_path: Path) -> None:
    whole, halves = Small(), Small()
    optimizer = build_optimizer(whole, MUON)
    train(whole, optimizer, 3)
    train(whole, optimizer, 3, seed=1)
    first = build_optimizer(halves, MUON)
    train(halves, first, 3)
    save_optimizer(first, tmp_path / "optimizer.safetensors")
    second = build_optimizer(halves, MUON)
    load_optimizer(second, tmp_path / "optimizer.safetensors")
    train(halves, second, 3, seed=1)
    for one, other in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("saved", "loaded"), [(ADAMW, MUON), (MUON, ADAMW)])
def test_the_state_of_the_other_optimizer_is_refused(
    saved: OptimConfig, loaded: OptimConfig, tmp_path: Path
) -> None:
    model = Small()
    optimizer = build_optimizer(model, saved)
    train(model, optimizer, 1)
    save_optimizer(optimizer, tmp_path / "optimizer.safetensors")
    with pytest.raises(CheckpointMismatchError, match=r"optimizer\.safetensors"):
        load_optimizer(build_optimizer(model, loaded), tmp_path / "optimizer.safetensors")


def test_an_overflow_changes_no_weight() -> None:
    model = Small()
    optimizer = build_optimizer(model, MUON)
    scaler = gradient_scaler("fp16", torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for factor in (torch.inf, 1.0):
        scaler.scale((model(torch.arange(8).view(2, 4)) * factor).sum()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        unchanged = [
            torch.equal(one, other)
            for one, other in zip(model.parameters(), before, strict=True)
            if other.abs().sum() > 0
        ]
        assert all(unchanged) if factor == torch.inf else not any(unchanged)


def test_weight_decay_and_the_learning_rate_of_a_group_apply_to_matrices() -> None:
    layer = nn.Linear(8, 8, bias=False)
    before = layer.weight.detach().clone()
    optimizer = build_optimizer(layer, OptimConfig(lr=0.1, weight_decay=0.5, optimizer="muon"))
    layer.weight.grad = torch.zeros(8, 8)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before * (1 - 0.1 * 0.5))
    optimizer.param_groups[0]["lr"] = 0.0
    layer.weight.grad = torch.randn(8, 8)
    decayed = layer.weight.detach().clone()
    optimizer.step()
    assert torch.equal(layer.weight, decayed)


@pytest.mark.slow
def test_the_estimate_counts_one_moment_of_a_matrix() -> None:
    config = stgt_tiny()
    adamw, muon = (
        training_footprint(config, "fp32", 2, 2, "hard", optimizer=name)
        for name in ("adamw", "muon")
    )
    numbers = sum(matrix.numel() for matrix in matrices_for_muon(STGT(config)))
    assert adamw.checkpoint_bytes - muon.checkpoint_bytes == 4 * numbers
    assert adamw.optimizer_bytes - muon.optimizer_bytes == 4 * numbers


def test_another_optimizer_is_refused() -> None:
    with pytest.raises(SettingError, match=r"optim\.optimizer = 'sgd': must be adamw or muon"):
        OptimConfig(optimizer="sgd")  # type: ignore[arg-type]
