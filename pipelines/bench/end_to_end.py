"""The quickstart's stages end to end, against the same work as a plain single-process script.

Both begin with the same videos and the same untrained weights, decode all clips, train for as many
steps, and evaluate retrieval with reranking. Each runs in a process of its own, from the import of
the stages to the metrics, so that starting Ray counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pipelines.bench.harness import Measured, Row, faster, higher, in_child
from pipelines.common import storage
from pipelines.common.config import TrackingConfig
from pipelines.video.synthetic import dataset

if TYPE_CHECKING:
    from pipelines.train.config import TrainConfig

logger = logging.getLogger(__name__)

K_RERANK = 16
CLIPS_PER_SHARD = 64
VIDEOS, VOCAB, UNTRAINED, RESULT = "videos", "vocab.txt", "untrained", "result.json"


@dataclass(frozen=True)
class Size:
    """How much both do."""

    train_clips: int = 400
    val_clips: int = 100
    steps: int = 200


def measure(repeats: int, connect: Callable[[], None], size: Size = Size()) -> list[Row]:
    """Measure the seconds of both from start to end, and the recall that they reach."""
    taken: dict[str, list[float]] = {"stages": [], "script": []}
    recalls: dict[str, list[float]] = {"stages": [], "script": []}
    with TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder, size)
        for repeat in range(repeats):
            for which in ("stages", "script") if repeat % 2 == 0 else ("script", "stages"):
                output = str(folder / f"{which}{repeat}")
                work, arguments = (
                    (_stages, (folder, output, size, connect))
                    if which == "stages"
                    else (_script, (folder, output, size))
                )
                seconds, _ = in_child(work, arguments)
                taken[which].append(seconds)
                metrics = storage.read_json(storage.join(output, RESULT))
                recalls[which].append(metrics["t2v/R1"])
            logger.info(
                "run %d of %d: stages %.1f s, R@1 %.1f; script %.1f s, R@1 %.1f",
                repeat + 1,
                repeats,
                taken["stages"][-1],
                recalls["stages"][-1],
                taken["script"][-1],
                recalls["script"][-1],
            )
    return [
        faster("end_to_end", Measured(taken["stages"]), Measured(taken["script"])),
        higher("end_to_end/R@1", "%", Measured(recalls["stages"]), Measured(recalls["script"])),
    ]


def _prepare(folder: Path, size: Size) -> None:
    """Write the videos, their annotations, a vocabulary and an untrained checkpoint."""
    import torch

    from pipelines.artifacts import checkpoints
    from stgt.config import stgt_tiny
    from stgt.inputs.tokenizer import Tokenizer
    from stgt.model import STGT

    logger.info("writing %d videos", size.train_clips + size.val_clips)
    planned = dataset.plan_videos(size.train_clips, size.val_clips, seed=0)
    for split in dataset.SPLITS:
        dataset.write_split(str(folder), split, planned[split])
    dataset.write_vocabulary(str(folder / VOCAB))
    tokenizer = Tokenizer(folder / VOCAB)
    torch.manual_seed(0)
    model = STGT(stgt_tiny().for_vocabulary(tokenizer.bos_id, len(tokenizer), tokenizer.pad_id))
    checkpoints.save(str(folder / UNTRAINED), model, tokenizer, step=0)


def _recipe(folder: Path, data: tuple[str, ...], output: str, steps: int) -> TrainConfig:
    """Return the first stage of the quickstart, with clips in random order and no validation."""
    from pipelines.train import recipes

    recipe = recipes.with_muon(recipes.pretrain_stage1_tiny(data, output, str(folder / VOCAB)))
    return replace(
        recipe,
        init_from=str(folder / UNTRAINED),
        steps=steps,
        checkpoint_every=steps,
        tracking=TrackingConfig(uri=f"sqlite:///{output}.db"),
    )


def _stages(folder: Path, output: str, size: Size, connect: Callable[[], None]) -> None:
    """Do the work with the stages: manifest, ingest, train, evaluate."""
    connect()
    from pipelines.evaluate.config import EvaluateConfig
    from pipelines.evaluate.run import run_evaluate
    from pipelines.ingest.config import IngestConfig
    from pipelines.ingest.run import run_ingest
    from pipelines.manifest.config import ManifestConfig
    from pipelines.manifest.run import run_manifest
    from pipelines.quickstart.store import tiny_sampling
    from pipelines.train.run import run_train

    tracking = TrackingConfig(uri=f"sqlite:///{output}.db")
    stores = {}
    for split in dataset.SPLITS:
        manifest = f"{output}/{split}.parquet"
        run_manifest(
            ManifestConfig(
                annotations=(str(folder / f"results_{split}.csv"),),
                videos=(str(folder / VIDEOS),),
                output=manifest,
                split=split,
            )
        )
        stores[split] = run_ingest(
            IngestConfig(
                manifest=manifest,
                output=f"{output}/clips/{split}",
                sampling=tiny_sampling(),
                clips_per_shard=CLIPS_PER_SHARD,
                num_workers=2,
                tracking=tracking,
            )
        )["store"]
    train, val = (stores[split] for split in dataset.SPLITS)
    trained = run_train(_recipe(folder, (train,), f"{output}/run", size.steps))
    metrics = run_evaluate(
        EvaluateConfig(
            data=val,
            # The captions of damaged clips, which count as misses here; the script leaves them out.
            manifest=f"{output}/val.parquet",
            checkpoint=trained["checkpoint"],
            output=f"{output}/evaluation",
            k_rerank=K_RERANK,
            tracking=tracking,
        )
    )["metrics"]
    storage.write_json(storage.join(output, RESULT), metrics)


def _script(folder: Path, output: str, size: Size) -> None:
    """Do the work with the plain script."""
    from pipelines.bench import plain_pipeline
    from pipelines.quickstart.store import tiny_sampling

    metrics = plain_pipeline.run(
        {split: folder / f"results_{split}.csv" for split in dataset.SPLITS},
        folder / VIDEOS,
        tiny_sampling(),
        _recipe(folder, (str(folder),), output, size.steps),
        K_RERANK,
    )
    storage.write_json(storage.join(output, RESULT), metrics)
