"""How time and memory grow with clips, gallery, frames and workers, as curves with their exponents.

The exponent is the slope of a straight line through the points with logarithmic axes: 1 for work
that is proportional to the size. Each point is measured in a process of its own and stored at once,
so a run that was killed continues with the points that are missing.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypedDict

import numpy as np

from pipelines.bench.config import BenchConfig
from pipelines.bench.decode import SECONDS
from pipelines.bench.harness import (
    Curve,
    Findings,
    Measured,
    Row,
    Work,
    added_time_and_bytes,
    higher,
    smaller,
)
from pipelines.bench.plan import write_manifest
from pipelines.bench.videos import make_videos
from pipelines.common import provenance, storage
from pipelines.common.config import TrackingConfig, fingerprint

logger = logging.getLogger(__name__)

UNFINISHED = "growth-unfinished"
"""Folder of the points of runs that have not finished, in the output folder."""
CAPTION = "a caption of middling length"
QUERIES, WIDTH, K = 4, 256, 128
"""Query tokens and width of embeddings, and candidates per row. The published model has 32 query
tokens; with 4, a gallery of 100,000 takes minutes instead of half an hour."""
TRAIN_POSITIONS = 64_000
"""Positions of a training that are located: 1,000 steps of 64 clips."""
DEPTH = 2
"""Blocks of the frame encoder, otherwise of the published size, whose frames are encoded."""
INGESTED_CLIPS, INGESTED_VIDEOS, GOP = 96, 4, 250


class Point(TypedDict):
    """One measured point."""

    values: list[float]
    """Seconds of each run; for workers, clips per second."""
    bytes: int | None
    """Memory that the work adds; None where it is not measured."""
    load: float
    """Load of the machine before the point was measured."""


class Points:
    """The points of a run, each stored when it is measured."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        found = storage.list_names(folder)
        self._known: dict[str, Point] = {
            name.removesuffix(".json"): storage.read_json(storage.join(folder, name))
            for name in found
            if name.endswith(".json")
        }
        if self._known:
            logger.info(
                "growth continues with %d points that a run which did not finish measured; delete "
                "%s to measure them again",
                len(self._known),
                folder,
            )

    def get(self, series: str, size: int, measure: Callable[[], Point]) -> Point:
        """Return a point, measured now unless it is known."""
        name = f"{series.replace(' ', '-')}-{size}"
        if name not in self._known:
            self._known[name] = measure()
            storage.write_json(storage.join(self._folder, f"{name}.json"), self._known[name])
            logger.info("growth/%s at %s: %s", series, f"{size:,}", _told(self._known[name]))
        return self._known[name]

    def remove(self) -> None:
        """Remove the stored points, when they are part of a finished run."""
        storage.remove(self._folder)


def _told(point: Point) -> str:
    memory = "" if point["bytes"] is None else f", {point['bytes'] / 1e6:,.1f} MB"
    return f"{Measured(point['values']):.4g}{memory}"


@dataclass(frozen=True)
class Series:
    """What is measured at several sizes."""

    name: str
    title: str
    size_unit: str
    make: Callable[[int, str, bool], Work]
    """Called with a size, a folder for inputs, and whether the model is the tiny one."""
    full: tuple[int, ...]
    small: tuple[int, ...]
    """Sizes of `--growth-sizes small`."""
    fitted_from: int
    """Smallest size that the line is fitted to, because a constant part dominates before."""
    time_exponent: float = 1.0
    memory_exponent: float = 1.0

    def sizes(self, config: BenchConfig) -> tuple[int, ...]:
        """Return the sizes at which a run measures."""
        return self.full if config.growth_sizes == "full" else self.small


def _manifest(size: int, folder: str, tiny: bool) -> Work:
    """Read and sort a list of URLs into a manifest."""
    del tiny
    from pipelines.manifest.config import ManifestConfig
    from pipelines.manifest.run import run_manifest

    annotations, number = Path(folder) / "urls.csv", itertools.count()
    with annotations.open("w", encoding="ascii") as file:
        file.write("video,caption\n")
        for row in range(size):
            file.write(f"https://example.com/{row}.mp4,{CAPTION} {row}\n")

    def work() -> None:
        output = f"{folder}/{next(number)}.parquet"
        config = ManifestConfig(annotations=(str(annotations),), output=output, format="urls")
        assert run_manifest(config)["clips"] == size

    return work


def _ingest_plan(size: int, folder: str, tiny: bool) -> Work:
    """Check the manifest of an ingest, divide it into shards, and claim the store."""
    del tiny
    from pipelines.ingest.claim import claim_store
    from pipelines.ingest.config import IngestConfig
    from pipelines.ingest.plan import plan_ingest

    manifest, number = Path(folder) / "manifest.parquet", itertools.count()
    write_manifest(manifest, size, "/videos/one.mp4")

    def work() -> None:
        config = IngestConfig(manifest=str(manifest), output=f"{folder}/{next(number)}")
        assert claim_store(plan_ingest(config)).total == size

    return work


