"""Speed of computing match scores of a gallery's candidates, against the published evaluator.

The published evaluator processes each direction separately, row by row, repeats the video's tokens
for every pair, and pads captions to a fixed length. Both run the full-size Q-Former in float32 on
the same candidates.

Legend: N videos and as many captions, M visual tokens, D vision width, K candidates.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipelines.bench.harness import Findings, median_seconds, smaller
from pipelines.bench.products import bound_rows, products_of
from stgt.config import stgt_g
from stgt.inputs.tokenizer import TextTokens
from stgt.model import STGT
from stgt.retrieval.pair_scorer import PairScorer
from stgt.retrieval.ranking import top_candidates

logger = logging.getLogger(__name__)

GOAL = 5.0
"""How many times faster than the published way it should be, as far as its products allow."""
PADDED_LENGTH = 36
LEAST_TOKENS, MOST_TOKENS = 8, 20
LATENT_WIDTH = 16
LATENT_NOISE = 0.5


@dataclass(frozen=True)
class Size:
    """Size of the gallery."""

    clips: int
    k: int
    batch_pairs: int


SIZES = {
    "cpu": Size(clips=24, k=8, batch_pairs=32),
    "cuda": Size(clips=200, k=32, batch_pairs=512),
}


@dataclass(frozen=True)
class Gallery:
    """Videos and captions, and the pairs to match."""

    model: STGT
    tokens: torch.Tensor
    """[N, M, D] float."""
    text: TextTokens
    """Token ids and mask, [N, 36] each."""
    t2v: torch.Tensor
    """[N, K] int64: candidate videos of each caption."""
    v2t: torch.Tensor
    """[N, K] int64: candidate captions of each video."""


def make_gallery(size: Size, device: str) -> Gallery:
    """Create random visual tokens and captions, with candidates like those of a trained model.

    The video and the caption of a pair share a noisy latent vector, so candidates of the two
    directions often coincide.
    """
    config = stgt_g()
    torch.manual_seed(0)
    # The frame encoder is not used, so a single block is enough.
    model = STGT(replace(config, vision=replace(config.vision, depth=1))).to(device).eval()
    frames, side = config.num_frames, config.vision.grid
    tokens = torch.randn(size.clips, frames * (1 + 2 * side), config.vision.width)
    lengths = torch.randint(LEAST_TOKENS, MOST_TOKENS + 1, (size.clips, 1))
    mask = (torch.arange(PADDED_LENGTH) < lengths).long()
    ids = torch.randint(1000, config.bos_id, mask.shape) * mask
    latent = torch.randn(size.clips, LATENT_WIDTH)
    videos, texts = (
        torch.nn.functional.normalize(latent + LATENT_NOISE * torch.randn_like(latent), dim=1)
        for _ in range(2)
    )
    similarity = (texts @ videos.T).numpy()
    t2v, v2t = top_candidates(similarity, size.k), top_candidates(similarity.T, size.k)
    return Gallery(
        model=model,
        tokens=tokens.to(device),
        text=TextTokens(ids, mask).to(torch.device(device)),
        t2v=torch.from_numpy(t2v.copy()),
        v2t=torch.from_numpy(v2t.copy()),
    )


@torch.no_grad()
def published(gallery: Gallery) -> tuple[torch.Tensor, torch.Tensor]:
    """Return match probabilities of t2v and v2t candidates [N, K], one direction at a time."""
    model, text = gallery.model, gallery.text
    t2v = [
        model.match(gallery.tokens[videos], text.select(torch.full_like(videos, row)))
        for row, videos in enumerate(gallery.t2v)
    ]
    v2t = [
        model.match(gallery.tokens[row].expand(len(texts), -1, -1), text.select(texts))
        for row, texts in enumerate(gallery.v2t)
    ]
    both = (torch.stack(logits).softmax(dim=-1)[..., 1].cpu() for logits in (t2v, v2t))
    return next(both), next(both)


def shared(gallery: Gallery, batch_pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same probabilities as `published`, scoring each pair only once."""
    count = len(gallery.t2v)
    wanted = np.zeros((count, count), dtype=bool)
    np.put_along_axis(wanted, gallery.t2v.numpy(), True, axis=1)
    np.put_along_axis(wanted.T, gallery.v2t.numpy(), True, axis=1)
    texts, videos = (torch.from_numpy(part) for part in np.nonzero(wanted))
    scorer = PairScorer(gallery.model, gallery.tokens)
    device = gallery.tokens.device
    logits = scorer(videos.to(device), texts.to(device), gallery.text, batch_pairs)
    probability = torch.full((count, count), torch.nan)
    probability[texts, videos] = logits.softmax(dim=-1)[:, 1].cpu()
    return probability.gather(1, gallery.t2v), probability.T.gather(1, gallery.v2t)


def measure(device: str, repeats: int) -> Findings:
    """Measure time, beside that of its matrix products, and the difference."""
    size = SIZES[device]
    gallery = make_gallery(size, device)
    ours, theirs = shared(gallery, size.batch_pairs), published(gallery)
    difference = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    seconds = median_seconds(
        {
            "ours": lambda: shared(gallery, size.batch_pairs),
            "baseline": lambda: published(gallery),
            "products": products_of(lambda: shared(gallery, size.batch_pairs)),
        },
        device,
        repeats,
        warm=True,
    )
    found = bound_rows("rerank", seconds, GOAL)
    found.rows.append(smaller("rerank/difference", "max abs", difference))
    return found
