"""The loop of one training worker: batches in, checkpoints and metrics out.

It is a function of (config, step): order, augmentation, negatives and dropout are seeded by the
step and the sample, so a restart from the latest complete checkpoint repeats what would have
happened.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.util.queue import Full, Queue

from pipelines import checkpoints, tracking
from pipelines.clips import ClipStore
from pipelines.config import TrainConfig
from pipelines.feed import Batch
from stgt.checkpoint import load_optimizer, load_weights
from stgt.errors import NonFiniteLossError
from stgt.frames import normalize_frames
from stgt.metrics import best_ranks, retrieval_metrics
from stgt.model import STGT
from stgt.objective import TrainingObjective
from stgt.optim import build_optimizer, learning_rate, set_learning_rate
from stgt.precision import autocast, keep_frozen_weights_in
from stgt.retrieval import similarity_matrix
from stgt.sampling import choose_frames
from stgt.text import TextTokens, Tokenizer

logger = logging.getLogger(__name__)

VAL_BATCH = 32


class WorkerJob(TypedDict):
    """What each training worker is given."""

    config: TrainConfig
    run_id: str
    tracking_uri: str
    progress: Queue


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for what is drawn in a step, the same after a restart."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


class WorkerState:
    """Model, optimizer and step of one worker."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.model = STGT(config.model)
        self.step = 0
        resumed = checkpoints.latest(config.output)
        start = config.init_from
        self.frame_encoder = None if start is None else checkpoints.frame_encoder_of(start)
        if resumed is not None:
            self.step = resumed
            start = checkpoints.checkpoint_uri(config.output, resumed)
        with tempfile.TemporaryDirectory() as scratch:
            folder = None if start is None else checkpoints.fetch(start, Path(scratch) / "start")
            if folder is not None:
                encoder = self.frame_encoder
                if encoder is not None and encoder != start:
                    encoder_folder = checkpoints.fetch(encoder, Path(scratch) / "frame_encoder")
                else:
                    encoder_folder = None
                load_weights(self.model, folder, encoder_folder)
            keep_frozen_weights_in(config.precision, self.model)
            self.model.to(device)
            self.optimizer = build_optimizer(self.model, config.optim)
            if folder is not None and resumed is not None:
                load_optimizer(self.optimizer, folder / checkpoints.OPTIMIZER)


def _average(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Mean over the workers."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return dict(zip(values, (tensor / dist.get_world_size()).tolist(), strict=True))


def train_worker(job: WorkerJob) -> None:
    """The loop of one training worker."""
    config = job["config"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.threads_per_worker)
    device = ray.train.torch.get_device()
    state = WorkerState(config, device)
    recorder = _Recorder(job, rank) if rank == 0 else None
    objective = TrainingObjective(state.model, config.targets, config.gather)
    parallel = ray.train.torch.prepare_model(
        objective, parallel_strategy_kwargs={"broadcast_buffers": False}
    )
    parallel.train()
    shard = ray.train.get_dataset_shard("train")
    assert shard is not None
    feed: Iterator[Any] = iter(
        shard.iter_batches(
            batch_size=config.global_batch // world,
            batch_format="numpy",
            prefetch_batches=2,
            drop_last=True,
        )
    )
    while state.step < config.steps:
        started = time.perf_counter()
        batch: Batch = next(feed)
        waited = time.perf_counter() - started
        lr = learning_rate(state.step, config.steps, config.optim)
        losses = _train_step(state, parallel, batch, lr, config, rank, device)
        state.step += 1
        values = _average(losses, device)
        if recorder is not None:
            values["lr"] = lr
            values["temperature"] = float(state.model.temperature.detach())
            recorder.step(state.step, values, waited, time.perf_counter() - started)
        if state.step % config.checkpoint_every == 0 or state.step == config.steps:
            reported = recorder.checkpoint(state) if recorder is not None else {}
            # A barrier over all workers; only rank 0's metrics are read.
            ray.train.report({"step": state.step, **reported})
            parallel.train()


def _train_step(
    state: WorkerState,
    parallel: torch.nn.Module,
    batch: Batch,
    lr: float,
    config: TrainConfig,
    rank: int,
    device: torch.device,
) -> dict[str, float]:
    """One optimizer step; gives the losses as floats."""
    first = state.step * config.global_batch
    assert first <= batch["position"].min() <= batch["position"].max() < first + config.global_batch
    text = TextTokens(
        torch.from_numpy(np.array(batch["input_ids"])),
        torch.from_numpy(np.array(batch["attention_mask"])),
    ).to(device)
    frames = normalize_frames(torch.from_numpy(np.array(batch["frames"])).to(device))
    positions = torch.from_numpy(np.array(batch["position"])).to(device)
    torch.manual_seed(step_seed(config.seed, state.step, 1 + rank))
    set_learning_rate(state.optimizer, lr)
    with autocast(config.precision, device):
        losses = parallel(frames, text, positions, step_seed(config.seed, state.step, 0))
    values = losses.to_floats()
    if not all(np.isfinite(value) for value in values.values()):
        raise NonFiniteLossError(state.step, values, batch["clip_id"].tolist())
    losses.total.backward()
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.optim.max_grad_norm)
    values["grad_norm"] = float(norm)
    if not np.isfinite(values["grad_norm"]):
        raise NonFiniteLossError(state.step, values, batch["clip_id"].tolist())
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return values


