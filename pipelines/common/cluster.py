"""Queries the resources of the Ray cluster, places helper actors, and stores Ray's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow.fs
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.common import storage
from stgt.errors import SettingError


def num_cpus() -> int:
    """Return the number of CPUs in the cluster, at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def accelerator_types() -> list[str]:
    """Return Ray's names of the accelerators in the cluster, such as `H100`."""
    prefix = "accelerator_type:"
    return [name.removeprefix(prefix) for name in ray.cluster_resources() if prefix in name]


def require_resources(what: str, needed: Mapping[str, tuple[float, str]], advice: str) -> None:
    """Check that the cluster has enough resources; otherwise Ray would wait for them forever.

    Args:
        what: Name of the work, for the error message.
        needed: Maps a resource name, such as `CPU`, to the amount and a note on how it adds up.
        advice: How to reduce the need, for the error message.

    Raises:
        SettingError: The cluster has too little of a resource.
    """
    available = ray.cluster_resources()
    for name, (amount, note) in needed.items():
        there = available.get(name, 0)
        if there < amount:
            made_of = f" ({note})" if note else ""
            raise SettingError(
                f"{what} needs {amount:g} {name}s{made_of}, but the cluster has {there:g}; {advice}"
            )


def require_bundle(what: str, bundle: Mapping[str, float], advice: str) -> None:
    """Check that a node of the cluster is large enough for what must be on one node.

    Raises:
        SettingError: No node is.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(name, 0) >= n for name, n in bundle.items()) for node in nodes):
        return
    needed = " and ".join(f"{amount:g} {name}s" for name, amount in bundle.items())
    raise SettingError(f"{what} needs {needed} on one node, and no node has them; {advice}")


def on_driver_node() -> NodeAffinitySchedulingStrategy:
    """Return a strategy that places an actor on the driver's node, safe if other nodes are lost."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def ray_storage(output: str) -> dict[str, Any]:
    """Return the settings that make Ray Train and Ray Tune keep their state in an output folder."""
    if storage.is_local(output):
        return {"storage_path": output}
    # Given only a URI, Ray would not use this project's endpoint and credentials.
    fs, path = storage.filesystem(output)
    wrapped = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    return {"storage_path": path, "storage_filesystem": wrapped}
