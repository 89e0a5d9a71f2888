"""Checks that all nodes of a cluster see the local paths in a job's config.

A path such as `/data/clips` may be a folder of one node, or one that all nodes share. Workers on
the other nodes would fail one after another, or write what nobody finds, after the job has begun.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.common import storage
from pipelines.submit.locations import local_paths
from stgt.errors import SettingError

logger = logging.getLogger(__name__)

OF_EACH_NODE = ("cache_dir", "scratch_dir")
"""Settings whose folder every node has for itself."""
OF_THE_DRIVER = ("vocab",)
"""Settings whose file only the driver reads if the output is remote: workers read a copy there."""
ANSWER_S = 60.0
"""Longest wait for the nodes. Workers with an uploaded working directory start slowly."""


class InvisiblePathError(SettingError):
    """A node does not see a path of the job."""


def require_visible(config: Any) -> None:
    """Check that all nodes with CPUs or GPUs see what the driver sees at the config's local paths.

    An input must exist on every node. Where the driver will make a folder, the nearest folder above
    that exists must be shared, which a file in it shows that is removed again.

    Raises:
        InvisiblePathError: A node does not see a path.
    """
    here = ray.get_runtime_context().get_node_id()
    others = {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] != here
        and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))
    }
    own = (
        *OF_EACH_NODE,
        *(OF_THE_DRIVER if storage.is_remote(getattr(config, "output", None)) else ()),
    )
    paths = {
        value.removeprefix("file://"): name
        for name, value in local_paths(config)
        if name.rpartition(".")[2] not in own and not value.startswith("sqlite")
    }
    if not others or not paths:
        return
    with _shown(sorted(paths)) as shown:
        missing = _missing(list(others), sorted(set(shown.values())))
    for node, lacks in missing.items():
        for path, sign in shown.items():
            if sign in lacks:
                raise InvisiblePathError(
                    f"--{paths[path].replace('_', '-')} {path} is not what the node {others[node]} "
                    "sees there; use a folder that all nodes share, or s3://"
                )


@contextlib.contextmanager
def _shown(paths: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield what must exist on other nodes for each path, creating a file where it is a folder."""
    shown: dict[str, str] = {}
    signs: dict[Path, Path] = {}
    try:
        for text in paths:
            path = Path(text)
            if path.exists():
                shown[text] = text
                continue
            above = next(folder for folder in path.parents if folder.exists())
            if not os.access(above, os.W_OK):
                continue  # the stage says so itself
            if above not in signs:
                signs[above] = above / f".stgt-{uuid.uuid4().hex}"
                signs[above].touch()
            shown[text] = str(signs[above])
        yield shown
    finally:
        for sign in signs.values():
            sign.unlink(missing_ok=True)


def _missing(nodes: Sequence[str], signs: Sequence[str]) -> dict[str, set[str]]:
    """Return which of the files and folders the nodes lack, for those that lack any."""

    @ray.remote(num_cpus=0, max_retries=0)
    def lacking() -> set[str]:
        return {sign for sign in signs if not os.path.exists(sign)}

    asked = {
        lacking.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(): node
        for node in nodes
    }
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    if late:
        logger.warning(
            "%d nodes did not say within %.0f s which of the job's paths they see",
            len(late),
            ANSWER_S,
        )
    found: dict[str, set[str]] = {}
    for reference in done:
        try:
            lacks = ray.get(reference)
        except RayError:  # a node that is being lost is of no use to the job either
            logger.warning(
                "the node %s did not say which of the job's paths it sees", asked[reference]
            )
            continue
        if lacks:
            found[asked[reference]] = lacks
    return found
