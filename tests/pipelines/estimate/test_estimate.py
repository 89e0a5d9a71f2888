"""The job: rates measured on this machine, without Ray, and one JSON line last."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.estimate.config import EstimateConfig
from pipelines.estimate.measure import count_arithmetic, measure_feed, measure_ingest
from pipelines.estimate.recorded_counts import recorded_count
from pipelines.estimate.run import run_estimate
from pipelines.train import recipes
from pipelines.video import frame_codec
from pipelines.video.decoder import read_clip
from pipelines.video.synthetic.footage import write_footage
from stgt.errors import SettingError
from tests.helpers.data import PROJECT

TINY = recipes.pretrain_stage1_tiny(("d",), "o")
SMALL = EstimateConfig(
    train=TINY, clips=2000, cpus=2, clip_s=1.0, source_width=96, source_height=64, stored_frames=6
)
PRETRAINING = EstimateConfig(
    train=recipes.pretrain_stage1(("d",), "o", "i"), clips=10_000_000, cpus=100
)


@pytest.mark.slow
def test_the_job_measures_without_ray_and_ends_with_one_json_line() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['jobs.estimate', 'pretrain_stage1_tiny', '--clips', '2000', '--cpus', '2',\n"
        "    '--clip-s', '1', '--source-width', '96', '--source-height', '64',\n"
        "    '--price-cpu-hour', '0.5', '--train-clips-per-gpu-s', '50']\n"
        "runpy.run_module('jobs.estimate', run_name='__main__')\n"
        "assert not {'ray', 'mlflow', 'torch'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    summary = json.loads(line)
    assert (summary["recipe"], summary["clips"]) == ("pretrain_stage1_tiny", 2000)
    assert summary["ingest_clips_per_cpu_s"] > 1
    assert summary["feed_clips_per_cpu_s"] > summary["ingest_clips_per_cpu_s"]
    assert summary["total_cost"] == pytest.approx(
        summary["ingest_cost"] + summary["train_cost"], abs=0.011
    )
    assert "measured on this machine: a generated clip of 1 s (96x64, 25 frames/s" in done.stderr


@pytest.mark.slow
def test_the_arithmetic_of_another_model_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    """The tiny model takes 0.0115 TFLOP per step of 32 clips, as its training logs."""
    given = replace(
        SMALL, ingest_clips_per_cpu_s=10.0, feed_clips_per_cpu_s=100.0, bytes_per_clip=1e5
    )
    with caplog.at_level("INFO"):
        summary = run_estimate(given)
    assert "/ 0.000359 TFLOP per sample, counted in the model" in caplog.text  # 0.0115 / 32
    assert summary["checkpoints_gb"] == pytest.approx(3 * 0.0098, rel=0.02)
    assert 5 < summary["train_clips_per_worker_s"] < 5000


@pytest.mark.slow
def test_the_arithmetic_of_published_recipes_is_known_and_follows_the_gpu() -> None:
    rates = {
        gpu_type: run_estimate(
            replace(
                PRETRAINING,
                gpu_type=gpu_type,
                ingest_clips_per_cpu_s=10.0,
                feed_clips_per_cpu_s=100.0,
                bytes_per_clip=1e5,
            )
        )["train_clips_per_worker_s"]
        for gpu_type in ("H100", "A100")
    }
    # 989 TFLOP/s x 0.4 / 4.74 TFLOP
    assert rates["H100"] == pytest.approx(83.45, abs=0.05)
    assert rates["A100"] == pytest.approx(83.45 * 312 / 989, abs=0.05)


def test_a_model_of_another_size_has_no_recorded_count() -> None:
    assert recorded_count(PRETRAINING.train) is not None
    assert recorded_count(replace(PRETRAINING.train, num_frames=4)) is None
    assert recorded_count(TINY) is None


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.parametrize("name", ["pretrain_stage1", "finetune_didemo", "finetune_msvd"])
def test_recorded_counts_are_what_is_counted(name: str) -> None:
    train = recipes.RECIPES[name](data=("d",), output="o", init_from="i")
    assert recorded_count(train) == count_arithmetic(train)


@pytest.mark.slow
def test_larger_clips_take_longer_to_decode() -> None:
    small = measure_ingest(replace(SMALL, source_width=128, source_height=96))
    large = measure_ingest(replace(SMALL, source_width=512, source_height=384, clip_s=2.0))
    assert small.clips_per_cpu_s > 2 * large.clips_per_cpu_s
    assert len(large.coded) == 6
    assert large.bytes_per_clip == sum(map(len, large.coded))


@pytest.mark.slow
def test_augmentation_takes_time() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    coded = frame_codec.encode_frames(noise, "jpeg", 95)
    augmented = replace(TINY, augment=recipes.finetune_msvd(("d",), "o", "i").augment)
    plain = measure_feed(SMALL, coded)
    assert plain > 1.5 * measure_feed(replace(SMALL, train=augmented), coded)


@pytest.mark.slow
def test_given_videos_are_measured_and_bad_ones_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = write_footage(tmp_path / "good.mp4", 1.0, 64, 48, 12.0)
    bad = tmp_path / "bad.mp4"
    bad.write_text("no video")
    measured = measure_ingest(replace(SMALL, videos=(str(good), str(bad))))
    assert len(measured.coded) == 6
    assert measured.what == "2 videos"
    assert f"{bad} is not measured: not_a_video" in caplog.text
    with pytest.raises(SettingError, match=r"videos = .*bad\.mp4: none of them can be decoded"):
        measure_ingest(replace(SMALL, videos=(str(bad),)))


def test_footage_moves_and_has_detail(tmp_path: Path) -> None:
    path = write_footage(tmp_path / "clip.mp4", 2.0, 160, 96, 10.0)
    frames = read_clip(path, 4, 96).astype(float)
    assert frames.std() > 15
    for first, second in zip(frames[:-1], frames[1:], strict=True):
        assert abs(first - second).mean() > 4
