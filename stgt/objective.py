"""The one place where the model meets its losses, over one worker or many.

Contrastive targets and hard negatives span the global batch: embeddings, visual tokens and texts
of all workers are gathered with gradients and put in the order of the samples' positions in the
plan, so the loss, its gradients and the negatives drawn do not depend on how the batch was split.

The published code, built on LAVIS as BLIP-2 is, differs in one place: there embeddings of the
contrastive loss are gathered without gradients, and each worker takes its own rows only. The loss
is the same, but a pair then gets no gradient from being the column of another worker's row.
`gather="published"` does that.

Legend: B pairs of this worker, N pairs of the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_fn
from torch import nn

from stgt.config import Gather, Targets
from stgt.losses import (
    Pairs,
    caption_loss,
    choose_hard_negatives,
    contrastive_loss,
    matching_loss,
    video_text_similarity,
)
from stgt.model import STGT
from stgt.text import TextTokens


@dataclass(frozen=True)
class Losses:
    """Scalar losses of a global batch; averaged over workers they are those of one worker."""

    total: torch.Tensor
    itc: torch.Tensor
    itm: torch.Tensor
    lm: torch.Tensor

    def to_floats(self) -> dict[str, float]:
        """Metric names and values."""
        return {
            "loss/total": float(self.total.detach()),
            "loss/itc": float(self.itc.detach()),
            "loss/itm": float(self.itm.detach()),
            "loss/lm": float(self.lm.detach()),
        }


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(local: torch.Tensor) -> torch.Tensor:
    """Concatenate a tensor of all workers along the first dimension, differentiably."""
    if _world_size() == 1:
        return local
    if local.is_floating_point() and local.requires_grad:
        return torch.cat(dist_fn.all_gather(local.contiguous()))
    parts = [torch.empty_like(local) for _ in range(_world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


class TrainingObjective(nn.Module):
    """Total loss itc + itm + lm of a batch; what DistributedDataParallel wraps."""

    def __init__(self, model: STGT, targets: Targets, gather: Gather = "exact") -> None:
        super().__init__()
        if gather not in ("exact", "published"):
            raise ValueError(f"gather = {gather!r}: must be 'exact' or 'published'")
        self.model = model
        self.targets: Targets = targets
        self.gather: Gather = gather

    def forward(
        self,
        frames: torch.Tensor,
        text: TextTokens,
        positions: torch.Tensor,
        draw_seed: int,
    ) -> Losses:
        """Losses of the global batch of which this worker holds a part.

        Args:
            frames: [B, T, 3, H, W] float, normalized.
            text: ids and mask [B, S], the caption of each clip.
            positions: [B] int64, place of each sample in the plan, distinct over all workers.
            draw_seed: seed of the negatives' draw, the same on all workers.
        """
        model = self.model
        tokens = model.video_tokens(frames)
        query_states, caption_logits = model.caption_logits(tokens, text)
        video_embeds = model.project_video(query_states)
        text_embeds = model.encode_text(text)

        order = torch.argsort(_gather(positions))
        # Rows of the ordered global batch that this worker holds.
        own = torch.searchsorted(_gather(positions)[order], positions)
        local = Pairs(video_embeds.float(), text_embeds.float())
        everything = Pairs(_gather(local.video_embeds)[order], _gather(local.text_embeds)[order])
        itc = self._contrastive(local, everything, own)
        with torch.no_grad():
            logits = (
                video_text_similarity(everything.video_embeds, everything.text_embeds)
                / model.temperature
            )
        itm = self._matching(tokens, text, own, order, logits, draw_seed)
        lm = self._caption(caption_logits, text)
        return Losses(total=itc + itm + lm, itc=itc, itm=itm, lm=lm)

    def _contrastive(self, local: Pairs, everything: Pairs, own: torch.Tensor) -> torch.Tensor:
        temperature = self.model.temperature
        if self.gather == "exact" or _world_size() == 1:
            every = torch.arange(len(everything), device=own.device)
            return contrastive_loss(everything, everything, every, temperature, self.targets)
        constants = Pairs(everything.video_embeds.detach(), everything.text_embeds.detach())
        return contrastive_loss(local, constants, own, temperature, self.targets)

    def _matching(
        self,
        tokens: torch.Tensor,
        text: TextTokens,
        own: torch.Tensor,
        order: torch.Tensor,
        logits: torch.Tensor,
        draw_seed: int,
    ) -> torch.Tensor:
        """B true pairs, B (hard negative video, text), B (video, hard negative text)."""
        generator = torch.Generator().manual_seed(draw_seed)
        uniform = torch.rand(2, len(order), generator=generator).to(logits.device)
        video_for_text = choose_hard_negatives(logits.T, uniform[0])
        text_for_video = choose_hard_negatives(logits, uniform[1])
        all_tokens = _gather(tokens)
        all_text = TextTokens(_gather(text.input_ids), _gather(text.attention_mask))
        negative_tokens = all_tokens[order[video_for_text[own]]]
        negative_text = all_text.select(order[text_for_video[own]])
        match_logits = model_match(self.model, tokens, text, negative_tokens, negative_text)
        labels = torch.zeros(match_logits.shape[0], dtype=torch.int64, device=logits.device)
        labels[: len(text)] = 1
        return matching_loss(match_logits, labels)

    def _caption(self, logits: torch.Tensor, text: TextTokens) -> torch.Tensor:
        """Mean over the tokens of the global batch: workers hold unequal numbers of tokens."""
        total, count = caption_loss(logits, text.input_ids, text.attention_mask)
        world = _world_size()
        if world > 1:
            dist.all_reduce(count)
        return total * world / count


def model_match(
    model: STGT,
    tokens: torch.Tensor,
    text: TextTokens,
    negative_tokens: torch.Tensor,
    negative_text: TextTokens,
) -> torch.Tensor:
    """Match logits [3B, 2] of true pairs, of negative videos and of negative texts, in one pass."""
    pair_text = TextTokens(
        torch.cat([text.input_ids, text.input_ids, negative_text.input_ids]),
        torch.cat([text.attention_mask, text.attention_mask, negative_text.attention_mask]),
    )
    return model.match(torch.cat([tokens, negative_tokens, tokens]), pair_text)
