"""The arithmetic of an estimate: rates, a number of clips and prices to hours, bytes and cost.

Every figure is explained by a line that says what is multiplied by what.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

from pipelines.estimate.config import EstimateConfig
from pipelines.train.config import TrainConfig
from pipelines.train.peak_rates import REACHED_ON_GPU
from stgt.errors import SettingError

INGEST_SHARE = 0.87
"""Rate of an ingest on Ray, relative to bare decoding loops on the same CPUs (`jobs.bench
ingest`)."""
FEED_SHARE = 0.85
"""Rate of the feed through Ray Data, relative to bare reading loops (`jobs.bench feed`)."""
LOW_SHARE, HIGH_SHARE = 0.25, 0.5
"""Range of the share of a GPU's peak rate that training steps of large models usually reach."""
HOUR_S = 3600.0


@dataclass(frozen=True)
class Rate:
    """A figure that an estimate is based on."""

    value: float
    source: str
    """Where it comes from, in words that complete "VALUE, ..."."""
    is_given: bool = False


@dataclass(frozen=True)
class Rates:
    """All figures that an estimate is based on."""

    ingest: Rate
    """Clips that one CPU decodes per second."""
    bytes_per_clip: Rate
    feed: Rate
    """Clips that one data worker prepares per second."""
    train: Rate
    """Clips that one training worker trains on per second."""
    checkpoint_bytes: int | None = None
    """Size of a checkpoint; None if it is not known."""


class EstimateSummary(TypedDict):
    """Result of `run_estimate`."""

    recipe: str
    clips: int
    cpus: int
    gpus: int
    """0 if CPUs train."""
    gpu_type: str | None
    ingest_clips_per_cpu_s: float
    ingest_hours: float
    ingest_cpu_hours: float
    ingest_cost: float | None
    """None without a price."""
    bytes_per_clip: float
    store_gb: float
    checkpoints_gb: float | None
    steps: int
    samples: int
    """Samples that all steps use."""
    train_clips_per_worker_s: float
    train_clips_per_s: float
    train_limited_by: str
    """What sets the rate: `training workers` or `data workers`."""
    train_hours: float
    train_hours_low: float
    train_hours_high: float
    """Range that the uncertainty of the GPUs' rate leaves; equal to `train_hours` without it."""
    train_gpu_hours: float
    train_cpu_hours: float
    train_cost: float | None
    feed_clips_per_cpu_s: float
    data_workers: int
    data_workers_needed: int
    """Data workers that keep the training workers busy."""
    cpus_needed_on_the_fly: int
    """Data workers that would keep them busy if videos were decoded during the training."""
    total_hours: float
    total_cost: float | None


@dataclass(frozen=True)
class _Ingest:
    hours: float
    cpu_hours: float
    cost: float | None


@dataclass(frozen=True)
class _Feed:
    clips_per_s: float
    """Rate of the data workers that the training has."""
    workers: int
    workers_needed: int
    on_the_fly: int


@dataclass(frozen=True)
class _Training:
    steps: int
    samples: int
    clips_per_s: float
    limit: str
    feed: _Feed
    hours: float
    hours_low: float
    hours_high: float
    gpus: int
    gpu_hours: float
    cpu_hours: float
    cost: float | None


