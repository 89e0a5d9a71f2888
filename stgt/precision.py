"""Precision policy.

Trained weights, losses, patch-graph similarities and metrics are float32. With `bf16` and `fp16`,
autocast runs matrix products in that dtype, and the weights of the frozen frame encoder are stored
in it, which halves the memory of the published size. In fp16, small gradients would underflow:
`gradient_scaler` scales the loss and skips steps whose gradients overflow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stgt.config import Precision
from stgt.errors import SettingError

if TYPE_CHECKING:
    from stgt.interface.model import VideoTextModel

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def dtype_of(precision: Precision) -> torch.dtype:
    """Return the dtype of matrix products.

    Raises:
        SettingError: The precision is unknown.
    """
    if precision not in DTYPES:
        raise SettingError(f"precision = {precision!r}: must be one of {', '.join(DTYPES)}")
    return DTYPES[precision]


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the autocast context for a forward pass."""
    dtype = dtype_of(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)


def gradient_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler for fp16, which is disabled in other precisions."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def keep_frozen_weights_in(precision: Precision, model: VideoTextModel) -> None:
    """Convert the frozen tensors of the frame encoder to the dtype of matrix products."""
    dtype = dtype_of(precision)
    frozen = model.frozen_names()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in frozen and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
