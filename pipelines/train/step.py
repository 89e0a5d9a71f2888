"""One optimizer step over all training workers."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pipelines.feed.loader import Batch
from pipelines.train.collective import gathered
from pipelines.train.config import TrainConfig
from pipelines.train.state import WorkerState
from stgt.errors import ClipStoreError, NonFiniteLossError, TooFewPairsError
from stgt.inputs.tokenizer import TextTokens
from stgt.interface.model import FrameTokens
from stgt.precision import autocast
from stgt.question_answering.objective import AnswerObjective
from stgt.training.objective import Losses, TrainingObjective, total_loss
from stgt.training.optimizer import set_learning_rate
from stgt.training.randomness import seed_generators

EXAMPLES = 3
"""Number of unusable clips to name in an error."""


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed for random draws in a step; it is the same after a restart."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


def train_step(
    state: WorkerState,
    parallel: torch.nn.Module,
    batch: Batch,
    lr: float,
    config: TrainConfig,
    rank: int,
    device: torch.device,
) -> tuple[dict[str, float], bool]:
    """Run one optimizer step. All workers must call this.

    Returns:
        Losses and gradient norm, equal on all workers, and whether fp16 gradients overflowed. On
        overflow the weights stay unchanged.

    Raises:
        ClipStoreError: Fewer than two clips of the global batch could be used.
        NonFiniteLossError: A loss is not finite. All workers raise it, with the clips of the
            workers whose own loss is not finite.
    """
    first = state.step * config.global_batch
    assert first <= batch["position"].min() <= batch["position"].max() < first + config.global_batch
    set_learning_rate(state.optimizer, lr)
    scaler = state.scaler
    try:
        losses = _backward(state, parallel, batch, config, rank, device)
    except TooFewPairsError as error:
        # All workers raise it together, since it concerns the global batch.
        faults = gathered(
            [
                f"{clip}: {fault}"
                for clip, fault in zip(batch["clip_id"], batch["fault"], strict=True)
                if fault
            ]
        )
        raise ClipStoreError(
            f"step {state.step + 1}: {len(faults)} of its {config.global_batch} clips could not be "
            f"used, so {_too_few(config)} (for example {'; '.join(faults[:EXAMPLES])}); fix or "
            "remove these videos, or use a larger global_batch"
        ) from error
    scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.optim.max_grad_norm)
    values, own_is_finite = _averaged(losses, norm, config, device)
    overflow = scaler.is_enabled() and not np.isfinite(values["grad_norm"])
    finite = all(np.isfinite(v) for name, v in values.items() if name != "grad_norm")
    if not finite or not (overflow or np.isfinite(values["grad_norm"])):
        # All workers see the averages; only those whose own losses are not finite name clips.
        clips = batch["clip_id"].tolist()
        named = gathered([] if own_is_finite else clips) or gathered(clips)
        raise NonFiniteLossError(state.step, values, named)
    scaler.step(state.optimizer)
    scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    objective = parallel.module if isinstance(parallel, DistributedDataParallel) else parallel
    if isinstance(objective, TrainingObjective):
        values["samples/without_negative"] = float(objective.without_negative)
    if scaler.is_enabled():
        values["loss_scale"] = scaler.get_scale()
    return values, overflow


def frames_of(batch: Batch, device: torch.device) -> torch.Tensor | FrameTokens:
    """Return the frames [B, T, H, W, 3] uint8 of a batch on a device, or their stored tokens."""
    if "tokens" in batch:
        return batch["tokens"].to(device)
    assert "frames" in batch, "a batch has one of the two"
    return torch.from_numpy(batch["frames"]).to(device, non_blocking=True)


def _backward(
    state: WorkerState,
    parallel: torch.nn.Module,
    batch: Batch,
    config: TrainConfig,
    rank: int,
    device: torch.device,
) -> Losses:
    """Compute the losses of a batch, and add their gradients to those of the parameters."""
    text = TextTokens(
        torch.from_numpy(batch["input_ids"]), torch.from_numpy(batch["attention_mask"])
    ).to(device)
    frames = frames_of(batch, device)
    positions = torch.from_numpy(batch["position"]).to(device)
    valid = torch.tensor([fault == "" for fault in batch["fault"]], device=device)
    clip_keys = torch.from_numpy(batch["clip_key"]).to(device)
    draw_seed = step_seed(config.seed, state.step, 0)
    own_seed = step_seed(config.seed, state.step, 1 + rank)
    scaler = state.scaler

    def scale() -> float:
        # Initializes the scaler, which creates its scale lazily.
        return float(scaler.scale(torch.ones((), device=device)))

    if config.questions is not None:
        answers = torch.from_numpy(batch["answer"]).to(device)
        asked = (frames, text, answers, valid)
        if isinstance(parallel, AnswerObjective) and config.micro_batch is not None:
            losses = parallel.accumulate(
                *asked,
                micro_batch=config.micro_batch,
                seed=own_seed,
                scale=scale(),
                context=lambda: autocast(config.precision, device),
            )
            _average_gradients(state.model)
            return losses
        seed_generators(own_seed, device)
        with autocast(config.precision, device):
            losses = parallel(*asked)
        scaler.scale(total_loss(losses)).backward()
        return losses
    if isinstance(parallel, TrainingObjective) and config.micro_batch is not None:
        losses = parallel.accumulate(
            frames,
            text,
            positions,
            draw_seed,
            valid,
            clip_keys,
            micro_batch=config.micro_batch,
            seed=own_seed,
            scale=scale(),
            context=lambda: autocast(config.precision, device),
        )
        _average_gradients(state.model)
        return losses
    seed_generators(own_seed, device)
    with autocast(config.precision, device):
        losses = parallel(frames, text, positions, draw_seed, valid, clip_keys)
    scaler.scale(total_loss(losses, config.loss_weights)).backward()
    return losses


def _too_few(config: TrainConfig) -> str:
    if config.questions is not None:
        return "none is left to ask about"
    return "fewer than two are left for contrastive training"


def _averaged(
    losses: Losses, norm: torch.Tensor, config: TrainConfig, device: torch.device
) -> tuple[dict[str, float], bool]:
    """Return losses and gradient norm averaged over workers, and whether own losses are finite."""
    named = {
        "loss/total": total_loss(losses, config.loss_weights),
        **{f"loss/{name}": loss for name, loss in losses.items()},
        "grad_norm": norm,
    }
    own = torch.stack([value.detach().to(device, torch.float64) for value in named.values()])
    mean = own.clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    finite = bool(own[:-1].isfinite().all())
    return dict(zip(named, mean.tolist(), strict=True)), finite


def _average_gradients(model: torch.nn.Module) -> None:
    """Average the gradients over workers, as DistributedDataParallel does."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    world = dist.get_world_size()
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