def calculate(config: EstimateConfig, cpus: int, rates: Rates) -> tuple[EstimateSummary, list[str]]:
    """Calculate hours, bytes and cost.

    Args:
        config: Settings of the estimate.
        cpus: CPUs that ingest.
        rates: What was measured or given.

    Returns:
        The summary, and the arithmetic in lines.

    Raises:
        SettingError: There are too few clips to train on.
    """
    lines: list[str] = []
    ingest = _ingest(config, cpus, rates, lines)
    store_bytes, checkpoint_bytes = _storage(config, rates, lines)
    training = _training(config, rates, lines)
    total_hours = ingest.hours + training.hours
    total_cost = _sum(ingest.cost, training.cost)
    lines += [
        "Total",
        f"  {_hours(ingest.hours)} of ingest + {_hours(training.hours)} of training = "
        f"{_hours(total_hours)}",
    ]
    if total_cost is None:
        lines.append(f"  no total cost: {_missing_prices(config, training.gpus)}")
    else:
        lines.append(f"  {ingest.cost:,.2f} + {training.cost:,.2f} = {total_cost:,.2f}")
    lines += _caveats(config, rates)
    summary = EstimateSummary(
        recipe=config.train.recipe,
        clips=config.clips,
        cpus=cpus,
        gpus=training.gpus,
        gpu_type=config.gpu_type if training.gpus else None,
        ingest_clips_per_cpu_s=_round(rates.ingest.value),
        ingest_hours=_round(ingest.hours),
        ingest_cpu_hours=_round(ingest.cpu_hours),
        ingest_cost=_money(ingest.cost),
        bytes_per_clip=_round(rates.bytes_per_clip.value),
        store_gb=_round(store_bytes / 1e9),
        checkpoints_gb=None if checkpoint_bytes is None else _round(checkpoint_bytes / 1e9),
        steps=training.steps,
        samples=training.samples,
        train_clips_per_worker_s=_round(rates.train.value),
        train_clips_per_s=_round(training.clips_per_s),
        train_limited_by=training.limit,
        train_hours=_round(training.hours),
        train_hours_low=_round(training.hours_low),
        train_hours_high=_round(training.hours_high),
        train_gpu_hours=_round(training.gpu_hours),
        train_cpu_hours=_round(training.cpu_hours),
        train_cost=_money(training.cost),
        feed_clips_per_cpu_s=_round(rates.feed.value),
        data_workers=training.feed.workers,
        data_workers_needed=training.feed.workers_needed,
        cpus_needed_on_the_fly=training.feed.on_the_fly,
        total_hours=_round(total_hours),
        total_cost=_money(total_cost),
    )
    return summary, lines


def _ingest(config: EstimateConfig, cpus: int, rates: Rates, lines: list[str]) -> _Ingest:
    # A given rate is that of an ingest, which is less than that of a bare loop already.
    share = 1.0 if rates.ingest.is_given else INGEST_SHARE
    rate = rates.ingest.value * cpus * share
    hours = config.clips / rate / HOUR_S
    reached = "" if share == 1 else f" x {share:g} (the part of bare loops' rate that Ray reaches)"
    cost, said = _cost(hours * cpus, "CPU", config.price_cpu_hour)
    lines += [
        "Ingest",
        f"  {_figure(rates.ingest.value)} clips/s per CPU, {rates.ingest.source}",
        f"  x {cpus:,} CPUs{reached} = {_figure(rate)} clips/s",
        f"  {config.clips:,} clips / {_figure(rate)} clips/s = {_hours(hours)}",
        f"  {_hours(hours)} x {cpus:,} CPUs = {said}",
    ]
    return _Ingest(hours, hours * cpus, cost)


def _storage(config: EstimateConfig, rates: Rates, lines: list[str]) -> tuple[float, float | None]:
    """Return the bytes of the clip store, and of the checkpoints if their size is known."""
    store = config.clips * rates.bytes_per_clip.value
    lines += [
        "Storage",
        f"  {_size(rates.bytes_per_clip.value)} per clip, {rates.bytes_per_clip.source}",
        f"  x {config.clips:,} clips = {_size(store)} for the clip store",
    ]
    if rates.checkpoint_bytes is None:
        return store, None
    latest = config.train.keep_checkpoints
    checkpoints = float((latest + 1) * rates.checkpoint_bytes)
    lines.append(
        f"  {_size(rates.checkpoint_bytes)} per checkpoint x {latest + 1} (the last {latest} and "
        f"the best) = {_size(checkpoints)}"
    )
    return store, checkpoints


