"""Tests of the patch graph and the graph transformer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from stgt.config import GraphConfig, VisionConfig
from stgt.network import graph_attention
from stgt.network.graph import GraphTransformer, sine_cosine_table
from stgt.network.graph_attention import GraphAttention, banded_attention, edges, patch_similarity

FRAMES, GRID, WIDTH, HEADS = 4, 2, 16, 4
PATCHES = GRID * GRID


def transformer(threshold: float = 0.2) -> GraphTransformer:
    torch.manual_seed(0)
    config = GraphConfig(heads=HEADS, similarity_threshold=threshold, attention_dropout=0.0)
    return GraphTransformer(WIDTH, GRID, FRAMES, config).eval()


def tokens(batch: int = 3, frames: int = FRAMES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, frames, 1 + PATCHES, WIDTH, generator=generator)


def dense_graph_attention(layer: GraphAttention, patches: torch.Tensor, threshold: float):
    """Compute the formula directly over all pairs of the T*P patches."""
    batch, frames, count, width = patches.shape
    nodes = patches.flatten(1, 2)
    unit = torch.nn.functional.normalize(nodes, dim=-1)
    similarity = unit @ unit.transpose(1, 2)
    frame = torch.arange(frames).repeat_interleave(count)
    near = (frame[:, None] - frame[None, :]).abs() <= 1
    edge = near & ((similarity >= threshold) | torch.eye(frames * count, dtype=torch.bool))

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (layer.heads, width // layer.heads)).transpose(1, 2)

    query, key, value = heads(layer.W_Q(nodes)), heads(layer.W_K(nodes)), heads(layer.W_V(nodes))
    scores = query @ key.transpose(-1, -2) / math.sqrt(width // layer.heads)
    scores = (scores * similarity[:, None]).masked_fill(~edge[:, None], -math.inf)
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return layer.W_O(mixed).reshape(patches.shape)


@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.3, 1.0])
def test_windowed_attention_equals_attention_over_all_pairs(frames: int, threshold: float) -> None:
    torch.manual_seed(0)
    layer = GraphAttention(WIDTH, HEADS, dropout=0.0)
    patches = tokens(frames=frames)[:, :, 1:]
    similarity = patch_similarity(patches)
    windowed = layer(patches, similarity, edges(similarity, threshold))
    dense = dense_graph_attention(layer, patches, threshold)
    torch.testing.assert_close(windowed, dense, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_finite_differences(
    monkeypatch: pytest.MonkeyPatch, frames: int, dropout: float
) -> None:
    monkeypatch.setattr(graph_attention, "HEADS_AT_ONCE_CPU", 2)
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, frames * PATCHES, 2 if frames == 2 else 1)  # twice the time for each element
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    ]
    similarity = patch_similarity(tokens(2, frames)[:, :, 1:])
    edge = edges(similarity, 0.1)

    def attention(*projected: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)  # the same weights are dropped every time
        # Weighted, so that the incoming gradient is neither constant nor contiguous.
        mixed = banded_attention(*projected, similarity.double(), edge, dropout)
        return (mixed * torch.linspace(-1, 1, mixed.numel()).view_as(mixed)).transpose(1, 2)

    assert torch.autograd.gradcheck(attention, inputs)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_dropout_drops_its_share_and_keeps_the_mean(dropout: float) -> None:
    ones = torch.ones(1, 4, 4 * PATCHES, 8)
    similarity = torch.ones(1, 4, PATCHES, 3 * PATCHES)
    torch.manual_seed(0)
    drawn = [
        banded_attention(ones, ones, ones, similarity, edges(similarity, 0.0), dropout)
        for _ in range(400)
    ]
    spread = torch.stack(drawn)
    assert spread.mean().item() == pytest.approx(1, abs=0.01)
    assert (spread.std().item() > 0.1) == (dropout > 0)


def test_nothing_is_kept_for_a_backward_pass_that_never_comes() -> None:
    similarity = patch_similarity(tokens()[:, :, 1:])
    inputs = [torch.randn(3, HEADS, FRAMES * PATCHES, 4, requires_grad=True) for _ in range(3)]
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        banded_attention(*inputs, similarity, edges(similarity, 0.2))
        assert saved
        saved.clear()
        with torch.no_grad():
            banded_attention(*inputs, similarity, edges(similarity, 0.2))
    assert not saved


def test_a_patch_that_resembles_no_other_attends_to_itself() -> None:
    patches = torch.eye(FRAMES * PATCHES, WIDTH).reshape(1, FRAMES, PATCHES, WIDTH)
    edge = edges(patch_similarity(patches), threshold=1.0)
    assert edge.sum(dim=-1).eq(1).all()
    layer = GraphAttention(WIDTH, HEADS, dropout=0.0)
    mixed = layer(patches, patch_similarity(patches), edge)
    torch.testing.assert_close(mixed, layer.W_O(layer.W_V(patches)))


def test_no_edge_leaves_the_clip_or_spans_two_frames() -> None:
    edge = edges(torch.ones(1, FRAMES, PATCHES, 3 * PATCHES), threshold=0.0)
    seen = edge.sum(dim=-1)[0, :, 0].tolist()
    assert seen == [2 * PATCHES, 3 * PATCHES, 3 * PATCHES, 2 * PATCHES]


@torch.no_grad()
def test_permuting_videos_permutes_results() -> None:
    model, order = transformer(), torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(tokens())[order], model(tokens()[order]))


@torch.no_grad()
def test_the_order_of_frames_matters() -> None:
    model = transformer()
    assert (model(tokens()) - model(tokens().flip(1))).abs().max() > 1e-3


@torch.no_grad()
def test_visual_tokens_are_pooled_for_clips_and_kept_for_images() -> None:
    model = transformer()
    assert model(tokens()).shape == (3, FRAMES * (1 + 2 * GRID), WIDTH)
    assert model(tokens(frames=1)).shape == (3, 1 + PATCHES, WIDTH)


def test_time_embedding_is_resized_by_nearest_neighbor() -> None:
    model = transformer()
    doubled = model.time_embedding(2 * FRAMES)
    torch.testing.assert_close(doubled[::2], model.time_embed)
    torch.testing.assert_close(doubled[1::2], model.time_embed)


def test_positions_differ_and_cls_has_none() -> None:
    table = sine_cosine_table(GRID, WIDTH)
    assert table[0].eq(0).all()
    assert len({tuple(row.tolist()) for row in table[1:]}) == PATCHES


@pytest.mark.parametrize(
    ("field", "value"),
    [("similarity_threshold", 1.5), ("layers", 0), ("attention_dropout", 1.0)],
)
def test_a_config_out_of_range_names_the_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        replace(GraphConfig(), **{field: value})


def test_an_image_size_that_is_no_multiple_of_the_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size = 225"):
        VisionConfig(image_size=225)
