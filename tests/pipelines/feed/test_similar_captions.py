"""Clips with similar captions follow each other, and every sample of an epoch is used once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipelines.feed import similar_captions
from pipelines.feed.loader import ClipLoader
from pipelines.feed.similar_captions import SimilarOrder, similar_together
from pipelines.train import recipes
from pipelines.video.synthetic.scenes import all_scenes
from stgt.errors import SettingError
from tests.helpers.data import TinyData
from tests.helpers.training import loader_config

CAPTIONS = [scene.caption() for scene in all_scenes()[::3]]


def shared_words(captions: list[str], size: int) -> float:
    """Mean number of words that neighbors in groups of a size share."""
    groups = [captions[first : first + size] for first in range(0, len(captions), size)]
    return float(
        np.mean(
            [
                len(set(one.split()) & set(other.split()))
                for group in groups
                for one, other in zip(group, group[1:], strict=False)
            ]
        )
    )


def test_each_caption_comes_once_and_groups_are_similar() -> None:
    order = similar_together(CAPTIONS, 8, (0, 0))
    assert sorted(order.tolist()) == list(range(len(CAPTIONS)))
    random = np.random.default_rng(0).permutation(len(CAPTIONS))
    before = shared_words([CAPTIONS[row] for row in random], 8)
    assert shared_words([CAPTIONS[row] for row in order], 8) > before + 1.5


def test_the_nearest_captions_by_hand() -> None:
    """Shared words decide; captions that are equal are kept apart."""
    captions = ["a red cat sits", "a red cat runs", "a blue dog sits", "a blue dog runs"]
    order = similar_together(captions, 2, (0,)).tolist()
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 1}), frozenset({2, 3})}
    twice = ["a red cat", "a red cat", "a red dog", "a red dog"]
    for seed in range(5):
        first, second = similar_together(twice, 2, (seed,)).reshape(2, 2).tolist()
        assert twice[first[0]] != twice[first[1]]
        assert twice[second[0]] != twice[second[1]]


def test_a_rare_word_counts_more_than_four_frequent_ones() -> None:
    captions = [
        f"{frequent} rare{number}"
        for number in range(40)
        for frequent in ("the man sits here", "a dog runs there")
    ]
    for one, other in similar_together(captions, 2, (0,)).reshape(40, 2).tolist():
        assert one // 2 == other // 2


def test_the_order_depends_on_the_seed_alone() -> None:
    one, same, other = (similar_together(CAPTIONS, 8, (seed,)) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("size", [1, 3, 2000])
def test_any_size_of_a_group(size: int) -> None:
    order = similar_together(CAPTIONS[:100], size, (0,))
    assert sorted(order.tolist()) == list(range(100))


def test_an_epoch_keeps_its_samples_and_a_window_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similar_captions, "WINDOW", 100)
    read: list[int] = []

    def captions(positions: np.ndarray) -> list[str]:
        read.extend(positions.tolist())
        return [CAPTIONS[place % len(CAPTIONS)] for place in positions]

    order = SimilarOrder(8, 250, 0, captions)
    found = order(np.arange(500))
    for first, stop in ((0, 100), (100, 200), (200, 250), (250, 350), (350, 450), (450, 500)):
        assert sorted(found[first:stop].tolist()) == list(range(first, stop))
    assert not np.array_equal(found[:100] + 250, found[250:350])
    # In whatever parts positions are asked for, their samples are the same.
    again = SimilarOrder(8, 250, 0, captions)
    parts = [again(np.arange(first, first + 50)) for first in range(450, -1, -50)]
    assert np.array_equal(np.concatenate(parts[::-1]), found)
    assert len(read) <= 2 * 500 + 250  # a window is made once while it is in use


@pytest.mark.slow
@pytest.mark.parametrize("captions", ["original", "both"])
def test_an_epoch_of_a_store_has_every_clip_once(tiny_data: TinyData, captions: str) -> None:
    plain = replace(loader_config(tiny_data), captions=captions)
    similar = replace(plain, similar_captions=4)
    epoch = np.arange(39)
    wanted = ClipLoader(plain)({"id": epoch})
    found = ClipLoader(similar)({"id": epoch})
    assert sorted(found["clip_id"]) == sorted(wanted["clip_id"])
    assert found["clip_id"].tolist() != wanted["clip_id"].tolist()
    assert found["position"].tolist() == epoch.tolist()
    frames = dict(zip(wanted["clip_id"], wanted["frames"], strict=True))
    for clip_id, one in zip(found["clip_id"], found["frames"], strict=True):
        assert np.array_equal(one, frames[clip_id])  # random choices belong to the clip


@pytest.mark.slow
def test_any_division_among_workers_gives_the_same_samples(tiny_data: TinyData) -> None:
    """Also for a worker that begins in the middle, as after a restart."""
    config = replace(loader_config(tiny_data), similar_captions=4)
    whole = ClipLoader(config)({"id": np.arange(78)})
    workers = [ClipLoader(config) for _ in range(2)]
    for first in range(72, -1, -6):
        part = workers[first // 6 % 2]({"id": np.arange(first, first + 6)})
        assert part["clip_id"].tolist() == whole["clip_id"][first : first + 6].tolist()
        assert np.array_equal(part["frames"], whole["frames"][first : first + 6])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"similar_captions": 1}, "similar_captions = 1: must be at least 2 and at most"),
        ({"similar_captions": 65}, r"at most global_batch \(64\)"),
        ({"similar_captions": 8, "questions": "q.parquet", "answers": "a.json"}, "is for retriev"),
    ],
)
def test_what_cannot_be_grouped_is_refused(settings: dict[str, Any], message: str) -> None:
    recipe = replace(recipes.pretrain_stage1_tiny(("clips",), "run"), global_batch=64)
    with pytest.raises(SettingError, match=message):
        replace(recipe, **settings)
