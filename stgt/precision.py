"""The precision policy, in one place.

Trained weights, losses, similarities of the patch graph and metrics are float32. In `bf16` and
`fp16` the matrix products of a pass run in that type by autocast, and the weights of the frozen
frame encoder are kept in it, which halves the memory of the published size. In fp16 small gradients
vanish unless losses are scaled: `gradient_scaler` does that, and leaves out steps that overflow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stgt.config import Precision

if TYPE_CHECKING:
    from stgt.model import STGT

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def dtype_of(precision: Precision) -> torch.dtype:
    """The type of a pass's matrix products.

    Raises:
        ValueError: the name is unknown.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision = {precision!r}: must be one of {', '.join(DTYPES)}")
    return DTYPES[precision]


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context a forward pass runs in."""
    dtype = dtype_of(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)


def gradient_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """What scales the loss in fp16; in other precisions it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def keep_frozen_weights_in(precision: Precision, model: STGT) -> None:
    """Keep the tensors that training never changes in the type of the pass."""
    dtype = dtype_of(precision)
    frozen = model.frame_encoder.frozen_names()
    for name, tensor in model.frame_encoder.state_dict(keep_vars=True).items():
        if name in frozen and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
