"""The frame encoder: a timm vision transformer; one CLS and G*G patch tokens a frame.

Legend: N frames, G patches along an edge, L = 1 + G*G tokens per frame, D width.
"""

from __future__ import annotations

import timm
import torch
from torch import nn

from stgt.config import VisionConfig


class FrameEncoder(nn.Module):
    """Tokens of single frames, from the blocks of a timm ViT without its pooling and head.

    Frozen by default: then it holds no gradients, stays in eval mode and is left out of
    checkpoints.

    Raises:
        ValueError: the named architecture does not yield [CLS + G*G] tokens.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        sizes = {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.heads,
            "mlp_ratio": config.mlp_ratio,
        }
        if config.name.startswith("eva"):
            # The published model takes the tokens of the last block as they are, without a norm.
            sizes["use_post_transformer_norm"] = False
        self.vit = timm.create_model(
            config.name, pretrained=False, num_classes=0, global_pool="", **sizes
        )
        prefix_tokens = getattr(self.vit, "num_prefix_tokens", 0)
        if prefix_tokens != 1:
            raise ValueError(
                f"vision.name = {config.name!r}: has {prefix_tokens} prefix tokens, "
                "the graph transformer needs exactly one (CLS)"
            )
        self.frozen = config.frozen
        if self.frozen:
            self.requires_grad_(False)
            self.eval()
        else:
            self._spread_weights(config.init_std)

    def _spread_weights(self, std: float) -> None:
        """Initial weights for training from scratch."""
        for module in self.vit.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)

    def train(self, mode: bool = True) -> FrameEncoder:
        """Set training mode; a frozen encoder stays in eval mode."""
        return super().train(mode and not self.frozen)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Encode frames one by one.

        Args:
            frames: [N, 3, H, W] float, normalized.

        Returns:
            [N, L, D] float, CLS first, then patches row by row.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            tokens: torch.Tensor = self.vit.forward_features(frames)  # type: ignore[operator]
            return tokens
