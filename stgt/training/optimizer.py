"""AdamW parameter groups, and the learning-rate schedule: linear warm-up, then decay."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from stgt.config import OptimConfig

ENCODER_BLOCK = "frame_encoder.vit.blocks."
ENCODER = "frame_encoder."


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters, with weight decay for matrices only.

    With `layer_decay` below 1, the learning rate of each block of the frame encoder is that factor
    times the rate of the layer above it, as in timm and BEiT. All modules above the encoder use the
    full rate.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    depth = 1 + max((_block(name) for name, _ in named), default=-1)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        scale = config.layer_decay ** _layers_above(name, depth)
        groups.setdefault((scale, parameter.ndim >= 2), []).append(parameter)
    # Matrices first: checkpoints number parameters in this order.
    ordered = sorted(groups.items(), key=lambda group: (not group[0][1], -group[0][0]))
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if decays else 0.0,
                "lr_scale": scale,
            }
            for (scale, decays), parameters in ordered
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=True,  # one kernel for all parameters instead of several for each
    )


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
