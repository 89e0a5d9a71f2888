"""Rate of clips from a store through Ray Data to training workers, against a loop and DataLoader.

All read the same clips in the same order and augment them as in fine-tuning. Rates are steady-state
rates: starting Ray, its workers and DataLoader's processes does not count.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipelines.bench.decode import FRAMES, SECONDS, SIZE
from pipelines.bench.harness import Measured, Row, end_with_parent, higher, smaller
from pipelines.bench.ingest import manifest_of
from pipelines.bench.tiny import make_tiny
from pipelines.bench.videos import make_videos
from pipelines.common import storage
from pipelines.common.config import TrackingConfig
from pipelines.feed.loader import ClipLoader, LoaderConfig
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.run import run_ingest
from pipelines.train import recipes
from pipelines.train.run import run_train
from pipelines.video.config import SamplingConfig
from stgt.config import AugmentConfig

logger = logging.getLogger(__name__)

VIDEOS = 8
CLIPS = 128
STORED_FRAMES = 16
BATCH = 64
BLOCK = 32
WARM_BATCHES = 1
"""Initial batches that are not measured, because their time includes startup."""
COUNTED_BATCHES = 20


def measure(repeats: int, connect: Callable[[], None]) -> list[Row]:
    """Measure clips per second that reach one and two training workers."""
    connect()
    cores = os.cpu_count() or 1
    with TemporaryDirectory() as folder:
        config = _loader_config(Path(folder))
        rates: dict[str, list[float]] = {}
        works: dict[str, Callable[[], float]] = {
            "one worker": lambda: _ray_rate(config, 1, cores),
            "two workers": lambda: _ray_rate(config, 2, cores),
            "loop": lambda: _loop_rate(config, cores),
            "DataLoader": lambda: _data_loader_rate(config, cores),
        }
        for repeat in range(repeats):
            for name in works if repeat % 2 == 0 else reversed(works):
                rates.setdefault(name, []).append(works[name]())
            logger.info(
                "run %d of %d: %s",
                repeat + 1,
                repeats,
                ", ".join(f"{name} {rate[-1]:.1f} clips/s" for name, rate in rates.items()),
            )
        wait_shares = [_wait_share(Path(folder) / f"tiny{repeat}") for repeat in range(repeats)]
    measured = {name: Measured(found) for name, found in rates.items()}
    rows = [
        higher(f"feed/{world}/{against}", "clips/s", measured[ours], measured[against])
        for world, ours in ((1, "one worker"), (2, "two workers"))
        for against in ("loop", "DataLoader")
    ]
    return [*rows, smaller("feed/wait", "share", Measured(wait_shares))]


def _wait_share(folder: Path) -> float:
    """Return the share of its time that finetune_msrvtt_tiny spends waiting for clips."""
    tiny = make_tiny(folder)
    recipe = recipes.finetune_msrvtt_tiny(
        (tiny.store,), str(folder / "run"), tiny.checkpoint, tiny.vocab
    )
    metrics = run_train(replace(recipe, tracking=tiny.tracking))["metrics"]
    share = metrics["time/data_wait_share"]
    logger.info("finetune_msrvtt_tiny waits %.1f %% of its time for clips", 100 * share)
    return share


def _loader_config(folder: Path) -> LoaderConfig:
    """Write a clip store and return a config that augments its clips as in fine-tuning."""
    logger.info("writing %d videos and a store of %d clips", VIDEOS, CLIPS)
    videos = make_videos(folder / "videos", VIDEOS, SECONDS, gop=30)
    manifest = str(folder / "manifest.parquet")
    storage.write_table(manifest, manifest_of(videos, CLIPS))
    store = run_ingest(
        IngestConfig(
            manifest=manifest,
            output=str(folder / "clips"),
            sampling=SamplingConfig(num_frames=STORED_FRAMES, size=SIZE),
            clips_per_shard=64,
            tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"),
        )
    )["store"]
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red"]) + "\n")
    return LoaderConfig(
        data=(store,),
        vocab=str(vocab),
        max_text_tokens=36,
        num_frames=FRAMES,
        size=SIZE,
        resize="squash",
        frame_choice="head_tail",
        augment=AugmentConfig(),
        seed=0,
    )


def _ray_rate(config: LoaderConfig, world: int, loaders: int) -> float:
    """Return clips per second through Ray Train's data set to workers that only count clips."""
    from ray.data import ExecutionOptions
    from ray.train import DataConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipelines.feed.loader import build_feed

    total = (WARM_BATCHES + COUNTED_BATCHES) * BATCH

    def count(job: dict[str, Any]) -> None:
        import ray.train

        shard = ray.train.get_dataset_shard("train")
        assert shard is not None
        size = job["batch"] // ray.train.get_context().get_world_size()
        begun, clips = 0.0, 0
        batches = shard.iter_batches(batch_size=size, batch_format="numpy", prefetch_batches=2)
        for number, batch in enumerate(batches):
            if number >= job["warm"]:
                clips += len(batch["position"])
            if number == job["warm"] - 1:
                begun = time.perf_counter()
        seconds = time.perf_counter() - begun
        rank = ray.train.get_context().get_world_rank()
        found = {"rate": clips / seconds, "clips": clips}
        Path(job["folder"], f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")

    def feed() -> Any:
        return build_feed(config, 0, total, BLOCK, loaders)

    with TemporaryDirectory() as folder:
        TorchTrainer(
            count,  # type: ignore[arg-type]
            train_loop_config={"batch": BATCH, "warm": WARM_BATCHES, "folder": folder},
            scaling_config=ScalingConfig(num_workers=world),
            run_config=RunConfig(name="feed", storage_path=folder),
            datasets={"train": feed},
            dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
        ).fit()
        told = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    assert sum(one["clips"] for one in told) == COUNTED_BATCHES * BATCH
    return sum(one["rate"] for one in told)


def _loop_rate(config: LoaderConfig, processes: int) -> float:
    """Return the total clips per second of plain loops that run in parallel processes."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    rates: Any = context.Queue()
    children = [
        context.Process(target=_loop, args=(config, rank, processes, barrier, rates), daemon=True)
        for rank in range(processes)
    ]
    for child in children:
        child.start()
    found = [rates.get(timeout=300) for _ in children]
    for child in children:
        child.join()
    return sum(found)


def _loop(config: LoaderConfig, rank: int, processes: int, barrier: Any, rates: Any) -> None:
    end_with_parent()
    import torch

    torch.set_num_threads(1)  # one process per core
    loader = ClipLoader(config)
    batches = list(_batches())[rank::processes]
    loader({"id": batches[0]})
    barrier.wait()
    started = time.perf_counter()
    clips = sum(len(loader({"id": batch})["position"]) for batch in batches[1:])
    rates.put(clips / (time.perf_counter() - started))


def _batches() -> Iterator[np.ndarray]:
    for number in range(WARM_BATCHES + COUNTED_BATCHES):
        yield np.arange(number * BATCH, (number + 1) * BATCH)


class _Batches:
    """Data set of batches for DataLoader, each read by one of its worker processes."""

    def __init__(self, config: LoaderConfig) -> None:
        self._config = config
        self._loader: ClipLoader | None = None
        self._ids = list(_batches())

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, number: int) -> Any:
        import torch

        if self._loader is None:
            self._loader = ClipLoader(self._config)
        batch = self._loader({"id": self._ids[number]})
        return {
            name: torch.from_numpy(column) if column.dtype != object else column.tolist()  # type: ignore[attr-defined]
            for name, column in batch.items()
        }


def _data_loader_rate(config: LoaderConfig, processes: int) -> float:
    """Return clips per second of torch's DataLoader with the given number of processes."""
    from torch.utils.data import DataLoader

    batches = DataLoader(
        _Batches(config),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=processes,
        multiprocessing_context="spawn",
        prefetch_factor=2,
    )
    begun, clips = 0.0, 0
    for number, batch in enumerate(batches):
        if number >= WARM_BATCHES:
            clips += len(batch["position"])
        if number == WARM_BATCHES - 1:
            begun = time.perf_counter()
    return clips / (time.perf_counter() - begun)
