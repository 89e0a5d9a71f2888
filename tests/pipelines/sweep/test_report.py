"""The results of a sweep: order of settings, plain-text table, importance, and the HTML page."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from pipelines.sweep.axes import Axis, axis_of, broken_lines, log_values, round_values, short_names
from pipelines.sweep.outcome import Status, TrialOutcome
from pipelines.sweep.ranking import best_setting, ranked_settings
from pipelines.sweep.report import importance, render_page, settings_table

METRIC = "val/t2v/R10"
LR = {"optim.lr": FloatDistribution(1e-5, 1e-3, log=True)}


def trial(
    number: int,
    metric: float | None = None,
    status: Status = "finished",
    *,
    setting: int | None = None,
    step: int = 12,
    reason: str = "",
    **values: Any,
) -> TrialOutcome:
    """Return a trial; `optim__lr` stands for the value of optim.lr."""
    return TrialOutcome(
        name=f"trial_{number:05d}",
        setting=number if setting is None else setting,
        seed=0,
        values={name.replace("__", "."): value for name, value in values.items()},
        status=status,
        step=step,
        metric=metric,
        reason=reason,
    )


def order(trials: Sequence[TrialOutcome]) -> list[int]:
    return [setting.number for setting in ranked_settings(trials)]


# The best setting


def test_settings_are_compared_by_the_mean_of_their_repeats() -> None:
    trials = [
        trial(0, 50.0, setting=0),
        trial(1, 10.0, setting=0),
        trial(2, 31.0, setting=1),
        trial(3, 33.0, setting=1),
    ]
    best = best_setting(trials)
    assert best is not None
    assert (best.number, best.mean) == (1, 32.0)
    assert best.deviation == pytest.approx(math.sqrt(2))
    assert best.best_trial == trials[3]
    assert order(trials) == [1, 0]


@pytest.mark.parametrize("status", ["stopped", "failed", "unfinished", "diverged"])
def test_a_setting_whose_repeats_did_not_all_finish_is_behind_those_whose_did(
    status: Status,
) -> None:
    trials = [
        trial(0, 90.0, setting=0),
        trial(1, 90.0, status, setting=0),
        trial(2, 1.0, setting=1),
        trial(3, 2.0, setting=1),
    ]
    assert order(trials) == [1, 0]


def test_a_diverged_repeat_is_the_worst_result() -> None:
    trials = [
        trial(0, 50.0, setting=0),
        trial(1, None, "diverged", setting=0),
        trial(2, 3.0, "stopped", setting=1),
        trial(3, 4.0, "stopped", setting=1),
        trial(4, None, "diverged", setting=2),
        trial(5, None, "failed", setting=3),
    ]
    assert order(trials) == [1, 0, 2, 3]
    # Its last metric before it diverged does not count.
    assert order([trial(0, 1.0, "stopped"), trial(1, 99.0, "diverged")]) == [0, 1]


def test_of_equal_settings_the_first_is_the_best() -> None:
    best = best_setting([trial(1, 5.0), trial(0, 5.0)])
    assert best is not None
    assert best.number == 0


@pytest.mark.parametrize(
    "trials",
    [
        [],
        [trial(0, None, "failed"), trial(1, 20.0, "failed")],
        [trial(0, 20.0, "diverged")],
        [trial(0, math.nan)],
        [trial(0, None, "unfinished", step=0)],
    ],
)
def test_without_a_usable_trial_there_is_no_best_setting(trials: list[TrialOutcome]) -> None:
    assert best_setting(trials) is None


# The table


def test_the_table_lists_the_best_setting_first_and_says_what_became_of_the_others() -> None:
    trials = [
        trial(0, 31.5, "stopped", step=4, optim__lr=1e-5, num_frames=4),
        trial(1, 46.25, optim__lr=2.5e-4, num_frames=8),
        trial(2, None, "diverged", step=7, reason="the loss is nan", optim__lr=0.1, num_frames=8),
        trial(3, None, "failed", step=0, reason="no space\nleft", optim__lr=0.001, num_frames=16),
    ]
    assert settings_table(trials, METRIC).splitlines() == [
        "rank  trial             lr  num_frames  val/t2v/R10  status    steps",
        "----  -----------  -------  ----------  -----------  --------  -----",
        "   1  trial_00001  0.00025           8        46.25  finished     12",
        "   2  trial_00000     1e-5           4        31.50  stopped       4",
        "   3  trial_00002      0.1           8            -  diverged      7",
        "   4  trial_00003    0.001          16            -  failed        0",
        "trial_00002 diverged at step 7: the loss is nan",
        "trial_00003 failed at step 0: no space left",
    ]


def test_the_table_of_repeats_gives_mean_deviation_and_number() -> None:
    trials = [
        trial(0, 10.0, setting=0, optim__lr=0.01),
        trial(1, 14.0, setting=0, optim__lr=0.01),
        trial(2, 12.0, setting=0, optim__lr=0.01),
        trial(3, 8.0, setting=1, optim__lr=0.1),
        trial(4, None, "diverged", setting=1, step=5, optim__lr=0.1),
        trial(5, 8.0, "stopped", setting=1, step=8, optim__lr=0.1),
    ]
    table = settings_table(trials, METRIC)
    first, second = table.splitlines()[3:]
    assert re.split("  +", first.strip()) == [
        "1", "trial_00000 to 00002", "0.01", "12.00 +- 2.00 (3)", "finished", "12",
    ]  # fmt: skip
    assert re.split("  +", second.strip()) == [
        "2", "trial_00003 to 00005", "0.1", "8.00 +- 0.00 (2)",
        "1 finished, 1 stopped, 1 diverged", "5 to 12",
    ]  # fmt: skip


@pytest.mark.parametrize("without", ["init_from", "global_batch"])
def test_names_and_values_of_a_wide_table_are_broken_and_shortened(without: str) -> None:
    values = {
        "model.graph.similarity_threshold": 0.5123,
        "model.vision.unfreeze_last_blocks": 2,
        "label_smoothing.contrastive": 0.0123,
        "optim.weight_decay": 0.05,
        "optim.warmup_steps": 100,
        "optim.lr": 1.234e-5,
        "num_frames": 8,
        "global_batch": 32,
        "init_from": "s3://bucket/a/rather/long/path/of/a/checkpoint",
    }
    del values[without]
    trials = [replace(trial(number, 44.0), values=values) for number in range(2)]
    lines = settings_table(trials, METRIC).splitlines()
    assert max(map(len, lines)) <= 100
    assert "s3://bucket/a/rather" not in lines[-1]
    ruler = next(number for number, line in enumerate(lines) if line.startswith("----"))
    columns = [found.span() for found in re.finditer("-+", lines[ruler])]
    headings = ["".join(line[a:b].strip() for line in lines[:ruler]) for a, b in columns]
    names = [name.rpartition(".")[2] for name in values]
    assert [heading.replace("-", "") for heading in headings] == [
        "rank", "trial", *names, "val/t2v/R10", "status", "steps",
    ]  # fmt: skip


def test_a_long_reason_is_wrapped_and_cut_off() -> None:
    lines = settings_table([trial(0, status="failed", reason="word " * 500)], METRIC).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) == 2 + 1 + 3


def test_short_names_tell_settings_apart() -> None:
    names = ["optim.lr", "model.graph.heads", "model.vision.heads", "lr"]
    assert short_names(names) == {
        "optim.lr": "optim.lr",
        "model.graph.heads": "graph.heads",
        "model.vision.heads": "vision.heads",
        "lr": "lr",
    }


# Importance


def searched(
    count: int, metric: Any, status: Any = lambda values: "finished"
) -> list[TrialOutcome]:
    """Return trials with random values of a learning rate, a number of frames and a choice."""
    draw = random.Random(0)
    trials = []
    for number in range(count):
        values = {
            "optim.lr": 10 ** draw.uniform(-5, -3),
            "num_frames": draw.randint(1, 16),
            "targets": draw.choice(["hard", "self_similarity"]),
        }
        trials.append(
            TrialOutcome(
                f"trial_{number:05d}", number, 0, values, status(values), 12, metric(values)
            )
        )
    return trials


SPACE: dict[str, BaseDistribution] = {
    **LR,
    "num_frames": IntDistribution(1, 16),
    "targets": CategoricalDistribution(("hard", "self_similarity")),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decisive", "metric"),
    [
        ("optim.lr", lambda values: 10 * math.log10(values["optim.lr"])),
        ("num_frames", lambda values: values["num_frames"] ** 0.5),
        ("targets", lambda values: 40.0 if values["targets"] == "hard" else 30.0),
    ],
)
def test_the_value_that_decides_the_metric_is_the_most_important(
    decisive: str, metric: Any
) -> None:
    shares = importance(searched(24, metric), SPACE)
    assert isinstance(shares, dict)
    assert shares.keys() == SPACE.keys()
    assert next(iter(shares)) == decisive
    assert shares[decisive] > 0.7
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares == importance(searched(24, metric), SPACE)  # the same each time


@pytest.mark.slow
def test_diverged_trials_count_as_the_worst_result() -> None:
    """All trials that did not diverge are equal, so only divergence tells values apart."""
    trials = searched(
        24, lambda values: 20.0 + values["num_frames"] / 100,
        lambda values: "diverged" if values["optim.lr"] > 1e-4 else "finished",
    )  # fmt: skip
    trials.append(trial(99, 0.0, optim__lr=9e-4, num_frames=8, targets="hard"))
    shares = importance(trials, SPACE)
    assert isinstance(shares, dict)
    assert next(iter(shares)) == "optim.lr"


def test_stopped_trials_are_compared_at_the_step_that_all_of_them_validated() -> None:
    """Stopped trials are lower only because they were stopped, at random."""
    draw = random.Random(1)
    trials, curves = [], {}
    for one in searched(24, lambda values: 0.0):
        at_four = float(one.values["num_frames"])
        stopped = draw.random() < 0.5
        curves[one.name] = [(4, at_four)] if stopped else [(4, at_four), (12, at_four + 100)]
        status, step = ("stopped", 4) if stopped else ("finished", 12)
        metric = curves[one.name][-1][1]
        trials.append(replace(one, status=status, step=step, metric=metric))
    at_same_step = importance(trials, SPACE, curves)
    at_last_step = importance(trials, SPACE)
    assert isinstance(at_same_step, dict)
    assert isinstance(at_last_step, dict)
    assert at_same_step["num_frames"] > 0.9
    assert at_last_step["num_frames"] < 0.6


def test_values_outside_of_the_space_can_be_used() -> None:
    """Some searches perturb values beyond their range."""
    trials = [trial(number, float(number), optim__lr=1e-6 * 5**number) for number in range(6)]
    assert importance(trials, LR) == {"optim.lr": pytest.approx(1.0)}


def test_a_value_that_is_the_same_in_all_trials_has_no_importance() -> None:
    trials = [trial(n, float(n), optim__lr=1e-5 * (n + 1), num_frames=8) for n in range(5)]
    space = {**LR, "num_frames": IntDistribution(1, 16)}
    assert importance(trials, space) == {"optim.lr": pytest.approx(1.0), "num_frames": 0.0}


@pytest.mark.parametrize(
    ("trials", "said"),
    [
        ([trial(n, float(n), optim__lr=1e-4 + n * 1e-5) for n in range(3)], "this sweep has 3"),
        (
            [trial(n, None, "failed", optim__lr=1e-4 + n * 1e-5) for n in range(9)],
            "this sweep has 0",
        ),
        ([trial(n, float(n), optim__lr=1e-4) for n in range(5)], "no searched value differs"),
        (
            [trial(n, 7.0, optim__lr=1e-4 + n * 1e-5) for n in range(5)],
            "the same metric \\(7.00\\)",
        ),
    ],
)
def test_a_sentence_says_why_there_is_no_importance(trials: list[TrialOutcome], said: str) -> None:
    found = importance(trials, LR)
    assert isinstance(found, str)
    assert re.search(said, found)


# Axes


@pytest.mark.parametrize(("low", "high"), [(1e-6, 1e-4), (3e-4, 4e-4), (0.01, 0.02), (1e-9, 1e3)])
def test_a_logarithmic_axis_has_equal_distances_for_equal_ratios(low: float, high: float) -> None:
    axis = axis_of("lr", "lr", FloatDistribution(low, high, log=True), [], 300)
    middle = math.sqrt(low * high)
    assert axis.y(low) == 300
    assert axis.y(high) == 0
    assert axis.y(middle) == pytest.approx(150)
    places = [y for y, _, _ in axis.ticks]
    assert 2 <= len(places) <= 10
    assert all(0 <= y <= 300 for y in places)
    assert places == sorted(places, reverse=True)


@pytest.mark.parametrize(("low", "high"), [(0.3, 0.9), (-1.0, 1.0), (0.0, 97.3), (1e-7, 3e-7)])
def test_round_numbers_cover_a_linear_axis(low: float, high: float) -> None:
    marks = round_values(low, high)
    assert 3 <= len(marks) <= 9
    assert all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)


def test_marks_of_whole_numbers_are_whole() -> None:
    assert round_values(1, 4, whole=True) == [1, 2, 3, 4]
    assert log_values(1e-6, 1e-4) == [1e-6, 1e-5, 1e-4]


def test_numeric_choices_are_in_order_and_values_outside_are_added() -> None:
    axis = axis_of("frames", "frames", CategoricalDistribution((16, 4, 8)), [4, 12], 300)
    assert axis.choices == ("4", "8", "12", "16")
    assert axis.y(4) > axis.y(8) > axis.y(12) > axis.y(16)


def test_an_axis_of_one_value_is_drawn_in_its_middle() -> None:
    assert Axis("x", "linear", 300, 5.0, 5.0).y(5.0) == 150
    assert [text for _, text, _ in Axis("x", "linear", 300, 5.0, 5.0).ticks] == ["5"]


def test_long_names_are_broken_after_separators() -> None:
    lines = broken_lines("model.graph.similarity_threshold", 12)
    assert lines == ["model.graph.", "similarity_", "threshold"]
    assert "".join(lines) == "model.graph.similarity_threshold"


# The page


class Page(HTMLParser):
    """Elements of a page; checks that they are nested properly."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "wbr"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def trials(self, kind: str) -> list[dict[str, str | None]]:
        return [
            attributes
            for tag, attributes in self.elements
            if tag == kind and "data-trials" in attributes
        ]


