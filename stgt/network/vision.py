"""The frame encoder: a timm vision transformer with one CLS and G*G patch tokens per frame.

Legend: N frames, G patches along each edge, L = 1 + G*G tokens per frame, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import nn

from stgt.compilation import Options, compile_each, compiled_groups
from stgt.config import VisionConfig
from stgt.errors import CheckpointError, SettingError

WIDE_NORMS: Options = {"triton.multi_kernel": 1}
"""Have torch.compile try two kernels for each norm.

The one that it prefers for the 1,408 numbers of a token reads them several times. With this, the
encoder of the published size took 173 ms instead of 181 ms for 160 frames on an H100."""


class FrameEncoder(nn.Module):
    """Encodes single frames with the blocks of a timm ViT, without its pooling and head.

    The encoder is frozen by default: it has no gradients, stays in eval mode and is not part of
    training checkpoints. The last `unfreeze_last_blocks` blocks are excepted.

    Raises:
        SettingError: The named architecture does not output [CLS + G*G] tokens.
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
            # The published model uses the tokens of the last block without a final norm.
            sizes["use_post_transformer_norm"] = False
        try:
            self.vit: Any = timm.create_model(
                config.name, pretrained=False, num_classes=0, global_pool="", **sizes
            )
        except (RuntimeError, TypeError, AssertionError) as error:
            raise SettingError(
                f"vision.name = {config.name!r}: timm cannot build a vision transformer with "
                f"{sizes}: {error}"
            ) from error
        prefix_tokens = getattr(self.vit, "num_prefix_tokens", 0)
        if prefix_tokens != 1:
            raise SettingError(
                f"vision.name = {config.name!r}: has {prefix_tokens} prefix tokens, but "
                "the graph transformer requires exactly one (CLS)"
            )
        self.frozen = config.frozen
        self.fingerprint: str | None = None
        """Hash of the frozen tensors, cached when they are loaded because hashing takes seconds."""
        self._groups: list[nn.Module] = []
        """The groups of blocks, if they are compiled, in a list that hides them from torch."""
        self.missing = False
        """True if the frozen weights were not loaded, so that nothing can be encoded."""
        self._trained_blocks = list(self.vit.blocks)[config.depth - config.unfreeze_last_blocks :]
        if self.frozen:
            self.requires_grad_(False)
            for block in self._trained_blocks:
                block.requires_grad_(True)
            self.train()
        else:
            self._spread_weights(config.init_std)

    def frozen_names(self) -> set[str]:
        """Return the names of the frozen tensors."""
        if not self.frozen:
            return set()
        trained = {
            id(p)
            for block in self._trained_blocks
            for p in block.state_dict(keep_vars=True).values()
        }
        return {
            name
            for name, tensor in self.state_dict(keep_vars=True).items()
            if id(tensor) not in trained
        }

    def _spread_weights(self, std: float) -> None:
        """Initialize linear layers for training from scratch."""
        for module in self.vit.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)

    def train(self, mode: bool = True) -> FrameEncoder:
        """Set training mode; frozen modules stay in eval mode."""
        super().train(mode and not self.frozen)
        if self.frozen:
            for block in self._trained_blocks:
                block.train(mode)
        return self

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Encode frames independently of each other.

        Args:
            frames: [N, 3, H, W] float, normalized.

        Returns:
            [N, L, D] float: CLS, then patches row by row.

        Raises:
            CheckpointError: The model was loaded without the weights of its frame encoder.
        """
        if self.missing:
            raise CheckpointError(
                "this model was loaded without its frozen frame encoder; import or load it again "
                "with the encoder's weights"
            )
        trained = not self.frozen or bool(self._trained_blocks)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained), self._with_groups():
            tokens: torch.Tensor = self.vit.forward_features(frames)
            return tokens

    def compile_blocks(self) -> None:
        """Compile the blocks with torch.compile. Parameter names do not change."""
        blocks = self.vit.blocks
        # Blocks stay separate where timm gives each an embedding of its own, and where the backward
        # pass computes one after the other again, which would need the memory of a whole group.
        if getattr(self.vit, "rope_mixed", False) or getattr(self.vit, "grad_checkpointing", False):
            compile_each(blocks, WIDE_NORMS)
            return
        groups = compiled_groups(list(blocks), WIDE_NORMS)
        self._groups = [
            nn.Sequential(*groups) if isinstance(blocks, nn.Sequential) else nn.ModuleList(groups)
        ]

    @contextmanager
    def _with_groups(self) -> Iterator[None]:
        """Have timm run the compiled groups of blocks.

        They replace the blocks only for as long as that, because parameters are named after these.
        """
        blocks = self.vit.blocks
        try:
            self.vit.blocks = self._groups[0] if self._groups else blocks
            yield
        finally:
            self.vit.blocks = blocks
