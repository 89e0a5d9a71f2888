"""Exchanges Python objects between training workers."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def gathered(values: list[Any]) -> list[Any]:
    """Return the concatenated lists of all workers, in rank order, on every worker."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def agreed(error: Exception | None) -> Exception | None:
    """Return the first error of any worker, on every worker.

    All workers can then raise it together, and none waits for a worker that has failed.
    """
    errors = gathered([] if error is None else [error])
    return errors[0] if errors else None