def _training(config: EstimateConfig, rates: Rates, lines: list[str]) -> _Training:
    training = config.training
    lines.append("Training")
    steps, samples = _steps(config, training, lines)
    workers, worker = training.num_workers, "GPU" if training.use_gpu else "training worker"
    full_rate = rates.train.value * workers
    lines += [
        f"  {_figure(rates.train.value)} samples/s per {worker}, {rates.train.source}",
        f"  x {workers:,} {worker}s = {_figure(full_rate)} samples/s",
    ]
    feed = _feed(training, rates, full_rate, worker, lines)
    rate = min(full_rate, feed.clips_per_s)
    hours = samples / rate / HOUR_S
    lines.append(f"  {samples:,} samples / {_figure(rate)} samples/s = {_hours(hours)}")
    low = high = hours
    if training.use_gpu and not rates.train.is_given:
        low, high = (
            samples / min(full_rate * share / REACHED_ON_GPU, feed.clips_per_s) / HOUR_S
            for share in (HIGH_SHARE, LOW_SHARE)
        )
        lines.append(
            f"  uncertain: at {_percent(HIGH_SHARE)} of the peak rate instead of "
            f"{_percent(REACHED_ON_GPU)}, it is {_hours(low)}; at {_percent(LOW_SHARE)}, "
            f"{_hours(high)}"
        )
    each = rates.bytes_per_clip.value
    lines.append(
        f"  each node with data workers reads {_figure(rate)} clips/s x {_size(each)} = "
        f"{_size(rate * each)}/s from the store"
    )
    gpus, cpus = workers if training.use_gpu else 0, training.num_cpus()
    cost, said = _cost(hours * cpus, "CPU", config.price_cpu_hour)
    of_feed = f" and {training.feed_cpus} for the feed" if training.feed_cpus else ""
    lines.append(
        f"  {_hours(hours)} x {cpus:,} CPUs ({training.threads_per_worker} per training "
        f"worker{of_feed}) = {said}"
    )
    if gpus:
        gpu_cost, said = _cost(hours * gpus, "GPU", config.price_gpu_hour)
        lines.append(f"  {_hours(hours)} x {gpus:,} GPUs = {said}")
        cost = _sum(cost, gpu_cost)
    return _Training(
        steps=steps,
        samples=samples,
        clips_per_s=rate,
        limit="training workers" if full_rate <= feed.clips_per_s else "data workers",
        feed=feed,
        hours=hours,
        hours_low=low,
        hours_high=high,
        gpus=gpus,
        gpu_hours=hours * gpus,
        cpu_hours=hours * cpus,
        cost=cost,
    )


def _feed(
    training: TrainConfig, rates: Rates, full_rate: float, worker: str, lines: list[str]
) -> _Feed:
    """Compare the rate of the data workers with that of the training workers, `full_rate`."""
    # Without data workers, each training worker loads its clips in a thread of its own.
    workers = training.num_loaders or training.num_workers
    kind = "data workers" if training.num_loaders else "training workers that load clips"
    each = rates.feed.value * FEED_SHARE
    feed = _Feed(
        clips_per_s=each * workers,
        workers=workers,
        workers_needed=math.ceil(full_rate / each),
        on_the_fly=math.ceil(full_rate / (rates.ingest.value * FEED_SHARE)),
    )
    lines += [
        f"  {_figure(rates.feed.value)} samples/s read by one CPU, {rates.feed.source}; x "
        f"{FEED_SHARE:g} (the part that the feed through Ray Data reaches) x {workers:,} {kind} = "
        f"{_figure(feed.clips_per_s)} samples/s",
        f"  {_figure(full_rate)} samples/s / ({_figure(rates.feed.value)} x {FEED_SHARE:g}) = "
        f"{feed.workers_needed:,} data workers, one CPU each, keep {training.num_workers:,} "
        f"{worker}s busy; decoding videos during the training, without a clip store, would take "
        f"{feed.on_the_fly:,}",
    ]
    if feed.clips_per_s < full_rate:
        lines.append(
            f"  so the data workers are the limit: {_figure(feed.clips_per_s)} of "
            f"{_figure(full_rate)} samples/s; set --num-loaders {feed.workers_needed}"
        )
    return feed


