"""Processes a stage's parts, each of which leaves a file, in a pool of actors or in this process.

A worker is a class whose instances take a batch of items as columns, as Ray Data passes them, and
return one row per item. It has a method `close`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipelines.common import ray_errors

Item = dict[str, Any]

MOST_BLOCKS = 1000
"""Maximum number of blocks in the data set of items. More blocks would overload Ray's driver."""


def on_ray(
    what: str,
    worker: Callable[..., Any],
    arguments: tuple[Any, ...],
    items: Sequence[Item],
    *,
    num_workers: int,
    use_gpu: bool = False,
) -> Iterator[Item]:
    """Process items in actors of Ray Data, one item at a time each, and yield their rows.

    Args:
        what: Name of the work, for messages.
        worker: The class of the workers.
        arguments: Arguments of its constructor.
        items: One dict for each part, all with the same keys.
        num_workers: Number of actors, with one CPU each. Fewer items take fewer.
        use_gpu: Whether each of them gets a GPU.

    Raises:
        SettingError: The cluster has too few CPUs or GPUs.
    """
    import ray
    import ray.data
    from ray.data import ActorPoolStrategy

    from pipelines.common.cluster import require_resources
    from pipelines.common.waiting import telling_of_wait

    size = min(num_workers, len(items))
    each = {"CPU": 1.0, **({"GPU": 1.0} if use_gpu else {})}
    needed = {name: (float(size), "one per worker") for name in each}
    require_resources(what, needed, "lower num_workers")
    blocks = min(len(items), MOST_BLOCKS)
    stage = ray.data.from_items(list(items), override_num_blocks=blocks).map_batches(
        worker,  # type: ignore[arg-type]
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ActorPoolStrategy(size=size),
        num_cpus=1,
        num_gpus=1 if use_gpu else 0,
    )
    begun = threading.Event()
    if all(ray.available_resources().get(name, 0) >= 1 for name in each):
        begun.set()  # the first worker starts at once, and may then work for minutes
    with telling_of_wait(what, each, begun.is_set):
        for row in ray_errors.rows(stage):
            begun.set()
            yield row


def in_this_process(
    worker: Callable[..., Any], arguments: tuple[Any, ...], items: Sequence[Item]
) -> Iterator[Item]:
    """Process items by the code of the actors, without Ray, and yield their rows."""
    import torch

    threads = torch.get_num_threads()
    local = worker(*arguments)
    try:
        for item in items:
            found = local({name: [value] for name, value in item.items()})
            for error in found.get(ray_errors.ERROR, ()):
                ray_errors.raise_packed(error)
            yield {name: column[0] for name, column in found.items()}
    finally:
        local.close()
        torch.set_num_threads(threads)  # an actor limits itself to one
