"""The recorded matrix products of a computation are all of its products, and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipelines.bench import graph
from pipelines.bench.graph import Size, make_work
from pipelines.bench.harness import Measured, Work
from pipelines.bench.products import bound_rows, flop_counter, products_of


def flops(work: Work) -> int:
    with flop_counter() as counter:
        work()
    return counter.get_total_flops()


def test_the_products_of_graph_attention_are_recorded() -> None:
    work = make_work("ours", Size(batch=1, frames=3, patches=4, width=16, heads=2), "cpu")
    assert flops(products_of(work)) == flops(work) > 0


@pytest.mark.parametrize("layers", [1, 3])
def test_linear_layers_and_fused_attention_are_recorded(layers: int) -> None:
    weight, bias, x = torch.randn(8, 8), torch.randn(8), torch.randn(2, 4, 5, 8)

    def work() -> None:
        y = x
        for _ in range(layers):
            y = F.scaled_dot_product_attention(F.gelu(F.linear(y, weight, bias)), y, y) @ weight
            y = y.softmax(dim=-1)

    # A product of [40, 8] and [8, 8] twice, and one of [8, 5, 8] and [8, 8, 5] twice.
    by_hand = layers * (2 * 2 * 40 * 8 * 8 + 2 * 2 * 8 * 5 * 8 * 5)
    assert flops(products_of(work)) == flops(work) == by_hand


def test_what_is_no_product_is_not_repeated() -> None:
    x = torch.randn(4, 4)
    assert flops(products_of(lambda: x.softmax(dim=-1) + x.sum())) == 0


def test_a_goal_beyond_the_bound_is_lowered() -> None:
    """Ours takes 2 s of which 1.6 s are products, against 10 s: 5 times; at most 6.25 times."""
    seconds = {"ours": Measured(2.0), "baseline": Measured(10.0), "products": Measured(1.6)}
    found = bound_rows("graph", seconds, goal=8.0)
    rows = {row.name: row for row in found.rows}
    assert rows["graph"].ratio == pytest.approx(5)
    assert rows["graph/bound"].baseline == pytest.approx(6.25)
    assert rows["graph/goal"].baseline == pytest.approx(0.9 * 6.25)
    assert bound_rows("graph", seconds, goal=4.0).rows[-1].baseline == pytest.approx(4)
    assert "80%" in found.notes[0]


def test_operations_of_fused_attention_are_counted() -> None:
    query, key, value = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3))
    with flop_counter() as counter:
        mixed = F.scaled_dot_product_attention(query, key, value)
        product = 2 * 2 * 3 * 5 * 5 * 4
        assert counter.get_total_flops() == 2 * product
        mixed.sum().backward()
    # The backward pass computes the scores again, and four products for three gradients.
    assert counter.get_total_flops() == (2 + 5) * product


@pytest.mark.slow
def test_graph_attention_is_measured_to_the_end() -> None:
    small = Size(batch=1, frames=2, patches=4, width=16, heads=2)
    found = graph.measure("cpu", 1, small)
    assert {"graph", "graph/memory", "graph/difference"} <= {row.name for row in found.rows}
    (difference,) = (row for row in found.rows if row.name == "graph/difference")
    assert difference.ours < 1e-5
