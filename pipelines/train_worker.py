"""The loop of one training worker: batches in, checkpoints and metrics out.

It is a function of (config, step): order, augmentation, negatives and dropout are seeded by the
step and the sample, so a restart from the latest complete checkpoint repeats what would have
happened.
"""

from __future__ import annotations

import logging
import pickle
import queue
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.queue import Queue

from pipelines import checkpoints, stopping, validation
from pipelines.board import read_board
from pipelines.feed import PREFETCHED_BATCHES, Batch
from pipelines.train_config import TrainConfig
from pipelines.train_record import Recorder, Sample, gathered, gpu_figures
from stgt.checkpoint import begin_with, load_optimizer, load_weights
from stgt.errors import DataStallError, NonFiniteLossError
from stgt.model import STGT
from stgt.objective import Losses, TrainingObjective
from stgt.optim import build_optimizer, learning_rate, set_learning_rate
from stgt.precision import autocast, gradient_scaler, keep_frozen_weights_in
from stgt.text import TextTokens

logger = logging.getLogger(__name__)

MOST_OVERFLOWS = 50
"""fp16 steps in a row that overflow, after which the loss scale is no longer to blame."""


class WorkerJob(TypedDict):
    """What each training worker is given."""

    config: TrainConfig
    parent_id: str | None
    progress: Queue
    board: ActorHandle


class LeavingError(RuntimeError):
    """A worker has to go, after a checkpoint; the group begins again without it."""


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for what is drawn in a step, the same after a restart."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


