"""Captions that a model wrote, in the extras of a row."""

from __future__ import annotations

import json

import pytest

from pipelines.artifacts.generated_captions import (
    chosen_captions,
    generated_captions,
    with_generated,
)

MODEL, SETTINGS = {"name": "m", "fingerprint": "0"}, {"method": "beam"}


def test_generated_captions_are_added_to_the_extras_and_replaced() -> None:
    extras = with_generated('{"url": "u"}', ["one", "two"], MODEL, SETTINGS)
    assert json.loads(extras) == {
        "url": "u",
        "generated": {"captions": ["one", "two"], "model": MODEL, "settings": SETTINGS},
    }
    assert generated_captions(with_generated(extras, ["three"], MODEL, SETTINGS)) == ["three"]
    assert json.loads(with_generated(extras, [], MODEL, SETTINGS)) == {"url": "u"}
    assert with_generated('{"b":1, "a":2}', [], MODEL, SETTINGS) == '{"b":1, "a":2}'


def test_extras_that_are_no_object_are_refused() -> None:
    with pytest.raises(ValueError, match="must be a JSON object"):
        with_generated("[1]", ["x"], MODEL, SETTINGS)


@pytest.mark.parametrize(
    "extras",
    [None, "", "{}", '{"generated": true}', '{"generated": {"captions": "x"}}', '["generated"]'],
)
def test_a_column_of_that_name_is_not_taken_for_captions(extras: str | None) -> None:
    assert generated_captions(extras) == []


def test_captions_are_chosen() -> None:
    extras = with_generated("{}", ["new", "own"], MODEL, SETTINGS)
    own = ["own", "other"]
    assert chosen_captions(own, extras, "original") == own
    assert chosen_captions(own, extras, "generated") == ["new", "own"]
    assert chosen_captions(own, extras, "both") == ["own", "other", "new"]
    assert chosen_captions([], extras, "both") == ["new", "own"]
    assert chosen_captions(own, "{}", "generated") == []
