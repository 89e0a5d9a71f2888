"""Training steps per second with stored frame tokens, beside steps that encode their frames.

The frame encoder is as deep as it takes for nine tenths of a step's arithmetic, its share at the
published size. Both sides load their clips with the data worker's code in a thread, and take whole
optimizer steps. The features are written before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipelines.artifacts import checkpoints
from pipelines.artifacts.clip_store import (
    CATALOGUE,
    CLIP_SCHEMA,
    recorded_sampling,
    shard_uri,
    shard_writer,
)
from pipelines.bench.harness import Findings, Row, higher, median_seconds, smaller
from pipelines.common import storage
from pipelines.feed.config import TrainingFeatures
from pipelines.feed.features.config import FeaturesConfig
from pipelines.feed.features.run import run_features
from pipelines.feed.loader import Batch, ClipLoader, ShareOfWorker, load_in_process
from pipelines.train import features, preflight, recipes
from pipelines.train.config import TrainConfig
from pipelines.train.prefetch import BatchPrefetcher
from pipelines.train.state import WorkerState
from pipelines.train.step import train_step
from pipelines.video import frame_codec
from pipelines.video.config import SamplingConfig
from stgt.config import stgt_tiny
from stgt.inputs.tokenizer import TextTokens, Tokenizer
from stgt.model import STGT
from stgt.training.objective import TrainingObjective, total_loss

logger = logging.getLogger(__name__)

SHARE = 0.9
CLIPS, STORED_FRAMES, STEPS, BATCH = 64, 8, 8, 8
MAX_STALL_S = 120.0
WORDS = ("a", "red", "blue", "ball", "square", "moves", "left", "right", "then", "stops")


def measure(device: str, repeats: int) -> Findings:
    """Measure steps per second, the difference in the losses, and when writing has paid off."""
    torch.manual_seed(0)
    with TemporaryDirectory() as name:
        folder = Path(name)
        store, vocab = _write_store(folder / "store"), str(folder / "vocab.txt")
        tokenizer = _tokenizer(Path(vocab))
        depth, share = _depth()
        config = replace(
            stgt_tiny(), vision=replace(stgt_tiny().vision, depth=depth)
        ).for_tokenizer(tokenizer)
        checkpoint = str(folder / "checkpoint")
        checkpoints.save(checkpoint, STGT(config, tokenizer), tokenizer, step=0)
        logger.info(
            "a frame encoder of %d blocks does %.0f %% of a step's arithmetic", depth, 100 * share
        )
        started = time.perf_counter()
        stored = run_features(
            FeaturesConfig(
                store=store,
                checkpoint=checkpoint,
                output=str(folder / "features"),
                use_gpu=False,
            )
        )
        writing_s = time.perf_counter() - started
        recipe = recipes.pretrain_stage1_tiny((store,), str(folder / "run"), vocab, checkpoint)
        plain = replace(
            recipe,
            model=replace(config, vision=replace(config.vision, frozen=True)),
            steps=STEPS,
            global_batch=BATCH,
            block_clips=BATCH,
            num_workers=1,
        )
        works = {
            "ours": _Steps(
                replace(plain, features=TrainingFeatures(store=(stored["output"],))), device
            ),
            "baseline": _Steps(plain, device),
        }
        first = {name: work.losses[0] for name, work in works.items()}
        difference = abs(first["ours"] - first["baseline"]) / first["baseline"]
        seconds = median_seconds(dict(works), device, repeats, warm=True)
    saved_s = float(seconds["baseline"] - seconds["ours"]) * CLIPS / (STEPS * BATCH)
    rows: list[Row] = [
        higher("features", "steps/s", seconds["ours"].rate(STEPS), seconds["baseline"].rate(STEPS)),
        smaller("features/difference", "relative", difference),
        smaller("features/break-even", "epochs", writing_s / saved_s),
    ]
    return Findings(
        rows,
        notes=(
            f"features: the encoder does {100 * share:.0f} % of a step's arithmetic, so steps "
            f"without it could be at most {1 / (1 - share):.1f} times as fast. The break-even "
            f"counts epochs of one caption per clip, with {STORED_FRAMES} stored and "
            f"{plain.num_frames} used frames.",
        ),
    )


@dataclass(frozen=True)
class _Batches:
    """Makes the batches of one run anew."""

    config: TrainConfig

    def __call__(self) -> BatchPrefetcher:
        config = self.config
        loader = ClipLoader(config.loader)
        stop = config.steps * config.global_batch
        share = ShareOfWorker(0, 1, config.global_batch)
        batches = load_in_process(loader, 0, stop, config.clips_per_block, share)
        read: Callable[[Batch], Batch] | None = None
        if config.features.store:
            read = features.reading_tokens(config)
        return BatchPrefetcher(batches, config.global_batch, MAX_STALL_S, None, read)


class _Steps:
    """Takes the steps of a training in this process; each call begins again at the first one."""

    def __init__(self, config: TrainConfig, device: str) -> None:
        self._config = preflight.with_vocabulary(preflight.with_absolute_paths(config))
        features.check_features(self._config)
        self._device = torch.device(device)
        self._state = WorkerState(self._config, self._device)
        features.check_encoder(self._config, self._state.model)
        self._objective = TrainingObjective(self._state.model, self._config.targets).train()
        self._batches = _Batches(self._config)
        self.losses = self()

    def __call__(self) -> list[float]:
        """Take all steps and return their losses."""
        batches, losses = self._batches(), []
        for step in range(self._config.steps):
            self._state.step = step
            values, _ = train_step(
                self._state,
                self._objective,
                batches.next(step),
                1e-5,
                self._config,
                0,
                self._device,
            )
            losses.append(values["loss/total"])
        return losses


def _depth() -> tuple[int, float]:
    """Return the depth of an encoder with nine tenths of a step's arithmetic, and its share."""

    def flops(depth: int) -> tuple[float, float]:
        """Return the operations of the encoder and of the whole step, for two clips."""
        tiny = stgt_tiny()
        model = STGT(replace(tiny, vision=replace(tiny.vision, depth=depth, frozen=True)))
        model.checks_values = False
        frames = torch.zeros(2, tiny.num_frames, 3, tiny.vision.image_size, tiny.vision.image_size)
        ids = torch.ones(2, tiny.max_text_tokens, dtype=torch.int64)
        text = TextTokens(ids, torch.ones_like(ids))
        with FlopCounterMode(display=False) as encoder, torch.no_grad():
            model.encode_frames(frames)
        with FlopCounterMode(display=False) as step:
            objective = TrainingObjective(model, "hard", negatives="published")
            total_loss(objective(frames, text, torch.arange(2), 0)).backward()
        return float(encoder.get_total_flops()), float(step.get_total_flops())

    (one, rest), (two, _) = flops(1), flops(2)
    others = rest - one
    depth = 1 + round((SHARE / (1 - SHARE) * others - one) / (two - one))
    encoder = one + (depth - 1) * (two - one)
    return depth, encoder / (encoder + others)


