"""Values that the model and its training refuse, and settings that earlier versions lacked."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

import pytest

from stgt.config import LabelSmoothing, stgt_tiny
from stgt.errors import SettingError
from stgt.field_marks import Earlier, with_earlier_values


@pytest.mark.parametrize("name", ["contrastive", "matching", "caption"])
@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_label_smoothing_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(SettingError, match=rf"label_smoothing\.{name} = .*: must be in \[0, 1\)"):
        LabelSmoothing(**{name: value})


def test_label_smoothing_may_be_zero() -> None:
    assert LabelSmoothing(contrastive=0.0, matching=0.0, caption=0.0).caption == 0.0


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_dropout_out_of_range_is_refused_by_name(value: float) -> None:
    with pytest.raises(SettingError, match=r"qformer\.dropout = .*: must be in \[0, 1\)"):
        replace(stgt_tiny().qformer, dropout=value)
    with pytest.raises(SettingError, match=r"graph\.attention_dropout = .*: must be in \[0, 1\)"):
        replace(stgt_tiny().graph, attention_dropout=value)


@dataclass(frozen=True)
class Rules:
    """A field whose default changed, and one whose default is the earlier value."""

    changed: Annotated[str, Earlier("before")] = "now"
    unchanged: Annotated[float, Earlier(0.1)] = 0.1


def test_an_earlier_record_keeps_its_rule_but_overrides_no_value_that_was_asked_for() -> None:
    given = Rules(unchanged=0.3)
    assert with_earlier_values(given, {}) == Rules("before", 0.3)
    assert with_earlier_values(given, {"changed": "now", "unchanged": 0.1}) == given
    assert with_earlier_values(Rules("third"), {"changed": "before"}) == Rules("third")
