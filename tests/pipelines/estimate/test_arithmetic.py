"""Hours, bytes and cost of an estimate, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipelines.estimate.arithmetic import Rate, Rates, calculate
from pipelines.estimate.config import EstimateConfig
from pipelines.train import recipes
from stgt.errors import SettingError

GIVEN = Rates(
    ingest=Rate(2.0, "as given", is_given=True),
    bytes_per_clip=Rate(300_000.0, "as given", is_given=True),
    feed=Rate(100.0, "as given", is_given=True),
    train=Rate(80.0, "as given", is_given=True),
    checkpoint_bytes=2_000_000_000,
)


def estimate(recipe: str = "pretrain_stage1", **settings: Any) -> EstimateConfig:
    train = recipes.RECIPES[recipe](data=("d",), output="o", init_from="i")
    return EstimateConfig(train=train, **{"clips": 10_000_000, **settings})


def test_a_given_rate_of_an_ingest_is_not_lowered_again() -> None:
    summary, lines = calculate(estimate(), 100, replace(GIVEN, ingest=Rate(2.0, "as given", True)))
    assert summary["ingest_hours"] == pytest.approx(10_000_000 / 200 / 3600, abs=0.01)
    assert "  x 100 CPUs = 200 clips/s" in lines


def test_hours_bytes_and_cost_of_a_pre_training() -> None:
    config = estimate(gpus=16, price_gpu_hour=3.0, price_cpu_hour=0.05)
    summary, lines = calculate(config, 100, replace(GIVEN, ingest=Rate(2.0, "measured")))
    # 2 clips/s x 100 CPUs x 0.87 = 174 clips/s; 10,000,000 / 174 s = 57,471 s
    assert summary["ingest_hours"] == pytest.approx(15.96, abs=0.01)
    assert summary["ingest_cost"] == pytest.approx(57_471.26 / 3600 * 100 * 0.05, abs=0.01)
    assert summary["store_gb"] == 3000
    assert summary["checkpoints_gb"] == 6  # the last two and the best
    # 9,999,000 samples after 1,000 are held out; 19,529.3 batches of 512
    assert (summary["steps"], summary["samples"]) == (19_530, 9_999_360)
    # 80 x 16 = 1,280 samples/s; the 64 data workers of the recipe read 64 x 100 x 0.85 = 5,440
    assert (summary["train_clips_per_s"], summary["train_limited_by"]) == (1280, "training workers")
    assert summary["train_hours"] == pytest.approx(2.17, abs=0.001)
    assert summary["train_hours_low"] == summary["train_hours"] == summary["train_hours_high"]
    assert (summary["data_workers"], summary["data_workers_needed"]) == (64, 16)
    assert summary["cpus_needed_on_the_fly"] == 753
    # 16 GPUs, and 81 CPUs: 16 of training workers, 64 data workers, 1 for Ray Data
    hours = 9_999_360 / 1280 / 3600
    assert summary["train_cost"] == pytest.approx(hours * (16 * 3.0 + 81 * 0.05), abs=0.01)
    assert summary["total_cost"] == pytest.approx(
        (summary["ingest_cost"] or 0) + (summary["train_cost"] or 0), abs=0.011
    )
    told = "\n".join(lines)
    for line in (
        "x 100 CPUs x 0.87 (",
        ") = 174 clips/s",
        "10,000,000 clips / 174 clips/s = 16 hours",
        "x 10,000,000 clips = 3 TB for the clip store",
        "10,000,000 clips - 1,000 held out = 9,999,000 samples per epoch",
        "x 16 GPUs = 1,280 samples/s",
        "9,999,360 samples / 1,280 samples/s = 2.17 hours",
    ):
        assert line in told, told


def test_without_prices_there_are_only_hours() -> None:
    summary, lines = calculate(estimate(), 100, GIVEN)
    assert summary["total_hours"] > 0
    assert {summary[name] for name in ("ingest_cost", "train_cost", "total_cost")} == {None}
    assert "  no total cost: give --price-cpu-hour and --price-gpu-hour" in lines
    summary, lines = calculate(estimate(price_cpu_hour=0.05), 100, GIVEN)
    assert summary["ingest_cost"] is not None
    assert (summary["train_cost"], summary["total_cost"]) == (None, None)
    assert "  no total cost: give --price-gpu-hour" in lines


def test_a_training_on_cpus_needs_no_price_of_gpus() -> None:
    config = estimate("pretrain_stage1_tiny", clips=2000, price_cpu_hour=1.0)
    summary, _ = calculate(config, 2, GIVEN)
    assert (summary["gpus"], summary["gpu_type"], summary["train_gpu_hours"]) == (0, None, 0)
    # 120 steps of 32 clips at 2 x 80 clips/s on 2 CPUs
    assert summary["train_cost"] == pytest.approx(120 * 32 / 160 / 3600 * 2, abs=0.01)
    assert summary["total_cost"] is not None


def test_too_few_data_workers_set_the_rate_and_are_named() -> None:
    config = estimate(gpus=16)
    config = replace(config, train=replace(config.train, num_loaders=4))
    summary, lines = calculate(config, 100, GIVEN)
    assert summary["train_limited_by"] == "data workers"
    assert summary["train_clips_per_s"] == 4 * 100 * 0.85
    assert [line for line in lines if line.endswith("set --num-loaders 16")]


def test_an_assumed_rate_gives_a_range() -> None:
    """At half of the peak rate instead of 40 %, it takes 0.8 of the time; at a quarter, 1.6."""
    rates = replace(GIVEN, train=Rate(80.0, "from the peak rate"))
    summary, lines = calculate(estimate(gpus=16), 100, rates)
    assert summary["train_hours_low"] == pytest.approx(0.8 * summary["train_hours"], rel=1e-3)
    assert summary["train_hours_high"] == pytest.approx(1.6 * summary["train_hours"], rel=1e-3)
    assert [line for line in lines if "an assumption" in line]


def test_an_epoch_of_captions_uses_each_of_them() -> None:
    config = estimate("finetune_msrvtt", clips=9000, captions_per_clip=20)
    summary, lines = calculate(config, 8, GIVEN)
    # 9 epochs of (9,000 - 500) x 20 captions in batches of 160
    assert summary["steps"] == 9563
    assert "  (9,000 clips - 500 held out) x 20 captions = 170,000 samples per epoch" in lines


def test_too_few_clips_for_a_step_are_refused() -> None:
    with pytest.raises(SettingError, match="clips = 1400: there are too few clips, after 1000 are"):
        calculate(estimate(clips=1400), 8, GIVEN)
    summary, _ = calculate(estimate(clips=1512), 8, GIVEN)
    assert summary["steps"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": 12}, "must divide the global batch of 512 .* such as 516"),
        ({"clips": 0}, "clips = 0: must be at least 1"),
        ({"price_gpu_hour": -1.0}, "price_gpu_hour = -1.0: must be at least 0"),
        ({"ingest_clips_per_cpu_s": 0.0}, "ingest_clips_per_cpu_s = 0.0: must be positive"),
        ({"train_clips_per_gpu_s": float("inf")}, "must be positive"),
        ({"clip_s": 0.0}, "clip_s = 0.0: must be positive"),
        ({"source_width": 597}, "source_width = 597: must be even"),
        ({"stored_frames": 4}, "must be at least the number of frames that the training takes, 8"),
        ({"cpus": 0}, "cpus = 0: must be at least 1"),
    ],
)
def test_a_wrong_setting_is_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        estimate(**settings)
    assert "\n" not in str(caught.value)


def test_gpus_of_a_training_on_cpus_are_refused() -> None:
    with pytest.raises(SettingError, match="gpus = 2: this recipe trains on CPUs"):
        estimate("pretrain_stage1_tiny", gpus=2)