def _steps(config: EstimateConfig, training: TrainConfig, lines: list[str]) -> tuple[int, int]:
    """Return the number of steps, and the number of samples that they use."""
    clips, batch = config.clips - training.hold_out, training.global_batch
    unit = training.epoch_unit
    per_epoch = round(clips * config.captions_per_clip) if unit == "captions" else clips
    if per_epoch < batch:
        held_out = f", after {training.hold_out} are held out," if training.hold_out else ""
        raise SettingError(
            f"clips = {config.clips}: there are too few clips{held_out} for one step of {batch}; "
            "give more clips, or lower --global-batch or --hold-out"
        )
    clips_said = f"{config.clips:,} clips"
    if training.hold_out:
        clips_said += f" - {training.hold_out:,} held out"
    if unit == "captions" and config.captions_per_clip != 1:
        clips_said = f"({clips_said}) x {config.captions_per_clip:g} captions"
    steps = training.steps_for(per_epoch)
    samples = steps * batch
    lines.append(f"  {clips_said} = {per_epoch:,} samples per epoch")
    if training.epochs is None:
        lines.append(
            f"  {steps:,} steps x {batch:,} samples = {samples:,} samples "
            f"({_figure(samples / per_epoch)} epochs)"
        )
    else:
        lines.append(
            f"  {per_epoch:,} samples x {training.epochs:g} (epochs) / {batch:,} per step = "
            f"{steps:,} steps, {samples:,} samples"
        )
    return steps, samples


def _cost(hours: float, unit: str, price: float | None) -> tuple[float | None, str]:
    """Return the cost of some CPU or GPU hours, and the end of the line that explains it."""
    said = f"{_figure(hours)} {unit} hours"
    if price is None:
        return None, said
    return hours * price, f"{said}, x {price:g} per {unit} hour = {hours * price:,.2f}"


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def _missing_prices(config: EstimateConfig, gpus: int) -> str:
    lacking = []
    if config.price_cpu_hour is None:
        lacking.append("--price-cpu-hour")
    if gpus and config.price_gpu_hour is None:
        lacking.append("--price-gpu-hour")
    return f"give {' and '.join(lacking)}"


def _caveats(config: EstimateConfig, rates: Rates) -> list[str]:
    lines = ["What this does not know"]
    if not rates.ingest.is_given:
        lines.append(
            "  a CPU of another machine is faster or slower than one of this machine, and a CPU of "
            "a cloud is often half a core"
        )
    if not rates.ingest.is_given and not config.videos:
        lines.append(
            "  generated clips stand for yours: give --videos of the data set, or the rate that "
            "`jobs.ingest --limit 500` reports on the cluster, divided by its CPUs, as "
            "--ingest-clips-per-cpu-s"
        )
    if config.training.use_gpu and not rates.train.is_given:
        lines.append(
            f"  that a step reaches {_percent(REACHED_ON_GPU)} of the peak rate is an assumption: "
            "a training reports the measured time of its first steps, whose rate can be given as "
            "--train-clips-per-gpu-s"
        )
    lines.append(
        "  fetching videos from storage, the start of a cluster, validations, checkpoints and "
        "failures come on top; bad clips are left out"
    )
    return lines


def _figure(value: float) -> str:
    """Format a number with three or more significant digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _hours(hours: float) -> str:
    said = f"{_figure(hours)} hours"
    if hours * 60 < 1:
        return f"{said} ({hours * HOUR_S:.0f} s)"
    return f"{said} ({hours * 60:.0f} minutes)" if hours < 1 else said


def _size(count: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{_figure(count / unit)} {name}"
    return f"{count:.0f} bytes"


def _round(value: float) -> float:
    """Round to four significant digits: more would pretend to be known."""
    return float(f"{value:.4g}")


def _money(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
