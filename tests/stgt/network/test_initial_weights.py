"""Initial weights of models whose frame encoder is trained from scratch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stgt.config import ModelConfig, stgt_tiny
from stgt.model import STGT

APART = (
    "frame_encoder.vit.patch_embed.proj.weight",
    "frame_encoder.vit.pos_embed",
    "graph.time_embed",
    "qformer.query_tokens",
)
GAINED = "crossattention.attention.%s.weight"


def weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return STGT(config).state_dict()


def test_rules_2_change_what_tells_tokens_apart_and_nothing_else() -> None:
    before = weights(replace(stgt_tiny(), init_rules=1))
    after = weights(stgt_tiny())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    gained = {name for name in before if name.endswith((GAINED % "query", GAINED % "key"))}
    assert gained
    assert changed == gained | set(APART)
    for name in gained:
        torch.testing.assert_close(after[name], 2 * before[name], rtol=0, atol=0)
    for name, std in zip(APART, (0.1, 0.4, 1.8, 2.5), strict=True):
        assert after[name].std().item() == pytest.approx(std, rel=0.15), name


def test_rules_3_enlarge_positions_compared_with_contents() -> None:
    before, after = weights(stgt_tiny()), weights(replace(stgt_tiny(), init_rules=3))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    patches, positions = APART[:2]
    assert changed == {patches, positions}
    torch.testing.assert_close(after[patches], 0.4 * before[patches])
    torch.testing.assert_close(after[positions], 3 * before[positions])


def places_in_tokens(rules: int) -> float:
    """How well a visual token tells its column, as a coefficient of determination."""
    torch.manual_seed(4)
    model = STGT(replace(stgt_tiny(), init_rules=rules)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        tokens = model.video_tokens(torch.randn(40, 6, 3, 64, 64))
    columns = tokens.unflatten(1, (6, 9))[:, :, 1:5].flatten(0, 2)
    places = torch.arange(4.0).repeat(40 * 6)
    inputs = torch.cat([columns, torch.ones(len(columns), 1)], dim=1)
    known = slice(0, 600)
    fitted = torch.linalg.lstsq(inputs[known], places[known, None]).solution
    rest = (places[600:] - (inputs[600:] @ fitted)[:, 0]).square().mean()
    return 1 - (rest / places[600:].var()).item()


def test_with_rules_3_a_token_shows_where_it_is() -> None:
    found = [places_in_tokens(rules) for rules in (2, 3)]
    assert found[1] > found[0] + 0.1


def test_a_frozen_encoder_and_what_is_built_on_it_keep_their_initial_weights() -> None:
    frozen = replace(stgt_tiny(), vision=replace(stgt_tiny().vision, frozen=True))
    before = weights(replace(frozen, init_rules=1))
    after = weights(frozen)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="init_rules = 4: must be 1 to 3"):
        replace(stgt_tiny(), init_rules=4)  # type: ignore[arg-type]
