"""Compilation of a model's blocks with torch.compile."""

from __future__ import annotations

from collections.abc import Iterable

import torch._dynamo.config
from torch import nn

MOST_FORMS = 64
"""Number of forms of a block that may be compiled: kinds of input, sizes, training or not. torch
allows 8 by default, and computes further ones without compilation; the layers of a Q-Former alone
have 12."""


def compile_each(blocks: Iterable[nn.Module]) -> None:
    """Compile blocks in place, each for the fixed sizes that it is called with.

    Blocks of the same class share what is compiled. Sizes hardly change in a training, and torch
    2.11 failed to compile layers of a Q-Former for variable ones on a GPU.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_FORMS)
    for block in blocks:
        block.compile(dynamic=False)
