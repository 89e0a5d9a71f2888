"""The objective over several workers gives what one worker with the whole batch gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from stgt import STGT, stgt_tiny
from stgt.config import Gather, Targets
from stgt.objective import TrainingObjective
from stgt.text import TextTokens

PAIRS, WORDS = 8, 64
Outcome = tuple[dict[str, float], dict[str, torch.Tensor]]


def batch() -> tuple[torch.Tensor, TextTokens, torch.Tensor]:
    """Eight pairs with captions of unequal lengths, and their positions in the plan, shuffled."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(PAIRS, 6, 3, 64, 64, generator=generator)
    lengths = torch.tensor([[3], [16], [5], [9], [4], [7], [12], [6]])
    mask = (torch.arange(16) < lengths).long()
    ids = torch.randint(1, WORDS - 1, mask.shape, generator=generator) * mask
    return frames, TextTokens(ids, mask), torch.tensor([5, 0, 7, 2, 1, 6, 3, 4]) + 100


def outcome(rows: slice, targets: Targets, gather: Gather, wrap: bool) -> Outcome:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = STGT(stgt_tiny(vocab_size=WORDS, bos_id=WORDS - 1))
    objective = TrainingObjective(model, targets, gather).train()
    parallel = DistributedDataParallel(objective, broadcast_buffers=False) if wrap else objective
    frames, text, positions = batch()
    losses = parallel(
        frames[rows], text.select(torch.arange(PAIRS)[rows]), positions[rows], draw_seed=3
    )
    losses.total.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return losses.to_floats(), gradients


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


def several(folder: Path, world: int, targets: Targets, gather: Gather = "exact") -> Outcome:
    mp.spawn(worker, args=(world, str(folder), targets, gather), nprocs=world)
    return torch.load(folder / "outcome.pt")


@pytest.mark.parametrize("targets", ["hard", "self_similarity"])
def test_two_workers_give_the_loss_and_gradients_of_one(tmp_path: Path, targets: Targets) -> None:
    alone_losses, alone = outcome(slice(None), targets, "exact", wrap=False)
    losses, gradients = several(tmp_path, 2, targets)
    for name, value in alone_losses.items():
        assert losses[name] == pytest.approx(value, rel=1e-5), name
    assert gradients.keys() == alone.keys()
    scale = max(float(gradient.norm()) for gradient in alone.values())
    for name, gradient in alone.items():
        difference = float((gradients[name] - gradient).norm())
        assert difference <= 1e-4 * float(gradient.norm()) + 1e-6 * scale, name


def test_the_published_gather_has_the_same_loss_and_other_gradients(tmp_path: Path) -> None:
    alone_losses, alone = outcome(slice(None), "hard", "published", wrap=False)
    losses, gradients = several(tmp_path, 2, "hard", "published")
    for name, value in alone_losses.items():
        assert losses[name] == pytest.approx(value, rel=1e-5), name
    difference = float((gradients["text_proj.weight"] - alone["text_proj.weight"]).norm())
    assert difference > 0.05 * float(alone["text_proj.weight"].norm())


def test_an_unknown_gather_is_refused() -> None:
    with pytest.raises(ValueError, match="gather = 'half'"):
        TrainingObjective(STGT(stgt_tiny()), "hard", "half")  # type: ignore[arg-type]
