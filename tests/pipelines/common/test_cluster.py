"""What a cluster is too small for is refused before the work starts."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from pipelines.common.cluster import require_bundle
from stgt.errors import SettingError


def node(alive: bool = True, **resources: float) -> dict[str, Any]:
    """A node as Ray describes it, as far as it is read."""
    return {"Alive": alive, "Resources": {"memory": 1e9, **resources}}


def test_what_must_be_on_one_node_has_to_fit_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several small nodes are no large one, and a lost node is none."""
    nodes = [node(CPU=4), node(CPU=4, GPU=2), node(alive=False, CPU=64, GPU=8)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    for fits in ({"CPU": 4}, {"CPU": 3, "GPU": 1}, {"GPU": 2}):
        require_bundle("a worker", fits, "lower it")
    for too_large in ({"CPU": 5}, {"CPU": 4, "GPU": 3}, {"CPU": 1, "TPU": 1}):
        needed = " and ".join(f"{amount} {name}s" for name, amount in too_large.items())
        with pytest.raises(
            SettingError,
            match=f"a worker needs {needed} on one node, and no node has them; lower it",
        ):
            require_bundle("a worker", too_large, "lower it")


@pytest.mark.ray
def test_the_nodes_of_a_real_cluster_are_asked(ray_cluster: None) -> None:
    cpus = ray.cluster_resources()["CPU"]
    require_bundle("a worker", {"CPU": cpus}, "lower it")
    with pytest.raises(SettingError, match=f"needs {cpus + 1:g} CPUs on one node"):
        require_bundle("a worker", {"CPU": cpus + 1}, "lower it")
