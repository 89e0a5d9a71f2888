"""The matrix products of a computation, recorded and repeated alone.

Their time bounds how fast the computation can be: what a faster form of it could at most do is to
spend no time on anything else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from pipelines.bench.harness import Findings, Measured, Work, faster, higher

aten = torch.ops.aten
PRODUCTS = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.baddbmm_.default,
        aten.mm.out,
        aten.bmm.out,
        aten.baddbmm.out,
    }
)
FUSED_ATTENTION = frozenset(
    {
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    }
)
"""Forward passes of fused attention, which contain two products each."""
BOUND_SHARE = 0.9
"""Share of the bound that is enough where a goal beyond it was set."""


def flop_counter() -> FlopCounterMode:
    """Return a counter of the operations of matrix products, also those of fused attention.

    torch's own counter knows the fused attention of GPUs, and leaves out that of CPUs.
    """

    def forward(query: Any, key: Any, value: Any, *others: Any, **outputs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *others: Any, **outputs: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )


@dataclass(frozen=True)
class Operand:
    """A tensor without its contents."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Operand:
        """Return what describes a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def make(self) -> torch.Tensor:
        """Return a tensor of this form, of small random numbers."""
        reach = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        numbers = torch.randn(reach, dtype=self.dtype, device=self.device) / 10
        return numbers.as_strided(self.shape, self.stride)


@dataclass
class ProductRecorder(TorchDispatchMode):
    """Counts the products that are computed while it is entered, by their operands."""

    counts: Counter[tuple[Any, tuple[Operand, ...]]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Count the call if it is a product, and make it."""
        if func in PRODUCTS:
            self._count(func, args)
        elif func in FUSED_ATTENTION:
            query, key, value = args[:3]
            scores = query @ key.transpose(-1, -2)
            self._count(aten.matmul.default, (query, key.transpose(-1, -2)))
            self._count(aten.matmul.default, (scores, value))
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: tuple[Any, ...]) -> None:
        operands = tuple(Operand.of(one) for one in args if isinstance(one, torch.Tensor))
        self.counts[func, operands] += 1


def products_of(work: Work) -> Work:
    """Run a function once, and return one that repeats only its matrix products.

    Each product has operands of its own with the recorded shapes and strides, which are the same
    for all products of the same form. The matrices of fused attention are formed.
    """
    with ProductRecorder() as recorder:
        work()
    calls: list[tuple[Callable[..., torch.Tensor], list[torch.Tensor], int]] = []
    for (func, operands), count in recorder.counts.items():
        plain = {
            aten.mm.out: aten.mm.default,
            aten.bmm.out: aten.bmm.default,
            aten.baddbmm.out: aten.baddbmm.default,
        }.get(func, func)
        assert plain is not None
        calls.append((plain, [one.make() for one in operands], count))

    @torch.no_grad()
    def products() -> None:
        for func, tensors, count in calls:
            for _ in range(count):
                func(*tensors)

    return products


def bound_rows(name: str, seconds: Mapping[str, Measured], goal: float) -> Findings:
    """Return the rows of a comparison whose products were timed in the same runs.

    Args:
        name: Name of the benchmark.
        seconds: Times of `ours`, `baseline`, and `products`, which are those of ours.
        goal: Wanted ratio of the times. Less is enough if it is 90 % of what is possible.
    """
    ours, baseline, products = (seconds[key] for key in ("ours", "baseline", "products"))
    reached, bound = _times_faster(ours, baseline), _times_faster(products, baseline)
    rows = [
        faster(name, ours, baseline),
        higher(f"{name}/bound", "times faster", reached, bound),
        higher(f"{name}/goal", "times faster", reached, min(goal, BOUND_SHARE * bound)),
    ]
    note = (
        f"{name}: its matrix products alone take {products / ours:.0%} of its time, so with these "
        f"products it can be at most {bound:.2f} times faster than the baseline; it is "
        f"{reached:.2f} times faster"
    )
    return Findings(rows, (note,))


def _times_faster(ours: Measured, baseline: Measured) -> Measured:
    """Return the ratio of the times of each repeat."""
    return Measured([b / a for a, b in zip(ours.values, baseline.values, strict=True)])
