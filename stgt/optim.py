"""Parameter groups and the learning-rate schedule: AdamW, linear warm-up, cosine decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine decay."""

    lr: float = 2.5e-5
    """Highest learning rate, reached after the warm-up."""
    min_lr: float = 1e-6
    """Learning rate at the start of the warm-up and at the end of the decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; vectors and scalars have none."""
    beta1: float = 0.9
    """AdamW's first decay rate."""
    beta2: float = 0.98
    """AdamW's second decay rate."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this L2 norm."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"optim.lr = {self.lr}: must be at least optim.min_lr ({self.min_lr})")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps = {self.warmup_steps}: must not be negative")
        if self.max_grad_norm <= 0:
            raise ValueError(f"optim.max_grad_norm = {self.max_grad_norm}: must be positive")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; only matrices decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of a step, counted from 0: a pure function, so a restart needs no state."""
    if step < config.warmup_steps:
        return config.min_lr + (config.lr - config.min_lr) * (step + 1) / config.warmup_steps
    remaining = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / remaining)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
