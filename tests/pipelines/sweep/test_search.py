"""How the next setting is chosen, and that a choice depends on nothing but what came before."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from pipelines.sweep.config import Search
from pipelines.sweep.outcome import TrialOutcome
from pipelines.sweep.search import Judged, check_search, judged, next_setting
from pipelines.sweep.space import Parameter, read_space
from pipelines.train.recipes import pretrain_stage1_tiny
from stgt.errors import STGTError

TINY = pretrain_stage1_tiny(("clips",), "out", "vocab.txt")
RANGES = ["optim.lr=loguniform(1e-4,1e-1)", "num_frames=choice(4,8)"]
GRID = ["optim.lr=grid(1e-3,1e-2)", "num_frames=choice(4,8)"]


def space_of(texts: list[str]) -> dict[str, Parameter]:
    return read_space(texts, TINY)


def choose(search: Search, texts: list[str], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Choose settings one after another; the metric is best at a learning rate of 0.01."""
    space = space_of(texts)
    before: list[Judged] = []
    for number in range(count):
        values = next_setting(search, space, number, before, seed, count)
        metric = 100.0 - 10 * abs(math.log10(values["optim.lr"]) + 2)
        before.append(Judged(values, metric, is_over=True))
    return [dict(one.values) for one in before]


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_choices_follow_the_seed(search: Search) -> None:
    settings = choose(search, RANGES, 8)
    assert settings == choose(search, RANGES, 8)
    assert settings != choose(search, RANGES, 8, seed=1)
    assert len({one["optim.lr"] for one in settings}) == 8
    assert all(1e-4 <= one["optim.lr"] <= 1e-1 for one in settings)
    assert {one["num_frames"] for one in settings} == {4, 8}


def test_tpe_learns_where_trials_were_good() -> None:
    def distance(search: Search, seed: int) -> float:
        late = choose(search, RANGES[:1], 30, seed)[15:]
        return sum(abs(math.log10(one["optim.lr"]) + 2) for one in late) / len(late)

    seeds = range(4)
    assert sum(distance("optuna", seed) for seed in seeds) < 0.7 * sum(
        distance("random", seed) for seed in seeds
    )


def test_tpe_avoids_settings_that_diverged() -> None:
    space = space_of(RANGES[:1])
    low = [Judged({"optim.lr": 10 ** (-4 + n / 10)}, 10.0 + n % 2, True) for n in range(10)]
    high = [Judged({"optim.lr": 10 ** (-2 + n / 10)}, None, True) for n in range(10)]
    before = [one for pair in zip(low, high, strict=True) for one in pair]
    chosen = [next_setting("optuna", space, 20, before, seed, 30) for seed in range(20)]
    assert sum(one["optim.lr"] < 1e-2 for one in chosen) >= 17
    failed = [*low, *(Judged(one.values, None, True, failed=True) for one in high)]
    assert next_setting("optuna", space, 20, failed, 0, 30) == next_setting(
        "optuna", space, 20, low, 0, 30
    )


def test_a_grid_gives_each_combination_once_whatever_was_tried() -> None:
    settings = choose("grid", GRID, 4)
    assert settings == [
        {"optim.lr": lr, "num_frames": frames} for lr in (1e-3, 1e-2) for frames in (4, 8)
    ]
    space = space_of(GRID)
    tried = [Judged(one) for one in settings[1:]]
    assert next_setting("grid", space, 3, tried, 0, 4) == settings[0]


def test_the_values_of_a_grid_take_turns_in_a_random_search() -> None:
    settings = choose("random", [*RANGES, "optim.weight_decay=grid(0.01,0.05)"], 8)
    assert Counter(one["optim.weight_decay"] for one in settings) == {0.01: 4, 0.05: 4}


def test_a_setting_that_was_refused_is_chosen_anew() -> None:
    space = space_of(RANGES)
    first, again = (next_setting("random", space, 3, [], 0, 8, attempt) for attempt in (0, 1))
    assert first != again
    assert again == next_setting("random", space, 3, [], 0, 8, 1)


def test_numbers_of_settings() -> None:
    assert check_search("grid", space_of(GRID), None) == 4
    assert check_search("grid", space_of(GRID), 3) == 3
    assert check_search("random", space_of(RANGES), None) == 10
    assert check_search("optuna", space_of(RANGES), 7) == 7


@pytest.mark.parametrize(
    ("search", "texts", "trials", "message"),
    [
        ("grid", RANGES, None, "optim.lr has a range; write grid"),
        ("grid", GRID, 5, "the grid has 4 settings, fewer than --trials 5"),
        ("optuna", GRID, 5, "optim.lr is a grid; write choice"),
        ("pbt", GRID, 5, "optim.lr is a grid; write choice"),
    ],
)
def test_a_space_that_contradicts_the_search_is_refused(
    search: Search, texts: list[str], trials: int | None, message: str
) -> None:
    with pytest.raises(STGTError, match=message):
        check_search(search, space_of(texts), trials)


def test_a_setting_is_judged_by_the_mean_of_its_repeats() -> None:
    def trial(setting: int, seed: int, **found: Any) -> TrialOutcome:
        return TrialOutcome(f"t{setting}{seed}", setting, seed, {"optim.lr": setting}, **found)

    outcomes = [
        trial(0, 0, status="finished", metric=10.0),
        trial(0, 1, status="stopped", metric=20.0),
        trial(1, 0, status="finished", metric=10.0),
        trial(1, 1),
        trial(2, 0, status="finished", metric=10.0),
        trial(2, 1, status="diverged"),
        trial(3, 0, status="failed"),
        trial(3, 1, status="finished", metric=10.0),
    ]
    assert [(one.metric, one.is_over, one.failed) for one in judged(outcomes, 2)] == [
        (15.0, True, False),
        (10.0, False, False),
        (None, True, False),
        (10.0, True, True),
    ]
