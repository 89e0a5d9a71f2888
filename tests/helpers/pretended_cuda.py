"""Tensors that say they are on a GPU, without one: they have shapes and devices, but no data.

Operations on them check devices as CUDA does. Two things remain unchecked. Backward passes need a
real device, and autocast turns itself off without one, so everything is float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stgt.inputs.tokenizer import TextTokens
from stgt.interface.model import VideoTextModel

CLIPS = 3
CUDA = torch.device("cuda")


@contextmanager
def pretended_cuda() -> Iterator[None]:
    """Pretend that there is a GPU. Tensors made inside have no data, on whichever device."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*CUDA is not available.*")
        with FakeTensorMode():
            yield


def to_pretended_cuda(model: VideoTextModel) -> VideoTextModel:
    """Replace the parameters and buffers of a model. Must run under `pretended_cuda`."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            moved = torch.empty(parameter.shape, dtype=parameter.dtype, device=CUDA)
            setattr(module, name, nn.Parameter(moved, parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA))
    model.checks_values = False
    return model


def clips(model: VideoTextModel, num_frames: int | None = None) -> torch.Tensor:
    """Frames [3, T, H, W, 3] uint8."""
    inputs = model.config.inputs
    frames = inputs.num_frames if num_frames is None else num_frames
    shape = (CLIPS, frames, inputs.image_size, inputs.image_size, 3)
    return torch.zeros(shape, dtype=torch.uint8, device=CUDA)


def texts(model: VideoTextModel, count: int = CLIPS) -> TextTokens:
    """Ids and mask [count, S]."""
    ids = torch.ones(count, model.config.inputs.max_text_tokens, dtype=torch.int64, device=CUDA)
    return TextTokens(ids, torch.ones_like(ids))
