"""A cluster to submit jobs to: a Ray head of its own, beside whatever Ray the tests use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.heads import Cluster, running_head


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Ray head on loopback with a token of its own."""
    with running_head(tmp_path_factory.mktemp("head")) as cluster:
        yield cluster
