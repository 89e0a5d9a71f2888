"""Initial weights of a model whose frame encoder is trained from scratch.

Cross-attention of the Q-Former finds out where and when something happens by telling visual tokens
apart. With the usual small values, what all tokens of a clip share, such as the background,
outweighs what distinguishes them, and each query attends to all of them alike. A probe of 300 steps
on the quickstart's clips shows it: read from all visual tokens side by side, both events of a clip
are learned in 150 steps, but read through the queries, the second one is not learned at all. The
values below were found by such probes; CONTRIBUTING.md lists what was tried.

Under rules 2, a visual token shows what is there, but hardly where: the place follows from the
token with a coefficient of determination of 0.34, and of 0.18 after training, because content
outweighs the position. A movement is then invisible to the queries, which know a token by its
contents alone. Rules 3 give positions the size of contents.
"""

from __future__ import annotations

from typing import Protocol

from torch import nn

from stgt.config import ModelConfig
from stgt.network.graph import GraphTransformer
from stgt.network.qformer import QFormer
from stgt.network.vision import FrameEncoder

TIME_STD = 1.8
"""Initial standard deviation of the time embedding; 0.6 under rules 1."""
QUERY_STD = 2.5
"""Initial standard deviation of the learned queries; 0.5 under rules 1."""
POSITION_STD = {2: 0.4, 3: 1.2}
"""Initial standard deviation of the frame encoder's position embeddings, by the rules; 0.02 under
rules 1."""
PATCH_GAIN = {2: 1.0, 3: 0.4}
"""Factor of the initial patch weights, by the rules."""
CROSS_ATTENTION_GAIN = 2.0
"""Factor of the query and key weights of cross-attention; its logits grow by the square of it."""


class _Parts(Protocol):
    config: ModelConfig
    frame_encoder: FrameEncoder
    graph: GraphTransformer
    qformer: QFormer


def tell_tokens_apart(model: _Parts) -> None:
    """Set initial weights by rules 2 or 3 in place: those by which tokens and queries differ."""
    vit, rules = model.frame_encoder.vit, model.config.init_rules
    patch_std = PATCH_GAIN[rules] * model.config.vision.init_std
    nn.init.normal_(vit.patch_embed.proj.weight, std=patch_std)
    if getattr(vit, "pos_embed", None) is not None:
        nn.init.normal_(vit.pos_embed, std=POSITION_STD[rules])
    nn.init.normal_(model.graph.time_embed, std=TIME_STD)
    nn.init.normal_(model.qformer.query_tokens, std=QUERY_STD)
    for name, weight in model.qformer.bert.named_parameters():
        if name.endswith(
            ("crossattention.attention.query.weight", "crossattention.attention.key.weight")
        ):
            weight.data.mul_(CROSS_ATTENTION_GAIN)
