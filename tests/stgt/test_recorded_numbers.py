"""The numbers of a tiny model are those that were recorded, also where no reference is at hand."""

from __future__ import annotations

import json

import pytest

from tests.helpers.recorded_numbers import RECORDED, edge_margin, numbers


@pytest.mark.parametrize("part", ["outputs", "hard", "self_similarity"])
def test_numbers_are_those_that_were_recorded(part: str) -> None:
    """`tests/helpers/recorded_numbers.py` says how to record them anew, and when."""
    recorded, found = json.loads(RECORDED.read_text())[part], numbers()[part]
    assert found.keys() == recorded.keys()
    for name, value in recorded.items():
        # Biases of attention keys have no gradient but rounding.
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-9), name


def test_rounding_moves_no_edge_of_the_recorded_graph() -> None:
    assert edge_margin() > 1e-3


def test_the_recording_is_small() -> None:
    assert RECORDED.stat().st_size <= 50_000
