"""What a Ray cluster offers, and where its helper actors run."""

from __future__ import annotations

from collections.abc import Mapping

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def num_cpus() -> int:
    """CPUs of the cluster, at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def accelerator_types() -> list[str]:
    """Names of the cluster's accelerators, as Ray names them, such as `H100`."""
    prefix = "accelerator_type:"
    return [name.removeprefix(prefix) for name in ray.cluster_resources() if prefix in name]


def require_resources(what: str, needed: Mapping[str, tuple[float, str]], advice: str) -> None:
    """Check that work fits the cluster; work that does not would wait forever.

    Args:
        what: the work, for the message.
        needed: resource name, such as `CPU`, to the amount and a note on what it is made of.
        advice: how to need less.

    Raises:
        ValueError: the cluster has less of a resource.
    """
    available = ray.cluster_resources()
    for name, (amount, note) in needed.items():
        there = available.get(name, 0)
        if there < amount:
            made_of = f" ({note})" if note else ""
            raise ValueError(
                f"{what} needs {amount:g} {name}s{made_of}, but the cluster has {there:g}; {advice}"
            )


def on_driver_node() -> NodeAffinitySchedulingStrategy:
    """Schedules an actor on the driver's node, so that losing another node does not end it."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