class _Recorder:
    """Rank 0's record: progress to the driver, metrics to MLflow, checkpoints to storage.

    Metrics are kept in the checkpoint that contains their steps and sent once it is complete; what
    a crash kept from being sent is sent after the restart. So every step is recorded once, also
    those that are repeated.
    """

    def __init__(self, job: WorkerJob, rank: int) -> None:
        assert rank == 0
        self._config = job["config"]
        self._progress = job["progress"]
        self._run = tracking.Run(job["tracking_uri"], job["run_id"])
        self._tokenizer = Tokenizer(self._config.vocab)
        self._rows: list[checkpoints.StepMetrics] = []
        self._waited_s = 0.0
        self._busy_s = 0.0
        resumed = checkpoints.latest(self._config.output)
        if resumed is not None:
            uri = checkpoints.checkpoint_uri(self._config.output, resumed)
            self._run.log_history(checkpoints.read_state(uri))

    def step(self, step: int, values: dict[str, float], waited_s: float, step_s: float) -> None:
        """Keep a step's metrics and tell the driver now and then."""
        self._waited_s += waited_s
        self._busy_s += step_s
        wait_share = self._waited_s / self._busy_s
        row = {**values, "time/step_s": step_s, "time/data_wait_share": wait_share}
        self._rows.append({"step": step, "time_ms": int(time.time() * 1000), "metrics": row})
        if step % self._config.progress_every == 0 or step == self._config.steps:
            figures = {
                "loss": f"{values['loss/total']:.3f}",
                "itc": f"{values['loss/itc']:.3f}",
                "itm": f"{values['loss/itm']:.3f}",
                "lm": f"{values['loss/lm']:.3f}",
                "lr": f"{values['lr']:.1e}",
                "data wait": f"{100 * wait_share:.0f} %",
            }
            try:
                self._progress.put_nowait({"done": step, **figures})
            except Full:
                logger.warning("the driver does not read progress; step %d is not shown", step)

    def checkpoint(self, state: WorkerState) -> dict[str, float]:
        """Validate, write a checkpoint, send metrics; gives what is reported to Ray Train."""
        config, step = self._config, state.step
        values = self._rows[-1]["metrics"]
        if config.val_store is not None:
            values.update(validate(state.model, self._tokenizer, config))
        uri = checkpoints.checkpoint_uri(config.output, step)
        checkpoints.save(
            uri,
            state.model,
            self._tokenizer,
            step,
            state.optimizer,
            self._rows,
            state.frame_encoder,
        )
        self._run.log_history(checkpoints.read_state(uri))
        checkpoints.prune(config.output, config.keep_checkpoints)
        self._rows = []
        return values


@torch.no_grad()
def validate(model: STGT, tokenizer: Tokenizer, config: TrainConfig) -> dict[str, float]:
    """Text-to-video retrieval by cosine on at most `val_clips` clips; the model stays as it was."""
    assert config.val_store is not None
    store = ClipStore(config.val_store)
    device = model.temperature.device
    was_training = model.training
    model.eval()
    clips: list[dict[str, Any]] = []
    for shard in range(len(store.shard_sizes)):
        if len(clips) >= config.val_clips:
            break
        clips += store.read_shard(shard, ["captions", "frames"]).to_pylist()
    clips = clips[: config.val_clips]
    embeds = []
    for start in range(0, len(clips), VAL_BATCH):
        frames = np.stack(
            [_even_frames(clip, store, config) for clip in clips[start : start + VAL_BATCH]]
        )
        with autocast(config.precision, device):
            encoded = model.encode_video(normalize_frames(torch.from_numpy(frames).to(device)))
        embeds.append(encoded.embeds.float().cpu().numpy())
    captions = [clip["captions"][0] for clip in clips]
    with autocast(config.precision, device):
        text = model.encode_text(tokenizer(captions, config.model.max_text_tokens).to(device))
    similarity = similarity_matrix(np.concatenate(embeds), text.float().cpu().numpy())
    ranks = best_ranks(similarity, [[row] for row in range(len(clips))])
    model.train(was_training)
    return {f"val/{name}": value for name, value in retrieval_metrics(ranks, "t2v").items()}


def _even_frames(clip: dict[str, Any], store: ClipStore, config: TrainConfig) -> np.ndarray:
    chosen = choose_frames(len(clip["frames"]), config.num_frames, "uniform")
    return store.decode([clip["frames"][i] for i in chosen])
