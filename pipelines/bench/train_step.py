"""The training step of STGT, against the plain formulation that the published code uses.

A step is the forward pass, the losses, the backward pass, the clipping of gradients and the
optimizer, on frames and texts that are already on the device. On a GPU the model has the published
size, ours computes in bf16 with compiled blocks and CUDA graphs (`--compile` of a training), and
the baseline in fp16 under autocast from float32 weights. On a CPU the model has a quarter of the
widths and depths, and both compute in float32. Its single graph block then takes a third of the
arithmetic, about three times its share at the published size, so the ratio says little about that
size. Both start from the same weights, with the published dropout; their losses are compared
without dropout.

Imports neither Ray nor what needs it.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from pipelines.bench.harness import (
    Findings,
    Measured,
    Row,
    Work,
    higher,
    median_seconds,
    peak_bytes,
    smaller,
)
from pipelines.bench.plain_step import form_attention_matrices, plain_losses, plain_optimizer
from pipelines.bench.products import flop_counter
from stgt.config import ModelConfig, OptimConfig, Precision, stgt_g
from stgt.inputs.tokenizer import TextTokens
from stgt.model import STGT
from stgt.precision import autocast, dtype_of, gradient_scaler, keep_frozen_weights_in
from stgt.training.objective import Losses, TrainingObjective, total_loss
from stgt.training.optimizer import build_optimizer

logger = logging.getLogger(__name__)

Form = Literal["ours", "compiled", "baseline"]

DRAW_SEED = 0
LEAST_TOKENS = 8
PEAK_EDGE = {"cpu": 1024, "cuda": 8192}
"""Edge length of the square matrices whose product measures the device's peak rate."""
PEAK_PRODUCTS, PEAK_REPEATS = 10, 3
PARTS = {"frame encoder": "frame_encoder", "graph": "graph"}
"""Parts of the model whose operations are counted; the rest is that of the Q-Former and heads."""


@dataclass(frozen=True)
class Size:
    """What a step computes."""

    model: ModelConfig
    clips: int
    ours: Precision
    baseline: Precision
    more_clips: int | None = None
    """Clips of a larger batch, which is measured for the compiled form alone; None for none."""


