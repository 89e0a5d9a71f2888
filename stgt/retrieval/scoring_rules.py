"""Named rules by which cosine similarity and matching make the score of a text and a video.

The published evaluators of different models combine the two differently, so a figure belongs to
the rule that it was computed by.

Legend: n pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

FloatArray = npt.NDArray[np.float32]

ScoringName = Literal["cosine_and_match", "alpro_repository", "alpro_lavis"]
"""Names of the rules."""


@dataclass(frozen=True)
class ScoringRule:
    """A rule for the scores of pairs that are matched."""

    name: ScoringName
    title: str
    """The score in words, such as `cosine + match probability`."""
    value: Literal["probability", "logit"]
    """What of a pair's match logits enters the score: the probability of a match, which is their
    softmax, or the logit of a match alone."""
    adds_cosine: bool = True
    """Whether the cosine similarity is added."""
    all_pairs: bool = False
    """Whether all pairs are matched, instead of the best candidates by cosine."""
    decimals: int | None = None
    """Number of decimals that values are rounded to; None keeps all."""

    def values_of(self, logits: torch.Tensor) -> FloatArray:
        """Return what matching contributes to the scores of n pairs.

        Args:
            logits: [n, 2] float, match logits; index 1 = match.

        Returns:
            [n] float32.
        """
        logits = logits.float()
        found = logits.softmax(dim=1)[:, 1] if self.value == "probability" else logits[:, 1]
        values = found.cpu().numpy()
        if self.decimals is None:
            return values
        # In double precision, so that equal decimals are equal numbers.
        return np.round(values.astype(np.float64), self.decimals).astype(np.float32)


RULES: dict[str, ScoringRule] = {
    rule.name: rule
    for rule in (
        ScoringRule("cosine_and_match", "cosine + match probability", "probability"),
        ScoringRule(
            "alpro_repository",
            "match probability alone, rounded to 4 decimals",
            "probability",
            adds_cosine=False,
            all_pairs=True,
            decimals=4,
        ),
        ScoringRule("alpro_lavis", "cosine + logit of a match", "logit"),
    )
}

assert tuple(RULES) == get_args(ScoringName)

DEFAULT_RULE = RULES["cosine_and_match"]
