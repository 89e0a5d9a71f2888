"""The objective is the same for several workers as for one worker with the whole batch."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from stgt import STGT, stgt_tiny
from stgt.config import Gather, LabelSmoothing, LossWeights, ModelConfig, Negatives, Targets
from stgt.errors import SettingError
from stgt.inputs.tokenizer import TextTokens
from stgt.training.objective import Losses, TrainingObjective, total_loss

PAIRS, WORDS = 8, 64
CLIPS = torch.tensor([9, 1, 2, 3, 9, 5, 6, 7])
"""Keys of the clips: the first half has the same clip as the second, which another worker holds."""
FACTORS = {"contrastive": 0.5, "matching": 8.0, "caption": 2.0}
Outcome = tuple[dict[str, float], dict[str, torch.Tensor]]


def batch() -> tuple[torch.Tensor, TextTokens, torch.Tensor]:
    """Return eight pairs with captions of different lengths, and their shuffled plan positions."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(PAIRS, 6, 3, 64, 64, generator=generator)
    lengths = torch.tensor([[3], [16], [5], [9], [4], [7], [12], [6]])
    mask = (torch.arange(16) < lengths).long()
    ids = torch.randint(1, WORDS - 1, mask.shape, generator=generator) * mask
    return frames, TextTokens(ids, mask), torch.tensor([5, 0, 7, 2, 1, 6, 3, 4]) + 100


def tiny(dropout: float = 0.0, frozen: bool = False) -> ModelConfig:
    config = stgt_tiny(vocab_size=WORDS, bos_id=WORDS - 1)
    return replace(
        config,
        vision=replace(config.vision, frozen=frozen),
        graph=replace(config.graph, attention_dropout=dropout),
        qformer=replace(config.qformer, dropout=dropout),
    )


def floats(losses: Losses) -> dict[str, float]:
    return {name: float(loss.detach()) for name, loss in losses.items()}


def outcome(
    rows: slice,
    targets: Targets,
    gather: Gather,
    wrap: bool,
    dropout: float = 0.0,
    lost: int | None = None,
) -> Outcome:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = STGT(tiny(dropout))
    objective = TrainingObjective(model, targets, gather).train()
    torch.manual_seed(1)
    parallel = DistributedDataParallel(objective, broadcast_buffers=False) if wrap else objective
    frames, text, positions = batch()
    valid = None if lost is None else torch.arange(PAIRS)[rows] != lost
    losses = parallel(
        frames[rows],
        text.select(torch.arange(PAIRS)[rows]),
        positions[rows],
        draw_seed=3,
        valid=valid,
        clip_keys=CLIPS[rows],
    )
    total_loss(losses).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return floats(losses), gradients