MIXED = [
    trial(0, 20.0, optim__lr=1e-5, num_frames=4, targets="hard"),
    trial(1, 45.0, optim__lr=1e-4, num_frames=8, targets="hard"),
    trial(2, 33.0, "stopped", step=4, optim__lr=5e-4, num_frames=8, targets="self_similarity"),
    trial(
        3, None, "diverged", step=3, reason="loss <nan> & clips", optim__lr=1e-3, num_frames=4,
        targets="hard",
    ),
    trial(4, None, "failed", reason="worker died", optim__lr=2e-4, num_frames=16, targets="hard"),
    trial(5, None, "unfinished", step=0, optim__lr=2e-4, num_frames=16, targets="hard"),
]  # fmt: skip


@pytest.mark.slow
def test_the_page_is_self_contained_and_well_formed() -> None:
    html = render_page(MIXED, SPACE, METRIC, command='python -m jobs.train --name "<a & b>"')
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object")
        assert not {"src", "href", "xlink:href"} & attributes.keys()
    assert re.findall(r"url\(([^)]*)\)", html) == ["#scale"]
    assert 'python -m jobs.train --name "<a & b>"' in page.text
    assert "loss <nan> & clips" in page.text
    assert "<nan>" not in html


def test_the_picture_has_a_line_per_trial_and_says_how_many_it_leaves_out() -> None:
    page = Page(render_page(MIXED, SPACE, METRIC))
    lines = page.trials("g")
    assert Counter(line["class"] for line in lines) == {
        "trial finished": 1,
        "trial finished best": 1,
        "trial stopped": 1,
        "trial diverged": 1,
    }
    assert [line["data-trials"] for line in lines] == ["3", "0", "2", "1"]  # the best on top
    assert "leaves out 2 trials without a result: 1 failed, 1 unfinished." in page.text
    assert len(page.trials("tr")) == len(MIXED)
    best = next(line for line in lines if line["class"] == "trial finished best")
    assert best["data-text"] == (
        "trial_00001: optim.lr = 0.0001, num_frames = 8, targets = hard, val/t2v/R10 = 45.00 "
        "(finished, step 12)"
    )


