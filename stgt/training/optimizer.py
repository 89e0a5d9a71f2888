"""The optimizer with its parameter groups, and the learning rate: linear warm-up, then decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from stgt.config import OptimConfig
from stgt.training.muon import MOMENTUM_STATE, ORTHOGONAL, Muon, matrices_for_muon

ENCODER_BLOCK = "frame_encoder.vit.blocks."
ENCODER = "frame_encoder."


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer of the trainable parameters, with weight decay for matrices only.

    With `layer_decay` below 1, the learning rate of each block of the frame encoder is that factor
    times the rate of the layer above it, as in timm and BEiT. All modules above the encoder use the
    full rate.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    depth = 1 + max((_block(name) for name, _ in named), default=-1)
    with_muon = set(matrices_for_muon(model)) if config.optimizer == "muon" else set()
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        scale = config.layer_decay ** _layers_above(name, depth)
        key = (parameter not in with_muon, parameter.ndim < 2, -scale)
        groups.setdefault(key, []).append(parameter)
    # Matrices first: checkpoints number parameters in this order.
    parameter_groups: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": 0.0 if is_vector else config.weight_decay,
            "lr_scale": -negative_scale,
        }
        | ({} if by_adamw else {ORTHOGONAL: True})
        for (by_adamw, is_vector, negative_scale), parameters in sorted(
            groups.items(), key=lambda group: group[0]
        )
    ]
    betas = (config.beta1, config.beta2)
    if config.optimizer == "muon":
        return Muon(parameter_groups, lr=config.lr, betas=betas)
    # Fused: one kernel for all parameters instead of several for each.
    return torch.optim.AdamW(parameter_groups, lr=config.lr, betas=betas, fused=True)


def state_shapes(group: Mapping[str, Any], parameter: torch.Tensor) -> dict[str, torch.Size]:
    """Return the shapes of the state that an optimizer keeps of a parameter of a group, by name."""
    if group.get(ORTHOGONAL):
        return {"step": torch.Size(), MOMENTUM_STATE: parameter.shape}
    return {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}


def _block(name: str) -> int:
    """Return the index of the encoder block that a parameter belongs to, or -1 if none."""
    if not name.startswith(ENCODER_BLOCK):
        return -1
    return int(name.removeprefix(ENCODER_BLOCK).split(".")[0])


def _layers_above(name: str, depth: int) -> int:
    if not name.startswith(ENCODER):
        return 0
    return depth - _block(name)  # layers below the first block count as one more


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of a step, counted from 0. A restart needs no scheduler state."""
    if step < config.warmup_steps:
        return config.min_lr + (config.lr - config.min_lr) * (step + 1) / config.warmup_steps
    remaining = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / remaining)
    if config.decay == "linear":
        return config.min_lr + (config.lr - config.min_lr) * (1 - progress)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups, scaled by their layer decay."""
    group: dict[str, Any]
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
