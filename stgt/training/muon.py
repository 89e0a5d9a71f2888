"""The optimizer Muon, with AdamW for all parameters other than the matrices of linear layers.

Muon replaces the update of a matrix by the nearest orthogonal matrix (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/), so that directions in which the gradient is weak are
learned as fast as the strong ones. Updates are scaled to the root mean square of AdamW's, so one
learning rate serves both (Liu et al. 2025, https://arxiv.org/abs/2502.16982).

The optimizers of torch and timm orthogonalize in bfloat16. A CPU without instructions for it takes
13 times as long as in float32, 0.62 s instead of 0.05 s for 47 matrices of the tiny model's sizes,
which is longer than the rest of the step. So this one chooses the precision by the device, and
takes only the iteration from timm.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

MOMENTUM = 0.95
"""Decay rate of the mean of gradients."""
ITERATIONS = 5
"""Newton-Schulz iterations."""
COEFFICIENTS = [(3.4445, -4.7750, 2.0315)]
"""Coefficients a, b, c of X <- a X + b (X X^T) X + c (X X^T)^2 X, by Jordan et al."""
UPDATE_RMS = 0.2
"""Root mean square of an update before the learning rate, which is that of AdamW's updates."""
LEAST_SIZE = 4
"""A matrix with fewer rows or columns is left to AdamW, such as that of a head for two classes."""

ORTHOGONAL = "orthogonal"
"""Key of a parameter group: whether its parameters are updated by Muon."""

MOMENTUM_STATE = "momentum"
"""Key of a matrix's state: the mean of its gradients, of its shape."""


def matrices_for_muon(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the trained matrices that map hidden states to hidden states.

    These are the weights of linear layers and the joint weights of queries, keys and values. Not
    among them are embeddings, whose rows are learned apart from each other, and convolutions.
    """
    for module in model.modules():
        names = ("weight",) if isinstance(module, nn.Linear) else ()
        if isinstance(module, nn.MultiheadAttention):
            names = ("in_proj_weight",)
        for name in names:
            weight = getattr(module, name)
            if weight is not None and weight.requires_grad and min(weight.shape) >= LEAST_SIZE:
                yield weight


class Muon(torch.optim.AdamW):
    """Muon for the parameter groups marked `orthogonal`, and AdamW for all others.

    The state of a matrix is `momentum`, of its shape, and the number of its steps, `step`, without
    which AdamW loads no state. The state of other parameters is AdamW's.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]
    ) -> None:
        """Create the optimizer.

        Args:
            groups: Parameter groups; those with `orthogonal` set hold matrices.
            lr: Learning rate.
            betas: AdamW's decay rates.
        """
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        # Gradients that overflow are left to the scaler, since only AdamW's kernel knows of them.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        every = self.param_groups
        try:
            self.param_groups = [group for group in every if not group.get(ORTHOGONAL)]
            super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if group.get(ORTHOGONAL):
                self._update_matrices(group)

    def _update_matrices(self, group: dict[str, Any]) -> None:
        # Here, because checkpoints are also loaded where timm, which is slow to import, is not.
        from timm.optim.muon import zeropower_via_newtonschulz

        # Matrices of one shape are orthogonalized in one batch, which takes fewer operations.
        alike: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for matrix in group["params"]:
            if matrix.grad is None:
                continue
            state = self.state[matrix]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state[MOMENTUM_STATE] = torch.zeros_like(matrix)
            state["step"] += 1
            momentum = state[MOMENTUM_STATE]
            momentum.lerp_(matrix.grad, 1 - MOMENTUM)
            direction = matrix.grad.lerp(momentum, MOMENTUM)  # as in Nesterov's method
            alike[matrix.shape].append((matrix, direction))
        for shape, pairs in alike.items():
            directions = torch.stack([direction for _, direction in pairs])
            precision = torch.float32 if directions.device.type == "cpu" else torch.bfloat16
            updates = zeropower_via_newtonschulz(
                directions, ITERATIONS, COEFFICIENTS, dtype=precision
            )
            scale = group["lr"] * UPDATE_RMS * max(shape) ** 0.5
            for (matrix, _), update in zip(pairs, updates, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update.to(matrix.dtype), alpha=-scale)