def reduced(config: ModelConfig) -> ModelConfig:
    """Return a config with a quarter of the widths and depths.

    Frames, patches, heads of the vision parts, width of the Q-Former's heads, query tokens and
    texts keep their published sizes.
    """
    vision, qformer = config.vision, config.qformer
    return replace(
        config,
        vision=replace(vision, width=vision.width // 4, depth=round(vision.depth / 4)),
        qformer=replace(
            qformer,
            width=qformer.width // 4,
            layers=qformer.layers // 4,
            heads=qformer.heads // 4,
            mlp_width=qformer.mlp_width // 4,
        ),
    )


SIZES = {
    "cpu": Size(reduced(stgt_g()), clips=4, ours="fp32", baseline="fp32"),
    "cuda": Size(stgt_g(), clips=20, ours="bf16", baseline="fp16", more_clips=64),
}
"""On a GPU, a batch has as many clips as in the published fine-tuning, and then so many that the
time to start operations hardly counts."""


@dataclass(frozen=True)
class Batch:
    """What a step reads, on the device."""

    frames: torch.Tensor
    """[B, T, H, W, 3] uint8."""
    text: TextTokens
    """Ids and mask [B, S]."""
    positions: torch.Tensor
    """[B] int64."""


def make_batch(size: Size, device: str) -> Batch:
    """Return random frames and texts of 8 to the maximum number of tokens."""
    config, generator = size.model, torch.Generator().manual_seed(0)
    edge, most = config.vision.image_size, config.max_text_tokens
    shape = (size.clips, config.num_frames, edge, edge, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    lengths = torch.randint(LEAST_TOKENS, most + 1, (size.clips, 1), generator=generator)
    mask = (torch.arange(most) < lengths).long()
    ids = torch.randint(1, config.bos_id, mask.shape, generator=generator) * mask
    return Batch(
        frames=frames.to(device),
        text=TextTokens(ids, mask).to(torch.device(device)),
        positions=torch.arange(size.clips, device=device),
    )


@dataclass(frozen=True)
class Step:
    """A form of the training step."""

    model: STGT
    losses: Callable[[], Losses]
    """Forward pass and losses, under autocast."""
    run: Work
    """The whole step."""


def make_step(form: Form, size: Size, device: str) -> Step:
    """Build the model, the same for every form, and return its training step."""
    plain = form == "baseline"
    precision = size.baseline if plain else size.ours
    torch.manual_seed(0)
    with torch.device(device):
        model = STGT(size.model).train()
    batch, optim = make_batch(size, device), OptimConfig()
    if plain:
        form_attention_matrices(model)
        optimizer = plain_optimizer(model, optim.weight_decay, optim.lr)
    else:
        keep_frozen_weights_in(precision, model)
        optimizer = build_optimizer(model, optim)
    if form == "compiled":
        model.compile_blocks(cuda_graphs=True)
    objective = TrainingObjective(model, "hard")
    scaler = gradient_scaler(precision, torch.device(device))

    def losses() -> Losses:
        with autocast(precision, torch.device(device)):
            if plain:
                return plain_losses(model, batch.frames, batch.text, DRAW_SEED)
            return objective(batch.frames, batch.text, batch.positions, DRAW_SEED)

    def run() -> None:
        scaler.scale(total_loss(losses())).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return Step(model, losses, run)


def make_whole(form: Form, size: Size, device: str) -> Work:
    """Return a function that builds the model and takes one step, to measure its memory."""
    return lambda: make_step(form, size, device).run()


@torch.no_grad()
def largest_difference(ours: Step, baseline: Step) -> float:
    """Return the largest relative difference of a loss between two forms, without dropout."""
    found = []
    for step in (ours, baseline):
        step.model.eval()
        found.append({name: float(loss) for name, loss in step.losses().items()})
        step.model.train()
    assert found[0].keys() == found[1].keys()
    return max(abs(found[0][name] - wanted) / abs(wanted) for name, wanted in found[1].items())


def count_flops(step: Step) -> dict[str, float]:
    """Count the operations of the matrix products of a step of ours: in all, and of its parts."""
    with flop_counter() as counter:
        step.run()
    counts = counter.get_flop_counts()
    found = {
        name: float(sum(counts[f"TrainingObjective.model.{module}"].values()))
        for name, module in PARTS.items()
    }
    total = float(counter.get_total_flops())
    return {"all": total, **found, "Q-Former and heads": total - sum(found.values())}


def peak_flops(precision: Precision, device: str) -> float:
    """Measure the operations per second of products of large square matrices."""
    edge = PEAK_EDGE[device]
    matrix = torch.randn(edge, edge, dtype=dtype_of(precision), device=device)

    def multiply() -> None:
        for _ in range(PEAK_PRODUCTS):
            torch.mm(matrix, matrix)

    seconds = median_seconds({"large products": multiply}, device, PEAK_REPEATS)
    return 2 * edge**3 * PEAK_PRODUCTS / seconds["large products"]


def measure(device: str, repeats: int) -> Findings:
    """Measure the rate and memory of a step, its share of the peak rate, and the difference."""
    size = SIZES[device]
    forms: tuple[Form, ...] = ("ours", "baseline")
    steps = {form: make_step(form, size, device) for form in forms}
    difference = largest_difference(steps["ours"], steps["baseline"])
    flops = count_flops(steps["ours"])
    if device == "cuda":
        steps["compiled"] = make_step("compiled", size, device)
    seconds = median_seconds({form: step.run for form, step in steps.items()}, device, repeats)
    fastest: Form = "compiled" if "compiled" in steps else "ours"
    steps.clear()
    gc.collect()  # models whose memory the next ones need
    measured: tuple[Form, ...] = (fastest, "baseline")
    peak = {form: peak_bytes(make_whole, (form, size, device), device) for form in measured}
    clips = {form: taken.rate(size.clips) for form, taken in seconds.items()}
    limit = peak_flops(size.ours, device)
    flops_of_clip = flops["all"] / size.clips
    rows = [
        higher("train_step", "clips/s", clips[fastest], clips["baseline"]),
        smaller("train_step/memory", "bytes", peak[fastest], peak["baseline"]),
        smaller("train_step/difference", "relative", difference),
        _mfu("train_step/mfu", clips[fastest], flops_of_clip, limit),
    ]
    if fastest == "compiled":
        rows.append(higher("train_step/uncompiled", "clips/s", clips["ours"], clips["baseline"]))
    if size.more_clips is not None:
        larger = replace(size, clips=size.more_clips)
        step = make_step(fastest, larger, device)
        taken = median_seconds({f"{larger.clips} clips": step.run}, device, repeats)
        (rate,) = (one.rate(larger.clips) for one in taken.values())
        name = f"train_step/mfu, {larger.clips} clips"
        rows.append(_mfu(name, rate, flops_of_clip, limit))
    return Findings(rows, (_describe(size, flops),))


def _mfu(name: str, clips_per_s: Measured, flops_of_clip: float, limit: float) -> Row:
    """Return the row of the operations per second beside those of large matrix products."""
    reached = Measured([rate * flops_of_clip / 1e12 for rate in clips_per_s.values])
    return higher(name, "TFLOP/s", reached, limit / 1e12)


def _describe(size: Size, flops: dict[str, float]) -> str:
    parts = ", ".join(
        f"{name} {100 * count / flops['all']:.0f} %"
        for name, count in flops.items()
        if name != "all"
    )
    return (
        f"train_step: {size.clips} clips of {flops['all'] / size.clips / 1e12:.3g} TFLOP each "
        f"({parts}); ours in {size.ours}, the baseline in {size.baseline}"
    )