def worker(rank: int, world: int, folder: str, targets: Targets, gather: Gather) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        share = PAIRS // world
        rows = slice(rank * share, (rank + 1) * share)
        losses, gradients = outcome(rows, targets, gather, wrap=True)
        values = torch.tensor(list(losses.values()), dtype=torch.float64)
        dist.all_reduce(values)
        if rank == 0:
            averaged = dict(zip(losses, (values / world).tolist(), strict=True))
            torch.save((averaged, gradients), f"{folder}/outcome.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def imported_once() -> None:
    """Workers are forked from a process that has imported the model, which takes seconds."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["stgt.training.objective"])


def in_workers(function: Callable[..., None], *args: object, world: int = 2) -> None:
    mp.start_processes(function, args=(world, *args), nprocs=world, start_method="forkserver")


def several(folder: Path, targets: Targets, gather: Gather = "exact") -> Outcome:
    in_workers(worker, str(folder), targets, gather)
    return torch.load(folder / "outcome.pt")


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["hard", "self_similarity"])
def test_two_workers_give_the_loss_and_gradients_of_one(tmp_path: Path, targets: Targets) -> None:
    alone_losses, alone = outcome(slice(None), targets, "exact", wrap=False)
    losses, gradients = several(tmp_path, targets)
    for name, value in alone_losses.items():
        assert losses[name] == pytest.approx(value, rel=1e-5), name
    assert gradients.keys() == alone.keys()
    scale = max(float(gradient.norm()) for gradient in alone.values())
    for name, gradient in alone.items():
        difference = float((gradients[name] - gradient).norm())
        assert difference <= 1e-4 * float(gradient.norm()) + 1e-6 * scale, name


@pytest.mark.slow
def test_the_published_gather_has_the_same_loss_and_other_gradients(tmp_path: Path) -> None:
    alone_losses, alone = outcome(slice(None), "hard", "published", wrap=False)
    losses, gradients = several(tmp_path, "hard", "published")
    for name, value in alone_losses.items():
        assert losses[name] == pytest.approx(value, rel=1e-5), name
    difference = float((gradients["text_proj.weight"] - alone["text_proj.weight"]).norm())
    assert difference > 0.05 * float(alone["text_proj.weight"].norm())


def test_an_unknown_gather_is_refused() -> None:
    with pytest.raises(ValueError, match="gather = 'half'"):
        TrainingObjective(STGT(stgt_tiny()), "hard", "half")  # type: ignore[arg-type]


def in_passes(
    rows: slice,
    targets: Targets,
    micro_batch: int,
    gather: Gather = "exact",
    frozen: bool = False,
    lost: int | None = None,
    scale: float = 1.0,
) -> Outcome:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = STGT(tiny(frozen=frozen))
    objective = TrainingObjective(model, targets, gather).train()
    frames, text, positions = batch()
    losses = objective.accumulate(
        frames[rows],
        text.select(torch.arange(PAIRS)[rows]),
        positions[rows],
        draw_seed=3,
        valid=None if lost is None else torch.arange(PAIRS)[rows] != lost,
        clip_keys=CLIPS[rows],
        micro_batch=micro_batch,
        seed=0,
        scale=scale,
    )
    gradients = {
        n: p.grad.clone() / scale for n, p in model.named_parameters() if p.grad is not None
    }
    return floats(losses), gradients


def assert_alike(ours: Outcome, theirs: Outcome) -> None:
    for name, value in theirs[0].items():
        assert ours[0][name] == pytest.approx(value, rel=1e-5), name
    assert ours[1].keys() == theirs[1].keys()
    scale = max(float(gradient.norm()) for gradient in theirs[1].values())
    for name, gradient in theirs[1].items():
        difference = float((ours[1][name] - gradient).norm())
        assert difference <= 1e-4 * float(gradient.norm()) + 1e-6 * scale, name


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["hard", "self_similarity"])
@pytest.mark.parametrize(("micro_batch", "scale"), [(3, 1.0), (4, 128.0), (8, 1.0)])
def test_passes_over_few_clips_give_the_gradients_of_one_pass(
    targets: Targets, micro_batch: int, scale: float
) -> None:
    whole = outcome(slice(None), targets, "exact", wrap=False)
    assert_alike(in_passes(slice(None), targets, micro_batch, scale=scale), whole)


@pytest.mark.slow
def test_passes_of_a_frozen_encoder_train_the_rest() -> None:
    _, gradients = in_passes(slice(None), "hard", 4, frozen=True)
    assert not any(name.startswith("frame_encoder") for name in gradients)
    _, whole = in_passes(slice(None), "hard", 8, frozen=True)
    for name, gradient in whole.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-3, atol=1e-6), name


def accumulating_worker(rank: int, world: int, folder: str, gather: Gather) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        share = PAIRS // world
        rows = slice(rank * share, (rank + 1) * share)
        losses, gradients = in_passes(rows, "hard", 2, gather, lost=5)
        for tensor in gradients.values():
            dist.all_reduce(tensor)
            tensor /= world
        values = torch.tensor(list(losses.values()), dtype=torch.float64)
        dist.all_reduce(values)
        if rank == 0:
            averaged = dict(zip(losses, (values / world).tolist(), strict=True))
            torch.save((averaged, gradients), f"{folder}/outcome.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_passes_on_two_workers_with_a_clip_that_was_not_read(tmp_path: Path) -> None:
    whole = outcome(slice(None), "hard", "exact", wrap=False, lost=5)
    in_workers(accumulating_worker, str(tmp_path), "exact")
    assert_alike(torch.load(tmp_path / "outcome.pt"), whole)


@pytest.mark.slow
def test_passes_repeat_their_dropout() -> None:
    """If the second pass dropped other activations, its gradient would be of a different loss."""
    config = tiny(dropout=0.3)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = STGT(config).double().train()
    objective = TrainingObjective(model, "hard")
    frames, text, positions = batch()

    def losses() -> float:
        model.zero_grad()
        done = objective.accumulate(
            frames.double(), text, positions, draw_seed=3, micro_batch=3, seed=7
        )
        return float(done["itc"])

    weight = model.text_proj.weight
    losses()
    assert weight.grad is not None
    gradient = weight.grad.clone()
    # Only the contrastive loss reads this matrix.
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
    step = 1e-3
    weight.data += step * direction
    up = losses()
    weight.data -= 2 * step * direction
    down = losses()
    slope = float((gradient * direction).sum())
    assert slope == pytest.approx((up - down) / (2 * step), rel=1e-2)


def test_a_clip_that_was_not_read_has_no_part_in_the_losses() -> None:
    losses, gradients = outcome(slice(None), "hard", "exact", wrap=False, lost=2)
    frames, text, positions = batch()
    kept = torch.arange(PAIRS) != 2
    torch.manual_seed(0)
    objective = TrainingObjective(STGT(tiny()), "hard").train()
    alone = objective(
        frames[kept],
        text.select(torch.arange(PAIRS)[kept]),
        positions[kept],
        draw_seed=3,
        clip_keys=CLIPS[kept],
    )
    total_loss(alone).backward()
    wanted = {n: p.grad for n, p in objective.model.named_parameters() if p.grad is not None}
    assert_alike((losses, gradients), (floats(alone), wanted))


def objective_of(
    negatives: Negatives, clip_keys: torch.Tensor, text: TextTokens | None = None
) -> tuple[dict[str, float], TrainingObjective]:
    """Return the losses of the batch with some clips and texts, and the objective."""
    torch.manual_seed(0)
    objective = TrainingObjective(STGT(tiny()), "hard", negatives=negatives).eval()
    frames, own_text, positions = batch()
    with torch.no_grad():
        losses = objective(frames, text or own_text, positions, draw_seed=3, clip_keys=clip_keys)
    return floats(losses), objective


def test_distinct_clips_and_texts_have_the_published_losses() -> None:
    published, _ = objective_of("published", torch.arange(PAIRS))
    distinct, objective = objective_of("distinct", torch.arange(PAIRS))
    assert distinct == pytest.approx(published, rel=1e-6)
    assert objective.without_negative == 0


def test_the_same_clip_is_not_a_negative() -> None:
    published, _ = objective_of("published", CLIPS)
    distinct, _ = objective_of("distinct", CLIPS)
    assert distinct["itc"] != pytest.approx(published["itc"], rel=1e-4)
    assert distinct["lm"] == pytest.approx(published["lm"])


def test_texts_that_are_equal_after_truncation_are_not_negatives() -> None:
    """Only the first pair has another text, so it is the negative of all others."""
    _, text, _ = batch()
    rows = torch.tensor([0] + [6] * (PAIRS - 1))
    repeated = text.select(rows)
    published, _ = objective_of("published", torch.arange(PAIRS), repeated)
    distinct, objective = objective_of("distinct", torch.arange(PAIRS), repeated)
    assert distinct["itm"] != pytest.approx(published["itm"], rel=1e-4)
    assert objective.without_negative == 0


def test_pairs_without_a_negative_have_no_weight_in_matching_and_are_counted() -> None:
    losses, objective = objective_of("distinct", torch.zeros(PAIRS, dtype=torch.int64))
    assert losses["itm"] == 0.0
    assert objective.without_negative == PAIRS
    # With two different clips each pair has a negative again.
    half = (torch.arange(PAIRS) >= PAIRS - 1).long()
    losses, objective = objective_of("distinct", half)
    assert losses["itm"] > 0
    assert objective.without_negative == 0


def test_an_unknown_kind_of_negatives_is_refused() -> None:
    with pytest.raises(ValueError, match="negatives = 'all'"):
        TrainingObjective(STGT(stgt_tiny()), "hard", negatives="all")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_loss_weights_scale_gradients_and_not_losses(micro_batch: int | None) -> None:
    torch.set_num_threads(1)
    frames, text, positions = batch()

    def outcome_of(weights: LossWeights) -> Outcome:
        torch.manual_seed(0)
        model = STGT(tiny())
        objective = TrainingObjective(model, "hard", loss_weights=weights).train()
        if micro_batch is None:
            losses = objective(frames, text, positions, draw_seed=3)
            total_loss(losses, weights).backward()
        else:
            losses = objective.accumulate(
                frames, text, positions, draw_seed=3, micro_batch=micro_batch, seed=0
            )
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return floats(losses), gradients

    none = dict.fromkeys(FACTORS, 0.0)
    losses, found = outcome_of(LossWeights(**FACTORS))
    parts = {}
    for name in none:
        alone, parts[name] = outcome_of(LossWeights(**{**none, name: 1.0}))
        assert alone == pytest.approx(losses, rel=1e-5)
    for name, gradient in found.items():
        wanted = sum(
            factor * parts[loss][name] for loss, factor in FACTORS.items() if name in parts[loss]
        )
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "weights", [{"matching": -1.0}, {"caption": math.inf}, {"contrastive": math.nan}]
)
def test_loss_weights_that_cannot_work_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(SettingError, match="loss_weights"):
        LossWeights(**weights)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize(
    ("changed", "smoothing"),
    [
        ("itc", LabelSmoothing(contrastive=0.3)),
        ("itm", LabelSmoothing(matching=0.3)),
        ("lm", LabelSmoothing(caption=0.3)),
    ],
)
def test_label_smoothing_changes_the_loss_that_it_is_set_for(
    changed: str, smoothing: LabelSmoothing, micro_batch: int | None
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = STGT(tiny())
    frames, text, positions = batch()

    def losses(label_smoothing: LabelSmoothing | None) -> dict[str, float]:
        objective = TrainingObjective(model, "hard", label_smoothing=label_smoothing).train()
        if micro_batch is None:
            return floats(objective(frames, text, positions, draw_seed=3))
        done = objective.accumulate(
            frames, text, positions, draw_seed=3, micro_batch=micro_batch, seed=0
        )
        return floats(done)

    published, other = losses(None), losses(smoothing)
    assert losses(LabelSmoothing()) == published  # bit by bit
    for name, value in published.items():
        assert (other[name] != value) == (name == changed), name
