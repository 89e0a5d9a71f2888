"""Blocks are compiled in groups that share what is compiled, and keep their names."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._inductor import list_options

from stgt.compilation import GROUP, compiled_groups
from stgt.config import stgt_tiny
from stgt.model import STGT
from stgt.network.graph_attention import banded_attention, edges, patch_similarity
from stgt.network.vision import WIDE_NORMS
from tests.helpers.compilation import Compilations, compile_with

pytestmark = pytest.mark.slow


def test_groups_of_equal_blocks_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compilations = Compilations()
    compile_with(monkeypatch, compilations)
    blocks = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2 * GROUP + 1)))
    names = set(blocks.state_dict())
    groups = compiled_groups(list(blocks))
    given = torch.randn(3, 4)
    states = given
    with torch.no_grad():
        for group in groups:
            states = group(states)
        torch.testing.assert_close(states, blocks(given))
    assert [len(group.blocks) for group in groups] == [GROUP, GROUP, 1]
    assert compilations.count == 2  # a full group, and the last block
    assert set(blocks.state_dict()) == names


def test_the_options_exist_in_this_version_of_torch() -> None:
    assert WIDE_NORMS.keys() <= set(list_options())


def test_a_compiled_model_has_the_same_names_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    compilations = Compilations()
    compile_with(monkeypatch, compilations)
    model = STGT(stgt_tiny()).eval()
    frames = torch.randint(0, 256, (1, 2, 64, 64, 3), dtype=torch.uint8)
    names = list(model.state_dict())
    with torch.no_grad():
        wanted = model.video_tokens(frames)
        assert compilations.count == 0
        model.compile_blocks()
        found = model.video_tokens(frames)
    torch.testing.assert_close(found, wanted)
    assert compilations.count > 0
    assert list(model.state_dict()) == names


def test_compiled_graph_attention_drops_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with(monkeypatch, "aot_eager")
    patches = torch.randn(2, 3, 4, 16)
    similarity = patch_similarity(patches)
    edge = edges(similarity, 0.0)

    def outcome(compiled: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        parts = [torch.randn(2, 2, 12, 8, requires_grad=True) for _ in range(3)]
        query, key, value = parts
        mixed = banded_attention(
            query, key, value, similarity, edge, dropout=0.2, compiled=compiled
        )
        mixed.square().sum().backward()
        return [mixed, *(part.grad for part in parts if part.grad is not None)]

    found, wanted = outcome(compiled=True), outcome(compiled=False)
    assert len(found) == len(wanted) == 4
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