def _train_plan(size: int, folder: str, tiny: bool) -> Work:
    """Open a manifest for training, plan its epochs, and locate the clips of 1,000 steps."""
    del tiny
    from pipelines.feed.plan import TrainPlan
    from pipelines.feed.sources import ManifestSource

    manifest = Path(folder) / "manifest.parquet"
    write_manifest(manifest, size, "/videos/one.mp4")

    def work() -> None:
        source = ManifestSource(str(manifest), 224, "squash")
        plan = TrainPlan([source.captions_per_shard()], seed=0)
        assert plan.num_clips == size
        plan.locate(np.arange(TRAIN_POSITIONS))

    return work


def _gallery(size: int, folder: str, tiny: bool) -> Work:
    """Score as many captions as videos, and rank both ways."""
    del folder, tiny
    import torch

    from stgt.retrieval.ranking import rank_both_ways
    from stgt.retrieval.similarity import Similarity

    torch.set_num_threads(os.cpu_count() or 1)
    generator = np.random.default_rng(0)
    videos = generator.standard_normal((size, QUERIES, WIDTH), dtype=np.float32)
    videos /= np.linalg.norm(videos, axis=2, keepdims=True)
    texts = generator.standard_normal((size, WIDTH), dtype=np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)

    def work() -> None:
        rank_both_ways(Similarity(videos, texts), np.arange(size), min(K, size))

    return work


def _frames(size: int, folder: str, tiny: bool) -> Work:
    """Encode the frames of a clip, and relate them in the graph."""
    del folder
    import torch

    from stgt.config import stgt_g, stgt_tiny
    from stgt.model import STGT

    torch.set_num_threads(os.cpu_count() or 1)
    config = stgt_tiny() if tiny else stgt_g()
    vision = config.vision if tiny else replace(config.vision, depth=DEPTH)
    torch.manual_seed(0)
    model = STGT(replace(config, vision=vision, num_frames=size)).eval()
    frames = torch.randn(1, size, 3, vision.image_size, vision.image_size)

    def work() -> None:
        with torch.no_grad():
            model.relate_frames(model.encode_frames(frames))

    return work


MANY_CLIPS = (10**3, 10**4, 10**5, 10**6, 10**7)
SERIES = (
    Series(
        name="manifest",
        title="Reading and sorting a list of URLs",
        size_unit="clips",
        make=_manifest,
        full=MANY_CLIPS,
        small=(1000, 4000),
        fitted_from=10**5,
    ),
    Series(
        name="ingest plan",
        title="Planning an ingest",
        size_unit="clips",
        make=_ingest_plan,
        full=MANY_CLIPS,
        small=(10**3, 10**5),
        fitted_from=10**5,
    ),
    Series(
        name="train plan",
        title="Planning a training",
        size_unit="clips",
        make=_train_plan,
        full=MANY_CLIPS,
        small=(10**3, 10**5),
        fitted_from=10**5,
    ),
    Series(
        name="gallery",
        title="Ranking a gallery",
        size_unit="videos and captions",
        make=_gallery,
        full=(10**2, 10**3, 10**4, 10**5),
        small=(10**2, 10**3),
        fitted_from=10**3,
        time_exponent=2.0,
    ),
    Series(
        name="frames",
        title="Encoding frames and relating them",
        size_unit="frames",
        make=_frames,
        full=(4, 8, 16, 32),
        small=(4, 8),
        fitted_from=4,
    ),
)
WORKERS = (1, 2, 3, 4)


def measure(config: BenchConfig, connect: Callable[[], None]) -> Findings:
    """Measure all curves, or those points of them that an unfinished run lacks."""
    points = Points(_folder(config))
    rows: list[Row] = []
    curves: list[Curve] = []
    for series in SERIES:
        of_size = {
            size: points.get(series.name, size, functools.partial(_point, series, size, config))
            for size in series.sizes(config)
        }
        drawn = _curves(series, of_size)
        curves += drawn
        rows += _rows(series, drawn)
    if config.growth_sizes == "small":
        points.remove()
        note = "growth was measured at small sizes and without workers: constant parts dominate"
        return Findings(rows, (note,), tuple(curves))
    rates = {
        number: points.get("workers", number, functools.partial(_ingest, number, config, connect))
        for number in WORKERS
    }
    curve, row = _of_workers(rates)
    points.remove()
    return Findings([*rows, row], (), (*curves, curve))


