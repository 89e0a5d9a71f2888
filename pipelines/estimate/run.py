"""Estimates an ingest and a training: gathers rates, calculates, and logs the arithmetic."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

from pipelines.estimate.arithmetic import EstimateSummary, Rate, Rates, calculate
from pipelines.estimate.config import PLACEHOLDER, EstimateConfig
from pipelines.estimate.measure import (
    MeasuredClips,
    count_arithmetic,
    measure_feed,
    measure_ingest,
)
from pipelines.estimate.recorded_counts import recorded_count
from pipelines.train.peak_rates import (
    PEAK_FLOPS,
    REACHED_ON_CPU,
    REACHED_ON_GPU,
    gpu_flops,
    measure_cpu_flops,
    precision_share,
)
from pipelines.train.preflight import with_architecture
from stgt.errors import SettingError

logger = logging.getLogger(__name__)


def run_estimate(config: EstimateConfig) -> EstimateSummary:
    """Estimate hours, storage and cost, without Ray.

    Raises:
        SettingError: There are too few clips to train on, or no given video can be decoded.
    """
    config = _with_architecture(config)
    cpus = config.cpus or os.cpu_count() or 1
    training = config.training
    trained_on = (
        f"{training.num_workers} GPUs ({config.gpu_type})"
        if training.use_gpu
        else f"{training.num_workers} CPU workers"
    )
    logger.info(
        "%s of %s clips: ingest on %d CPUs, training on %s",
        training.recipe,
        f"{config.clips:,}",
        cpus,
        trained_on,
    )
    rates = _rates(config)
    summary, lines = calculate(config, cpus, rates)
    for line in lines:
        logger.info("%s", line)
    return summary


def _with_architecture(config: EstimateConfig) -> EstimateConfig:
    """Return the config with the sizes of a model that only its weights tell.

    Raises:
        SettingError: The location of such weights is not given.
        CheckpointError: They cannot be used.
    """
    train = config.train
    if train.model.needs_initial_weights is None or train.model.kind == "stgt":
        return config
    if train.init_from == PLACEHOLDER:
        raise SettingError(
            f"init_from: {train.recipe} takes the sizes of its model from its weights; give "
            "--init-from with a folder in the form of the hub, or hf:NAME"
        )
    return replace(config, train=with_architecture(train))


def _rates(config: EstimateConfig) -> Rates:
    """Return all rates: those that are given, and measurements of the others."""
    ingest = _given(config.ingest_clips_per_cpu_s)
    bytes_per_clip = _given(config.bytes_per_clip)
    feed = _given(config.feed_clips_per_cpu_s)
    if ingest is None or bytes_per_clip is None or feed is None:
        measured = measure_ingest(config)
        ingest = ingest or _ingest_rate(config, measured)
        bytes_per_clip = bytes_per_clip or _bytes_per_clip(config, measured)
        feed = feed or _feed_rate(config, measured)
    train, checkpoint_bytes = _train_rate(config)
    return Rates(ingest, bytes_per_clip, feed, train, checkpoint_bytes)


def _given(value: float | None) -> Rate | None:
    return None if value is None else Rate(value, "as given", is_given=True)


def _ingest_rate(config: EstimateConfig, measured: MeasuredClips) -> Rate:
    size = config.train.model.inputs.image_size
    source = (
        f"measured on this machine: {measured.what} to {config.stored_frames} stored frames of "
        f"{size} pixels in {1 / measured.clips_per_cpu_s:.3g} s of one CPU"
    )
    return Rate(measured.clips_per_cpu_s, source)


def _bytes_per_clip(config: EstimateConfig, measured: MeasuredClips) -> Rate:
    each = measured.bytes_per_clip / config.stored_frames
    source = f"as measured: {config.stored_frames} frames of {each / 1e3:.3g} kB"
    return Rate(measured.bytes_per_clip, source)


def _feed_rate(config: EstimateConfig, measured: MeasuredClips) -> Rate:
    what = "reading" if config.train.augment.changes_nothing else "reading and augmenting"
    source = f"measured on this machine: {what} {config.train.num_frames} of these frames"
    return Rate(measure_feed(config, measured.coded), source)


def _train_rate(config: EstimateConfig) -> tuple[Rate, int | None]:
    """Return the clips that a training worker trains on per second, and bytes per checkpoint."""
    training = config.training
    count = recorded_count(training)
    if given := _given(config.train_clips_per_gpu_s):
        return given, None if count is None else count.checkpoint_bytes
    if count is None:
        logger.info("counting the arithmetic of a step")
        count = count_arithmetic(training)
    per_clip = count.flops_per_sample
    counted = f"{per_clip / 1e12:.3g} TFLOP per sample, counted in the model"
    if not training.use_gpu:
        measured = measure_cpu_flops() * training.threads_per_worker
        source = (
            f"from {measured / 1e9:.3g} GFLOP/s measured on this machine x {REACHED_ON_CPU:g} "
            f"(the part that a step reaches) / {counted}"
        )
        return Rate(measured * REACHED_ON_CPU / per_clip, source), count.checkpoint_bytes
    reached = gpu_flops(config.gpu_type, training.precision)
    assert reached is not None
    share = precision_share(training.precision)
    precision = "" if share == 1 else f" x {share:g} (fp32)"
    source = (
        f"from a peak of {PEAK_FLOPS[config.gpu_type] / 1e12:g} TFLOP/s{precision} x "
        f"{REACHED_ON_GPU:g} (the part that a step is assumed to reach) / {counted}"
    )
    return Rate(reached / per_clip, source), count.checkpoint_bytes
