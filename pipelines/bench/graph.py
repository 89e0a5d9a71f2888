"""Graph attention at full size, against the dense formulation over all pairs of patches.

Both compute the similarity graph, scores, softmax and weighted sum from patch tokens, queries, keys
and values, forward and backward, in float32.

Legend: B videos, T frames, P patches per frame, D width, A heads, d = D / A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from pipelines.bench.harness import Findings, Work, median_seconds, peak_bytes, smaller
from pipelines.bench.products import bound_rows, products_of
from stgt.network.graph_attention import banded_attention, edges, patch_similarity

GOAL = 8.0
"""How many times faster than the dense formulation it should be, as far as its products allow."""


@dataclass(frozen=True)
class Size:
    """Sizes of the input."""

    batch: int = 2
    frames: int = 8
    patches: int = 256
    width: int = 1408
    heads: int = 16
    threshold: float = 0.5


PUBLISHED = Size()


def _inputs(size: Size, device: str) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return partly similar patches [B, T, P, D], and query, key and value [B, A, T*P, d]."""
    generator = torch.Generator().manual_seed(0)
    shape = (size.batch, size.frames, size.patches, size.width)
    common = torch.randn(size.batch, 1, 1, size.width, generator=generator)
    patches = (common + torch.randn(shape, generator=generator)).to(device)
    heads = (size.batch, size.heads, size.frames * size.patches, size.width // size.heads)
    projected = tuple(
        torch.randn(heads, generator=generator).to(device).requires_grad_() for _ in range(3)
    )
    return patches, projected


def banded(
    size: Size, patches: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Compute our banded formulation. Returns [B, A, T*P, d]."""
    similarity = patch_similarity(patches)
    return banded_attention(query, key, value, similarity, edges(similarity, size.threshold))


def dense(
    size: Size, patches: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Compute the formula over all pairs of the T*P patches. Returns [B, A, T*P, d]."""
    nodes = patches.flatten(1, 2)
    unit = F.normalize(nodes, dim=-1)
    similarity = unit @ unit.transpose(1, 2)
    frame = torch.arange(size.frames, device=patches.device).repeat_interleave(size.patches)
    near = (frame[:, None] - frame[None, :]).abs() <= 1
    edge = near & (similarity >= size.threshold)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    scores = (scores * similarity[:, None]).masked_fill(~edge[:, None], -math.inf)
    return scores.softmax(dim=-1) @ value


FORMS = {"ours": banded, "baseline": dense}


def make_work(form: str, size: Size, device: str) -> Work:
    """Create inputs and return a function that runs a forward and backward pass over them."""
    patches, projected = _inputs(size, device)
    function = FORMS[form]

    def work() -> None:
        output = function(size, patches, *projected)
        torch.autograd.grad(output.sum(), projected)

    return work


def largest_difference(size: Size, device: str) -> float:
    """Return the largest absolute difference in outputs and gradients between the two forms."""
    patches, projected = _inputs(size, device)
    results = []
    for function in FORMS.values():
        output = function(size, patches, *projected)
        weight = torch.linspace(-1, 1, output.numel(), device=device).view_as(output)
        results.append([output.detach(), *torch.autograd.grad((output * weight).sum(), projected)])
    return max(float((ours - theirs).abs().max()) for ours, theirs in zip(*results, strict=True))


def measure(device: str, repeats: int, size: Size = PUBLISHED) -> Findings:
    """Measure time, beside that of its matrix products, peak memory and the difference."""
    works = {form: make_work(form, size, device) for form in FORMS}
    works["products"] = products_of(works["ours"])
    seconds = median_seconds(works, device, repeats)
    del works
    peak = {form: peak_bytes(partial(make_work, form), (size, device), device) for form in FORMS}
    difference = largest_difference(size, device)
    found = bound_rows("graph", seconds, GOAL)
    found.rows.extend(
        [
            smaller("graph/memory", "bytes", peak["ours"], peak["baseline"]),
            smaller("graph/difference", "max abs", difference),
        ]
    )
    return found
