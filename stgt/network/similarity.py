"""Cosine similarity between videos and texts."""

from __future__ import annotations

import torch


def _full_precision(tensor: torch.Tensor) -> torch.autocast:
    """Disable autocast: losses and similarities are float32 at any precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def video_text_similarity(video_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """Return the cosine of the best query token: [V, Q, E] and [N, E] float -> [V, N] float32."""
    with _full_precision(video_embeds):
        products = torch.einsum("vqe,ne->vqn", video_embeds.float(), text_embeds.float())
    return products.amax(dim=1)
