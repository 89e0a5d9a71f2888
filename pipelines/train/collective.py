"""What training workers exchange besides tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    pass


def gathered(values: list[Any]) -> list[Any]:
    """The lists of all workers, one after another, on all of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def agreed(error: Exception | None) -> Exception | None:
    """The first error of any worker, on all of them: so none waits for one that has failed."""
    errors = gathered([] if error is None else [error])
    return errors[0] if errors else None
