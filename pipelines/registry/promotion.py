"""Decides whether a challenger may replace the champion, by a paired bootstrap.

Both must have been evaluated on the same captions and videos under the same protocol. The
challenger is promoted if it is shown not to be worse by more than a margin: if the unfavorable end
of the 95 % interval of the difference is within the margin.
"""

from __future__ import annotations

import re
from typing import TypedDict

from pipelines.compare.evaluations import (
    PARTIAL,
    EvaluationResult,
    paired_differences,
    protocol_differences,
    same_searches,
)
from stgt.errors import STGTError
from stgt.retrieval.metrics import is_better

FRAMES = "frames"
OF_THE_MODEL = frozenset({"text tokens", "precision", "dual softmax"})
"""Parts of a protocol that say how a model reads its inputs, or that concern other metrics."""
FIRST_SECONDS = re.compile(r"the first \S+ s\b")


class NotPromotedError(STGTError):
    """A challenger is worse than the champion, or cannot be compared with it."""


class Decision(TypedDict):
    """The comparison that a promotion rests on. Positive gains are improvements."""

    metric: str
    champion: float
    challenger: float
    gain: float
    low: float
    """Lower end of the 95 % interval of the gain, from a paired bootstrap over videos."""
    high: float


def decide(
    champion: EvaluationResult,
    challenger: EvaluationResult,
    metric: str,
    margin: float,
    resamples: int,
) -> Decision:
    """Compare a challenger with the champion.

    Args:
        champion: An evaluation of the champion.
        challenger: An evaluation of the challenger.
        metric: Name of the metric that decides.
        margin: How much worse the challenger may be, in units of the metric.
        resamples: Number of bootstrap resamples.

    Raises:
        NotPromotedError: The challenger is worse, or the evaluations cannot be compared.
    """
    _require_comparable(champion, challenger)
    before, after = champion.metric(metric), challenger.metric(metric)
    if before is None or after is None:
        lacking = champion if before is None else challenger
        raise NotPromotedError(
            f"the evaluation {lacking.name} has no metric {metric}; set --metric to one of "
            f"{', '.join(sorted(_decisive(champion, challenger))) or 'none'}"
        )
    found = {
        one["metric"].removeprefix(PARTIAL): one
        for one in paired_differences(champion, challenger, resamples)
    }
    if metric not in found:
        raise NotPromotedError(
            f"{metric} has no paired intervals; set --metric to one of {', '.join(sorted(found))}"
        )
    difference = found[metric]
    sign = 1 if is_better(metric, 1.0) else -1
    low, high = sorted((sign * difference["low"], sign * difference["high"]))
    decision = Decision(
        metric=metric,
        champion=before,
        challenger=after,
        gain=sign * difference["difference"],
        low=low,
        high=high,
    )
    if low < -margin:
        shown = "is worse" if high < 0 else "is not shown to be at least as good"
        raise NotPromotedError(
            f"the challenger {shown}: {metric} {after:.1f} instead of {before:.1f}, a gain of "
            f"{decision['gain']:+.1f} with a 95 % interval of [{low:+.1f}, {high:+.1f}], whose "
            f"lower end is below {-margin:+.1f}; evaluate on more videos, or allow a loss with "
            "--margin"
        )
    return decision


def _require_comparable(champion: EvaluationResult, challenger: EvaluationResult) -> None:
    titles = [one.result["title"] for one in (champion, challenger)]
    if champion.result["benchmark"] != challenger.result["benchmark"]:
        raise NotPromotedError(
            f"the champion was evaluated on {titles[0]} and the challenger on {titles[1]}; "
            "evaluate both on the same benchmark"
        )
    if not same_searches(champion, challenger):
        raise NotPromotedError(
            f"the champion ({champion.name}) and the challenger ({challenger.name}) were evaluated "
            "on other captions or videos; evaluate both on the same gallery"
        )
    differing = {
        topic: what
        for topic, what in protocol_differences(champion, challenger).items()
        if topic not in OF_THE_MODEL
    }
    if FRAMES in differing and _spans(champion) == _spans(challenger):
        del differing[FRAMES]
    if differing:
        raise NotPromotedError(
            "the champion and the challenger were evaluated by different protocols: "
            + "; ".join(f"{topic}: {what}" for topic, what in differing.items())
            + "; evaluate both by the same protocol"
        )


def _spans(one: EvaluationResult) -> list[str]:
    """Return the part of the protocol on frames that is about the clips and not the model."""
    return FIRST_SECONDS.findall(one.result["protocol"].get(FRAMES, ""))


def _decisive(champion: EvaluationResult, challenger: EvaluationResult) -> set[str]:
    """Return the names of metrics that both evaluations have."""
    names = [
        {name.removeprefix(PARTIAL) for name in one.result["metrics"]}
        for one in (champion, challenger)
    ]
    return names[0] & names[1]
