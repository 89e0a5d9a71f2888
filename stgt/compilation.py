"""Compilation of a model's blocks with torch.compile.

Compiling a few blocks at a time takes a fraction of the time that compiling the whole model takes,
and keeps communication between workers out of the compiled graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
import torch._dynamo.config
from torch import nn

Options: TypeAlias = dict[str, str | int | bool | Callable[..., Any]]

MOST_FORMS = 64
"""Number of forms of a block that may be compiled: kinds of input, sizes, training or not. torch
allows 8 by default, and computes further ones without compilation."""
GROUP = 4
"""Successive blocks that are compiled as one. Each call of a compiled function costs some 0.3 ms,
and its first and last operations are not fused with others."""


class BlockGroup(nn.Module):
    """Successive blocks, each of which takes the result of the one before."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the blocks, which all take the further arguments."""
        for block in self.blocks:
            states = block(states, *args, **kwargs)
        return states


def compiled_groups(
    blocks: Sequence[nn.Module], options: Options | None = None
) -> list[BlockGroup]:
    """Return groups of blocks, compiled. The blocks keep their place in their model."""
    groups = [BlockGroup(blocks[first : first + GROUP]) for first in range(0, len(blocks), GROUP)]
    compile_each(groups, options)
    return groups


def compile_each(blocks: Iterable[nn.Module], options: Options | None = None) -> None:
    """Compile blocks in place, each for the fixed sizes that it is called with.

    Blocks of the same class share what is compiled. Sizes hardly change in a training, and torch
    2.11 failed to compile layers of a Q-Former for variable ones on a GPU.

    Args:
        blocks: Modules of one class or more.
        options: Options of torch.compile's default backend.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_FORMS)
    for block in blocks:
        block.compile(dynamic=False, options=options)