class WorkerState:
    """Model, optimizer and step of one worker."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.model = STGT(config.model)
        self.step = 0
        self.skipped = 0
        self.scaler = gradient_scaler(config.precision, device)
        resumed = checkpoints.latest(config.output)
        start = config.init_from
        self.frame_encoder = None if start is None else checkpoints.frame_encoder_of(start)
        if resumed is not None:
            self.step = resumed
            start = checkpoints.checkpoint_uri(config.output, resumed)
            state = checkpoints.read_state(start)
            self.skipped = state["skipped"]
            if state["scaler"]:
                self.scaler.load_state_dict(dict(state["scaler"]))
        with tempfile.TemporaryDirectory() as scratch:
            folder = None if start is None else checkpoints.fetch(start, Path(scratch) / "start")
            if folder is not None:
                encoder = self.frame_encoder
                if encoder is not None and encoder != start:
                    encoder_folder = checkpoints.fetch(encoder, Path(scratch) / "frame_encoder")
                else:
                    encoder_folder = None
                load = begin_with if resumed is None else load_weights
                load(self.model, folder, encoder_folder)
            keep_frozen_weights_in(config.precision, self.model)
            self.model.to(device)
            self.optimizer = build_optimizer(self.model, config.optim)
            if folder is not None and resumed is not None:
                load_optimizer(self.optimizer, folder / checkpoints.OPTIMIZER)
        if config.compile:
            self.model.compile_blocks()


class Feed:
    """Batches of this worker, fetched ahead by a thread; one that does not come is an error."""

    def __init__(
        self, batches: Iterator[Any], size: int, max_stall_s: float, board: ActorHandle | None
    ) -> None:
        self._size = size
        self._max_stall_s = max_stall_s
        self._board = board
        self._ready: queue.Queue[Batch | Exception | None] = queue.Queue(maxsize=1)
        threading.Thread(target=self._fetch, args=(batches,), daemon=True).start()

    def _fetch(self, batches: Iterator[Any]) -> None:
        try:
            for batch in batches:
                # Read-only views of Ray's object store would be kept alive by what comes of them.
                self._ready.put({name: np.array(column) for name, column in batch.items()})  # type: ignore[arg-type]
            self._ready.put(None)
        except Exception as error:
            self._ready.put(error)

    def next(self, step: int) -> Batch:
        """The clips of this worker for a step.

        Raises:
            DataStallError: they did not come in time.
            STGTError: a data worker could not load them.
        """
        try:
            batch = self._ready.get(timeout=self._max_stall_s)
        except queue.Empty as error:
            doing = read_board(self._board)
            raise DataStallError(
                f"step {step} waited {self._max_stall_s:g} s for its clips ({doing}); mend what "
                "they wait for, or raise max_stall_s, and run the same command again"
            ) from error
        if isinstance(batch, Exception):
            raise batch
        if batch is None or len(batch["position"]) != self._size:
            held = 0 if batch is None else len(batch["position"])
            raise RuntimeError(f"step {step}: {held} clips came, {self._size} were due")
        for error in filter(None, batch["error"]):
            raise pickle.loads(error)  # written a moment ago by a data worker of this run
        return batch


def train_worker(job: WorkerJob) -> None:
    """The loop of one training worker."""
    config = job["config"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    # Before the first collective: a rank with another share would keep the others waiting.
    share, rest = divmod(config.global_batch, world)
    if rest or share % config.clips_per_block:
        raise ValueError(
            f"{world} workers cannot share {config.global_batch} clips a step in blocks of "
            f"{config.clips_per_block}"
        )
    torch.set_num_threads(config.threads_per_worker)
    device = ray.train.torch.get_device()
    shard = ray.train.get_dataset_shard("train")
    assert shard is not None
    # Before the model is built, which takes the data workers' first batches some time as well.
    feed = Feed(
        iter(
            shard.iter_batches(
                batch_size=share,
                batch_format="numpy",
                prefetch_batches=PREFETCHED_BATCHES,
                drop_last=True,
            )
        ),
        share,
        config.max_stall_s,
        job["board"],
    )
    state = WorkerState(config, device)
    recorder = Recorder(job, rank, state.skipped, state.step)
    objective = TrainingObjective(state.model, config.targets, config.gather)
    in_one_pass = config.micro_batch is None or config.micro_batch >= share
    parallel: torch.nn.Module = objective
    if in_one_pass:
        parallel = ray.train.torch.prepare_model(
            objective, parallel_strategy_kwargs={"broadcast_buffers": False}
        )
    parallel.train()
    overflows = 0
    while state.step < config.steps:
        started = time.perf_counter()
        batch = feed.next(state.step)
        waited = time.perf_counter() - started
        lr = learning_rate(state.step, config.steps, config.optim)
        values, overflow = train_step(state, parallel, batch, lr, config, rank, device)
        overflows = overflows + 1 if overflow else 0
        if overflows > MOST_OVERFLOWS:
            raise NonFiniteLossError(state.step, values, batch["clip_id"].tolist())
        state.step += 1
        values["lr"] = lr
        values["temperature"] = float(state.model.temperature.detach())
        recorder.used(_samples(state.step, batch))
        looks = state.step % config.progress_every == 0
        if looks:
            values.update(gpu_figures(device))
        recorder.step(state.step, values, waited, time.perf_counter() - started)
        stop = _stop_request(job["board"], rank, device) if looks else None
        last = state.step == config.steps
        regular = last or state.step % config.checkpoint_every == 0
        due = regular or stop is not None
        # Not before a checkpoint that was asked for: the time to take it may be short.
        if validation.validates(config) and _validation_is_due(config, state.step, regular):
            recorder.add(validation.validate(state.model, recorder.tokenizer, config, device))
            parallel.train()
        if due:
            reported = recorder.checkpoint(state)
            # A barrier over all workers; only rank 0's metrics are read.
            ray.train.report({"step": state.step, **(reported if rank == 0 else {})})
        if stop == "leave" and not last:
            raise LeavingError(f"a worker was told to end; checkpoint at step {state.step}")
        if stop == "stop":
            return


def _validation_is_due(config: TrainConfig, step: int, checkpoint_is_due: bool) -> bool:
    if config.validate_every is None:
        return checkpoint_is_due
    return step % config.validate_every == 0 or step == config.steps


def _samples(step: int, batch: Batch) -> list[Sample]:
    return [
        Sample(step=step, position=int(position), clip_id=clip_id, fault=fault)
        for position, clip_id, fault in zip(
            batch["position"], batch["clip_id"], batch["fault"], strict=True
        )
    ]


def _stop_request(board: ActorHandle, rank: int, device: torch.device) -> str | None:
    """Whether to stop, the same on all workers: the run was told to, or a worker has to leave."""
    asked = 0
    if rank == 0:
        try:
            asked = int(ray.get(board.asked_to_stop.remote(), timeout=5) is not None)
        except RayError as error:
            logger.warning("whether the run is to stop is not known: %s", error)
    # Nodes that are being drained, as Ray tells. All workers have to ask, whatever else they know.
    draining = ray.train.get_preemption_info() is not None
    leaving = int(draining or stopping.told_to_end())
    signals = torch.tensor([asked, leaving], device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(signals)
    stop, leave = (signals > 0).tolist()
    return "stop" if stop else "leave" if leave else None


def train_step(
    state: WorkerState,
    parallel: torch.nn.Module,
    batch: Batch,
    lr: float,
    config: TrainConfig,
    rank: int,
    device: torch.device,
) -> tuple[dict[str, float], bool]:
    """One optimizer step; the same on all workers.

    Returns:
        Losses and gradient norm, and whether fp16 overflowed, which leaves the weights alone.

    Raises:
        NonFiniteLossError: on all workers, with the clips of those whose loss is not finite.
    """
    first = state.step * config.global_batch
    assert first <= batch["position"].min() <= batch["position"].max() < first + config.global_batch
    text = TextTokens(
        torch.from_numpy(batch["input_ids"]), torch.from_numpy(batch["attention_mask"])
    ).to(device)
    frames = torch.from_numpy(batch["frames"]).to(device, non_blocking=True)
    positions = torch.from_numpy(batch["position"]).to(device)
    valid = torch.tensor([fault == "" for fault in batch["fault"]], device=device)
    draw_seed = step_seed(config.seed, state.step, 0)
    own_seed = step_seed(config.seed, state.step, 1 + rank)
    set_learning_rate(state.optimizer, lr)
    scaler = state.scaler
    if isinstance(parallel, TrainingObjective) and config.micro_batch is not None:
        losses = parallel.accumulate(
            frames,
            text,
            positions,
            draw_seed,
            valid,
            micro_batch=config.micro_batch,
            seed=own_seed,
            scale=float(scaler.scale(torch.ones((), device=device))),  # it makes its scale now
            context=lambda: autocast(config.precision, device),
        )
        _average_gradients(state.model)
    else:
        torch.manual_seed(own_seed)
        with autocast(config.precision, device):
            losses = parallel(frames, text, positions, draw_seed, valid)
        scaler.scale(losses.total).backward()
    scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.optim.max_grad_norm)
    values, own_is_finite = _averaged(losses, norm, device)
    overflow = scaler.is_enabled() and not np.isfinite(values["grad_norm"])
    finite = all(np.isfinite(v) for name, v in values.items() if name != "grad_norm")
    if not finite or not (overflow or np.isfinite(values["grad_norm"])):
        # Every worker knows; those with a loss of their own that is not finite name their clips.
        clips = batch["clip_id"].tolist()
        named = gathered([] if own_is_finite else clips) or gathered(clips)
        raise NonFiniteLossError(state.step, values, named)
    scaler.step(state.optimizer)
    scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if scaler.is_enabled():
        values["loss_scale"] = scaler.get_scale()
    return values, overflow


def _averaged(
    losses: Losses, norm: torch.Tensor, device: torch.device
) -> tuple[dict[str, float], bool]:
    """Losses averaged over the workers with the gradient norm, and whether the own are finite."""
    names = ("loss/total", "loss/itc", "loss/itm", "loss/lm", "grad_norm")
    own = torch.stack(
        [
            one.detach().to(device, torch.float64)
            for one in (losses.total, losses.itc, losses.itm, losses.lm, norm)
        ]
    )
    mean = own.clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    finite = bool(own[:4].isfinite().all())
    return dict(zip(names, mean.tolist(), strict=True)), finite


def _average_gradients(model: torch.nn.Module) -> None:
    """Mean of the workers' gradients, as DistributedDataParallel takes it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    world = dist.get_world_size()
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