def _tokenizer(path: Path) -> Tokenizer:
    path.write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)) + "\n")
    return Tokenizer(path)


def _write_store(folder: Path) -> str:
    """Write a finished store of random clips in two shards, without an ingest."""
    generator = np.random.default_rng(0)
    size = stgt_tiny().vision.image_size
    sampling = SamplingConfig(num_frames=STORED_FRAMES, size=size)
    (folder / "shards").mkdir(parents=True)
    records = []
    for shard in range(2):
        place = shard_uri(str(folder), shard)
        with shard_writer(place) as writer:
            for clip in range(CLIPS // 2):
                coarse = generator.integers(0, 256, (STORED_FRAMES, 8, 8, 3)).astype(np.uint8)
                frames = coarse.repeat(size // 8, axis=1).repeat(size // 8, axis=2)
                name = f"clip{shard}-{clip}"
                row = {
                    **dict.fromkeys(CLIP_SCHEMA.names),
                    "clip_id": name,
                    "video_id": name,
                    "video_uri": f"/{name}.mp4",
                    "start_s": 0.0,
                    "end_s": 1.0,
                    "captions": [" ".join(generator.choice(WORDS, 4).tolist())],
                    "frames": frame_codec.encode_frames(frames, sampling.codec, 95),
                    "frame_indices": list(range(STORED_FRAMES)),
                }
                writer.write_table(pa.Table.from_pylist([row], schema=CLIP_SCHEMA))
        records.append(
            {
                "shard": shard,
                "clips": CLIPS // 2,
                "quarantined": 0,
                "captions": [CLIPS // 2],
                "sha256": storage.digest(place),
                "bytes": storage.size_bytes(place),
            }
        )
    catalogue = {
        "clips": CLIPS,
        "quarantined": 0,
        "sampling": recorded_sampling(sampling),
        "shards": records,
        "digest": "".join(str(record["sha256"])[:8] for record in records),
        "histograms": {"captions_per_clip": [CLIPS]},
    }
    storage.write_json(storage.join(str(folder), CATALOGUE), catalogue)
    return str(folder)