def test_lines_pass_through_the_values_of_their_trials() -> None:
    """Worked by hand: the learning rate has half of the axis's height, and the metric all."""
    trials = [trial(0, 10.0, optim__lr=1e-5), trial(1, 20.0, optim__lr=1e-4)]
    page = Page(render_page(trials, LR, METRIC))
    points = {attributes["points"] for tag, attributes in page.elements if tag == "polyline"}
    assert points == {"0,300 720,300", "0,150 720,0"}


def test_learning_curves_are_drawn_for_the_trials_that_have_one() -> None:
    curves = {"trial_00001": [(4, 10.0), (12, 45.0)], "trial_00002": [(4, math.nan), (8, 33.0)]}
    page = Page(render_page(MIXED, SPACE, METRIC, curves=curves))
    points = [attributes["points"] for tag, attributes in page.elements if tag == "polyline"][-4:]
    assert points[0] == points[1]
    assert points[0] is not None
    assert points[0].startswith("586.67,")
    assert points[3] == "293.33,260 880,0"
    assert "Learning curves" in page.text
    assert "Learning curves" not in Page(render_page(MIXED, SPACE, METRIC)).text


def test_repeats_share_a_row_and_are_emphasized_together() -> None:
    trials = [trial(n, 10.0 + n, setting=n // 3, optim__lr=1e-5 * (1 + n // 3)) for n in range(6)]
    page = Page(render_page(trials, LR, METRIC))
    assert [row["data-trials"] for row in page.trials("tr")] == ["3 4 5", "0 1 2"]
    assert "14.00 +- 1.00 (3)" in page.text
    assert "6 trials of 2 settings" in page.text


@pytest.mark.parametrize(
    "trials",
    [
        [],
        [trial(0, None, "failed", reason="it broke", optim__lr=1e-4)],
        [trial(0, None, "diverged", optim__lr=1e-4)],
    ],
)
def test_a_sweep_without_any_metric_has_a_page(trials: list[TrialOutcome]) -> None:
    page = Page(render_page(trials, LR, METRIC))
    assert "No trial has a metric, so there is nothing to draw." in page.text
    assert "Parameter importance needs at least 4 trials" in page.text


@pytest.mark.slow
def test_a_page_of_many_trials_with_long_names_stays_small() -> None:
    space: dict[str, BaseDistribution] = {
        f"model.some_part.a_rather_long_name_of_a_setting_{n}": FloatDistribution(0, 1)
        for n in range(8)
    }
    draw = random.Random(0)
    trials = [
        TrialOutcome(
            f"trial_{n:05d}",
            n,
            0,
            {name: draw.random() for name in space},
            "finished",
            9,
            draw.random(),
        )
        for n in range(200)
    ]
    html = render_page(trials, space, METRIC)
    assert len(Page(html).trials("g")) == 200
    assert len(html) < 1_000_000
