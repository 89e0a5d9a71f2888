"""The training objective: the model's losses over a global batch split across workers.

Contrastive targets and hard negatives span the global batch. Embeddings, visual tokens and texts of
all workers are gathered with gradients and sorted by the samples' positions in the plan, so that
the losses, their gradients and the negatives do not depend on how the batch is split.

Pairs that share the clip or the text (after truncation) are not negatives of each other: they share
hard contrastive targets, and none is drawn as a hard negative of another. Other spans of a video
stay negatives. A pair without any negative has no weight in matching.

The published code, built on LAVIS like BLIP-2, differs in two points. It gathers the embeddings of
the contrastive loss without gradients, and each worker computes only its own rows. The loss is the
same, but a pair gets no gradient from the rows of other workers in which it is a column.
`gather="published"` reproduces this. It also counts every other pair of a batch as a negative;
`negatives="published"` reproduces that.

Legend: B pairs of this worker, N pairs of the global batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_fn
from torch import nn

from stgt.config import Gather, LabelSmoothing, LossWeights, Negatives, Targets
from stgt.errors import TooFewPairsError
from stgt.inputs.tokenizer import TextTokens
from stgt.interface.model import FrameTokens, VideoTextModel
from stgt.network.similarity import video_text_similarity
from stgt.training.losses import (
    Pairs,
    caption_loss,
    choose_hard_negatives,
    contrastive_loss,
    count_targets,
    matching_losses,
    same_pairs,
)
from stgt.training.randomness import seed_generators

MIN_PAIRS = 2
_SMALLEST_SHARE = 1e-9
"""Divisor of a sum over no pairs, which is zero."""

Losses: TypeAlias = dict[str, torch.Tensor]
"""Scalar losses of a global batch by name, such as `itc`. Their mean over workers equals the loss
of a single worker on the whole batch."""


def total_loss(losses: Losses, weights: LossWeights | None = None) -> torch.Tensor:
    """Return the weighted sum of all losses, which training minimizes.

    Args:
        losses: The losses by name.
        weights: Factor of each loss. None takes the published factors, which are 1.
    """
    weights = LossWeights() if weights is None else weights
    first, *others = (_weighted(loss, weights.of(name)) for name, loss in losses.items())
    return functools.reduce(torch.add, others, first)


def _weighted(loss: torch.Tensor, factor: float) -> torch.Tensor:
    return loss if factor == 1 else loss * factor


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _gather(local: torch.Tensor) -> torch.Tensor:
    """Concatenate the tensors of all workers along the first dimension, differentiably."""
    if _world_size() == 1:
        return local
    if local.is_floating_point() and local.requires_grad:
        return torch.cat(dist_fn.all_gather(local.contiguous()))
    parts = [torch.empty_like(local) for _ in range(_world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


@dataclass(frozen=True)
class _Places:
    """Positions of pairs in the global batch, which excludes pairs without frames."""

    order: torch.Tensor
    """[N] int64, rows of the gathered batch, sorted by their positions in the plan."""
    own: torch.Tensor
    """[B] int64, indices of this worker's rows in that order; arbitrary for excluded pairs."""
    weights: torch.Tensor
    """[B] float, 1 for included pairs and 0 for excluded ones."""
    same: torch.Tensor | None = None
    """[N, N] bool, pairs that share the clip or the text; None if each only with itself."""
    match_weights: torch.Tensor | None = None
    """[B] float, `weights` with 0 for pairs that have no negative; None if all have one."""
    matched: float = 0.0
    """Mean number of pairs per worker with a weight in matching."""

    @property
    def matching(self) -> torch.Tensor:
        """[B] float, the weights of pairs in matching."""
        return self.weights if self.match_weights is None else self.match_weights