def _folder(config: BenchConfig) -> str:
    """Return where the points are stored: those of other code or hardware are not continued."""
    commit = provenance.commit()
    same = {
        "sizes": config.growth_sizes,
        "repeats": config.repeats,
        "hardware": provenance.hardware(),
        "versions": provenance.versions(),
        "commit": None if commit is None else [commit.sha, commit.is_dirty],
    }
    return storage.join(storage.resolve(config.output), UNFINISHED, fingerprint(same))


def _point(series: Series, size: int, config: BenchConfig) -> Point:
    import torch

    logger.info("growth/%s: measuring %s %s", series.name, f"{size:,}", series.size_unit)
    load, is_full = os.getloadavg()[0], config.growth_sizes == "full"
    threads = torch.get_num_threads()
    try:
        with TemporaryDirectory() as folder:
            seconds, added = added_time_and_bytes(
                _warm,
                (series.make, size, min(series.full), folder, not is_full),
                config.repeats,
                alone=is_full,
            )
    finally:
        torch.set_num_threads(threads)
    return Point(values=seconds, bytes=added, load=load)


def _warm(
    make: Callable[[int, str, bool], Work], size: int, smallest: int, folder: str, tiny: bool
) -> Work:
    """Do the smallest work, so that all modules are loaded, and return that of a size."""
    quiet = logging.getLogger("pipelines")
    quiet.setLevel(logging.WARNING)  # progress lines of the measured stages
    try:
        with TemporaryDirectory() as other:
            make(smallest, other, tiny)()
        return make(size, folder, tiny)
    finally:
        quiet.setLevel(logging.NOTSET)


def _ingest(workers: int, config: BenchConfig, connect: Callable[[], None]) -> Point:
    """Return the rates of an ingest with some workers, in clips per second."""
    from pipelines.bench.ingest import manifest_of
    from pipelines.ingest.config import IngestConfig
    from pipelines.ingest.run import run_ingest

    connect()
    load = os.getloadavg()[0]
    rates = []
    with TemporaryDirectory() as folder:
        videos = make_videos(Path(folder) / "videos", INGESTED_VIDEOS, SECONDS, GOP)
        manifest = storage.join(folder, "manifest.parquet")
        storage.write_table(manifest, manifest_of(videos, INGESTED_CLIPS))
        for repeat in range(config.repeats):
            rate = run_ingest(
                IngestConfig(
                    manifest=manifest,
                    output=storage.join(folder, f"run{repeat}"),
                    num_workers=workers,
                    clips_per_shard=INGESTED_CLIPS // 8,
                    tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"),
                )
            )["clips_per_s"]
            assert rate is not None
            rates.append(rate)
    return Point(values=rates, bytes=None, load=load)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Return the slope of the line of least squares through points with logarithmic axes.

    Returns:
        None for fewer than two points.
    """
    if len(sizes) < 2:
        return None
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def _curves(series: Series, points: dict[int, Point]) -> list[Curve]:
    found = {
        "time": ("s", {size: float(Measured(one["values"])) for size, one in points.items()}),
        "memory": ("bytes", {size: float(one["bytes"] or 0) for size, one in points.items()}),
    }
    expected = {"time": series.time_exponent, "memory": series.memory_exponent}
    curves = []
    for what, (unit, values) in found.items():
        # Work that adds less than a page of memory has no place on a logarithmic axis.
        shown = {size: value for size, value in values.items() if value > 0}
        if len(shown) < 2:
            continue
        fitted = [size for size in shown if size >= series.fitted_from]
        first = fitted[0] if len(fitted) > 1 else min(shown)
        fitted = [size for size in shown if size >= first]
        curves.append(
            Curve(
                title=f"{series.title}: {what}",
                size_unit=series.size_unit,
                unit=unit,
                sizes=tuple(map(float, shown)),
                values=tuple(shown.values()),
                exponent=exponent(fitted, [shown[size] for size in fitted]),
                expected=expected[what],
                fitted_from=first,
            )
        )
    return curves


def _rows(series: Series, curves: Sequence[Curve]) -> list[Row]:
    names = {"s": f"growth/{series.name}", "bytes": f"growth/{series.name}/memory"}
    return [
        smaller(names[curve.unit], "exponent", curve.exponent)
        for curve in curves
        if curve.exponent is not None
    ]


def _of_workers(rates: dict[int, Point]) -> tuple[Curve, Row]:
    """Return the curve of rates, and the row that compares one worker per core with one worker."""
    values = {number: Measured(one["values"]) for number, one in rates.items()}
    busy = max(number for number in values if number <= max(2, os.cpu_count() or 1))
    curve = Curve(
        title="Ingest: clips per second",
        size_unit="workers",
        unit="clips/s",
        sizes=tuple(map(float, values)),
        values=tuple(map(float, values.values())),
        exponent=None,
    )
    ideal = Measured([busy * rate for rate in values[1].values])
    return curve, higher("growth/workers", "clips/s", values[busy], ideal)