class TrainingObjective(nn.Module):
    """The losses of a batch, as a module for DistributedDataParallel to wrap.

    They are itc (contrastive), of a model that matches pairs itm (matching), and of a model that
    writes captions lm (captioning).
    """

    def __init__(
        self,
        model: VideoTextModel,
        targets: Targets,
        gather: Gather = "exact",
        negatives: Negatives = "distinct",
        label_smoothing: LabelSmoothing | None = None,
        loss_weights: LossWeights | None = None,
    ) -> None:
        """Create the objective.

        Args:
            model: The model.
            targets: Contrastive targets.
            gather: How the contrastive loss gathers embeddings from other workers.
            negatives: Whether pairs that share the clip or the text count as negatives of each
                other: "distinct" (no), or "published" (yes).
            label_smoothing: Label smoothing of each loss. None takes the published values.
            loss_weights: Factor of each loss in the gradients that `accumulate` adds up. The losses
                themselves are returned without them; see `total_loss`. None takes 1.

        Raises:
            ValueError: `gather` or `negatives` is unknown.
        """
        super().__init__()
        if gather not in ("exact", "published"):
            raise ValueError(f"gather = {gather!r}: must be 'exact' or 'published'")
        if negatives not in ("distinct", "published"):
            raise ValueError(f"negatives = {negatives!r}: must be 'distinct' or 'published'")
        self.model = model
        self.targets: Targets = targets
        self.gather: Gather = gather
        self.negatives: Negatives = negatives
        self.label_smoothing = LabelSmoothing() if label_smoothing is None else label_smoothing
        self.loss_weights = LossWeights() if loss_weights is None else loss_weights
        self.without_negative = 0
        """Number of pairs of the last global batch that had no negative for matching."""

    def forward(
        self,
        frames: torch.Tensor | FrameTokens,
        text: TextTokens,
        positions: torch.Tensor,
        draw_seed: int,
        valid: torch.Tensor | None = None,
        clip_keys: torch.Tensor | None = None,
    ) -> Losses:
        """Compute the losses of the global batch, of which this worker holds a part.

        Args:
            frames: [B, T, 3, H, W] float, normalized, or the tokens of frames encoded before.
            text: Ids and mask [B, S], the caption of each clip.
            positions: [B] int64, position of each sample in the plan, unique across workers.
            draw_seed: Seed for drawing negatives, the same on all workers.
            valid: [B] bool, False for a clip that could not be read, which is excluded from all
                losses. None if all could be read.
            clip_keys: [B] int64, equal for equal clips. None if all clips are distinct.
        """
        model = self.model
        # First, because the process waits until a GPU has counted the pairs. After the model, it
        # would wait for the whole forward pass.
        all_text = _gather_text(text)
        places = self._find_places(positions, valid, clip_keys, all_text)
        uniform = _uniform_numbers(places, draw_seed)
        tokens = model.video_tokens(frames)
        embedded = model.embed(tokens, text)
        local = Pairs(embedded.videos.float(), embedded.texts.float())
        itc, logits = self._contrastive(local, places)
        losses = {"itc": itc}
        if model.matches:
            negatives = _draw_negatives(logits, places, uniform)
            all_tokens = _gather(tokens)
            negative_tokens, negative_text = all_tokens[negatives[0]], all_text.select(negatives[1])
            losses["itm"] = self._matching(
                tokens, text, negative_tokens, negative_text, places.matching
            ) / max(places.matched, _SMALLEST_SHARE)
        if embedded.caption_logits is not None:
            lm_sum = self._caption_sum(embedded.caption_logits, text, places.weights)
            losses["lm"] = lm_sum / _tokens_a_worker(text, places)
        return losses

    def accumulate(
        self,
        frames: torch.Tensor | FrameTokens,
        text: TextTokens,
        positions: torch.Tensor,
        draw_seed: int,
        valid: torch.Tensor | None = None,
        clip_keys: torch.Tensor | None = None,
        *,
        micro_batch: int,
        seed: int,
        scale: float = 1.0,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> Losses:
        """Accumulate the gradients of the weighted sum of `forward`'s losses in several passes.

        A first pass computes the embeddings and visual tokens of all clips without gradients. The
        losses give the gradients of these, and a second pass backpropagates them to the weights, so
        negatives still span the global batch. This is the gradient cache of Gao et al. 2021
        (https://arxiv.org/abs/2101.06983), extended to visual tokens because matching reads those
        of other clips. The gradients are those of this worker; their mean over workers is the
        gradient of the global batch.

        Args:
            frames: [B, T, 3, H, W] float, normalized, or the tokens of frames encoded before.
            text: Ids and mask [B, S], the caption of each clip.
            positions: [B] int64, position of each sample in the plan, unique across workers.
            draw_seed: Seed for drawing negatives, the same on all workers.
            valid: [B] bool, False for a clip that could not be read; None if all could be read.
            clip_keys: [B] int64, equal for equal clips. None if all clips are distinct.
            micro_batch: Maximum number of clips per pass.
            seed: Seed for dropout, so that both passes drop the same activations.
            scale: Factor applied to the gradients, for fp16 loss scaling.
            context: Autocast context for the forward passes.

        Returns:
            The detached losses. Gradients are added to those of the parameters.

        Raises:
            ValueError: The model replays passes from CUDA graphs, which overwrite gradients.
        """
        if self.model.replays_passes:
            raise ValueError(
                "this model replays passes from CUDA graphs, so gradients cannot be accumulated; "
                "call compile_blocks(cuda_graphs=False)"
            )
        passes = [
            slice(first, first + micro_batch) for first in range(0, len(positions), micro_batch)
        ]
        rows = torch.arange(len(positions), device=positions.device)
        encoder_is_fixed = self.model.frames_are_fixed
        fixed: dict[int, torch.Tensor] = {}

        def tokens_of(number: int) -> torch.Tensor:
            frame_tokens = fixed.get(number)
            if frame_tokens is None:
                frame_tokens = self.model.frame_tokens(frames[passes[number]])
                if encoder_is_fixed:
                    fixed[number] = frame_tokens
            seed_generators(_pass_seed(seed, number, 0), positions.device)
            return self.model.relate_frames(frame_tokens)

        def embed(
            number: int, tokens: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
            seed_generators(_pass_seed(seed, number, 1), positions.device)
            found = self.model.embed(tokens, text.select(rows[passes[number]]))
            return found.videos.float(), found.texts.float(), found.caption_logits

        all_text = _gather_text(text)
        places = self._find_places(positions, valid, clip_keys, all_text)
        uniform = _uniform_numbers(places, draw_seed)
        with torch.no_grad(), context():
            kept = []
            for number in range(len(passes)):
                tokens = tokens_of(number)
                kept.append((tokens, *embed(number, tokens)[:2]))
        own_tokens, *embeds = (torch.cat(parts) for parts in zip(*kept, strict=True))
        del kept
        video_embeds, text_embeds = (one.requires_grad_() for one in embeds)
        itc, logits = self._contrastive(Pairs(video_embeds, text_embeds), places)
        (_weighted(itc, self.loss_weights.contrastive) * scale).backward()
        assert video_embeds.grad is not None
        assert text_embeds.grad is not None

        matches = self.model.matches
        negatives = _draw_negatives(logits, places, uniform) if matches else None
        share = max(places.matched, _SMALLEST_SHARE)
        tokens_a_worker = _tokens_a_worker(text, places)
        pool = _gather(own_tokens).requires_grad_()
        begin = _rank() * len(positions)
        sums: Losses = {}

        def add(name: str, loss: torch.Tensor) -> torch.Tensor:
            sums[name] = sums.get(name, torch.zeros_like(loss)) + loss.detach()
            return loss

        for number, part in enumerate(passes):
            with context():
                here = rows[part]
                tokens, some_text = pool[begin + here], text.select(here)
                videos, texts, caption_logits = embed(number, tokens)
                # Carries the gradient of the contrastive loss to the weights.
                carried = (videos * video_embeds.grad[part]).sum()
                carried = carried + (texts * text_embeds.grad[part]).sum()
                loss = torch.zeros((), device=positions.device)
                if negatives is not None:
                    itm = self._matching(
                        tokens,
                        some_text,
                        pool[negatives[0][part]],
                        all_text.select(negatives[1][part]),
                        places.matching[part],
                    )
                    loss = loss + _weighted(add("itm", itm), self.loss_weights.matching) / share
                if caption_logits is not None:
                    lm = self._caption_sum(caption_logits, some_text, places.weights[part])
                    lm = _weighted(add("lm", lm), self.loss_weights.caption)
                    loss = loss + lm / tokens_a_worker
            (carried + loss * scale).backward()
        assert pool.grad is not None
        if _world_size() > 1:
            dist.all_reduce(pool.grad)  # other workers also used these tokens as negatives
        for number, part in enumerate(passes):
            with context():
                tokens = tokens_of(number)
            torch.autograd.backward(tokens, pool.grad[begin + rows[part]].to(tokens.dtype))
        per_worker = {"itm": share, "lm": tokens_a_worker}
        return {
            "itc": itc.detach(),
            **{name: total / per_worker[name] for name, total in sums.items()},
        }

    def _contrastive(self, local: Pairs, places: _Places) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the contrastive loss, and similarity / temperature [N, N] of the global batch."""
        temperature, order = self.model.temperature, places.order
        everything = Pairs(_gather(local.video_embeds)[order], _gather(local.text_embeds)[order])
        with torch.no_grad():
            logits = (
                video_text_similarity(everything.video_embeds, everything.text_embeds) / temperature
            )
        every = torch.arange(len(everything), device=order.device)
        smoothing = self.label_smoothing.contrastive
        if self.gather == "exact" or _world_size() == 1:
            loss = contrastive_loss(
                everything, everything, every, temperature, self.targets, places.same, smoothing
            )
            return loss, logits
        constants = Pairs(everything.video_embeds.detach(), everything.text_embeds.detach())
        mine = places.weights > 0
        if not mine.any():  # all pairs of this worker are excluded
            nothing = local.video_embeds.sum() + local.text_embeds.sum() + temperature
            return nothing * 0, logits
        rows = Pairs(local.video_embeds[mine], local.text_embeds[mine])
        same = None if places.same is None else places.same[places.own[mine]]
        loss = contrastive_loss(
            rows, constants, places.own[mine], temperature, self.targets, same, smoothing
        )
        return loss * len(rows) / _share(places), logits

    def _matching(
        self,
        tokens: torch.Tensor,
        text: TextTokens,
        negative_tokens: torch.Tensor,
        negative_text: TextTokens,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Sum over B pairs the mean loss of the true pair, the negative video and negative text."""
        match_logits = model_match(self.model, tokens, text, negative_tokens, negative_text)
        labels = torch.zeros(match_logits.shape[0], dtype=torch.int64, device=weights.device)
        labels[: len(text)] = 1
        losses = matching_losses(match_logits, labels, self.label_smoothing.matching)
        return (losses * weights.repeat(3)).sum() / 3

    def _caption_sum(
        self, logits: torch.Tensor, text: TextTokens, weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum the losses of the target tokens of included pairs."""
        mask = text.attention_mask * weights[:, None].long()
        return caption_loss(logits, text.input_ids, mask, self.label_smoothing.caption)[0]

    def _find_places(
        self,
        positions: torch.Tensor,
        valid: torch.Tensor | None,
        clip_keys: torch.Tensor | None,
        all_text: TextTokens,
    ) -> _Places:
        """Find the pairs of the global batch, and which of them share the clip or the text."""
        places = _find_places(positions, valid)
        if len(places.order) < MIN_PAIRS:
            raise TooFewPairsError(
                f"the global batch has {len(places.order)} pairs, but matching needs at least "
                f"{MIN_PAIRS}, to draw negatives from"
            )
        if self.negatives == "published":
            return replace(places, matched=_share(places))
        keys = positions if clip_keys is None else clip_keys
        same = same_pairs(_gather(keys)[places.order], all_text.select(places.order).input_ids)
        alone = same.all(dim=1)
        self.without_negative = int(alone.sum())
        matched = (len(places.order) - self.without_negative) / _world_size()
        weights = places.weights
        if self.without_negative:
            weights = weights * (~alone[places.own]).to(weights.dtype)
        return replace(places, same=same, match_weights=weights, matched=matched)


def _find_places(positions: torch.Tensor, valid: torch.Tensor | None) -> _Places:
    counts = torch.ones_like(positions) if valid is None else valid.to(positions.dtype)
    everywhere = _gather(torch.stack([positions, counts], dim=1))
    order = torch.argsort(everywhere[:, 0])
    if _world_size() > 1 or valid is not None:
        order = order[everywhere[order, 1] > 0]
    own = torch.searchsorted(everywhere[order, 0], positions)
    return _Places(order, own.clamp(max=max(0, len(order) - 1)), counts.float())


def _uniform_numbers(places: _Places, draw_seed: int) -> torch.Tensor:
    """Return the random numbers [2, N] that choose a negative video and text for each pair."""
    generator = torch.Generator().manual_seed(draw_seed)
    return torch.rand(2, len(places.order), generator=generator).to(places.order.device)


def _draw_negatives(
    logits: torch.Tensor, places: _Places, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the gathered rows [B] of a hard negative video and text for each pair of this worker."""
    video_for_text = choose_hard_negatives(logits.T, uniform[0], places.same)
    text_for_video = choose_hard_negatives(logits, uniform[1], places.same)
    return places.order[video_for_text[places.own]], places.order[text_for_video[places.own]]


def _share(places: _Places) -> float:
    """Return the mean number of included pairs per worker."""
    return len(places.order) / _world_size()


def _tokens_a_worker(text: TextTokens, places: _Places) -> torch.Tensor:
    """Return the mean number of target tokens per worker."""
    count = count_targets(text.attention_mask * places.weights[:, None].long())
    if _world_size() > 1:
        dist.all_reduce(count)
    return count / _world_size()


def _gather_text(text: TextTokens) -> TextTokens:
    return TextTokens(_gather(text.input_ids), _gather(text.attention_mask))


def _pass_seed(seed: int, number: int, part: int) -> int:
    return seed + 2 * number + part


def model_match(
    model: VideoTextModel,
    tokens: torch.Tensor,
    text: TextTokens,
    negative_tokens: torch.Tensor,
    negative_text: TextTokens,
) -> torch.Tensor:
    """Return match logits [3B, 2] of true pairs, negative videos and negative texts in one pass."""
    pair_text = TextTokens(
        torch.cat([text.input_ids, text.input_ids, negative_text.input_ids]),
        torch.cat([text.attention_mask, text.attention_mask, negative_text.attention_mask]),
    )
    return model.match(torch.cat([tokens, negative_tokens, tokens]), pair_text)
