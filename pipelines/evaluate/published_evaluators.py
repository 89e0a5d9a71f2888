"""The evaluators that ALPRO's authors published, and the figures that belong to each.

There are two: one in the repository of ALPRO and one in LAVIS. They score pairs by different rules,
keep different numbers of candidates and truncate captions differently, so each figure stands beside
the results of its own evaluator only.

Sources: the evaluation code and the configs of salesforce/ALPRO and salesforce/LAVIS, the README of
salesforce/ALPRO, and docs/benchmark.rst of salesforce/LAVIS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipelines.artifacts.benchmark_names import PUBLISHED_CANDIDATES
from stgt.retrieval.scoring_rules import RULES, ScoringName


@dataclass(frozen=True)
class PublishedEvaluator:
    """A published evaluator, apart from its scoring rule."""

    rule: ScoringName
    code: str
    """Where it was published."""
    text_tokens: Mapping[str, int]
    """Maximum tokens per caption."""
    figures: Mapping[str, str]
    """Published figures that it computed."""
    candidates: int | None = None
    """Number of candidates that it matches; None if it matches all pairs."""
    cleans_captions: bool = True
    """Whether captions are cleaned before they are tokenized."""
    differences: tuple[str, ...] = field(default=())
    """How it differs from what is computed here."""


EVALUATORS: dict[str, PublishedEvaluator] = {
    one.rule: one
    for one in (
        PublishedEvaluator(
            "alpro_repository",
            code="the evaluator of salesforce/ALPRO",
            text_tokens={"msrvtt": 40, "didemo": 50},
            figures={
                "msrvtt": "text to video R@1 33.9, R@5 60.7, R@10 73.2, median rank 3; zero-shot "
                "R@1 24.1, R@5 44.7, R@10 55.4 on the test split (17.9 is on the validation split)",
                "didemo": "text to video R@1 35.9, R@5 67.5, R@10 78.8, median rank 3; zero-shot "
                "R@1 23.8, R@5 47.3, R@10 57.9",
            },
            cleans_captions=False,
            differences=("it orders equal scores arbitrarily, where ties are pessimistic here",),
        ),
        PublishedEvaluator(
            "alpro_lavis",
            code="the evaluator of salesforce/LAVIS",
            text_tokens={"msrvtt": 35, "didemo": 50},
            figures={
                "msrvtt": "text to video R@1 33.8, R@5 61.4, R@10 72.7; video to text R@1 33.2, "
                "R@5 60.5, R@10 71.7",
                "didemo": "text to video R@1 36.6, R@5 67.5, R@10 77.9; video to text R@1 38.8, "
                "R@5 66.4, R@10 76.8",
            },
            candidates=1000,
            differences=(
                "its current version reads frames in BGR and includes the last frame; frames here "
                "are read as in the fork that STGT was published with",
            ),
        ),
    )
}
"""By the name of the scoring rule."""

assert EVALUATORS.keys() < RULES.keys()


def candidates_for(rule: str, k_rerank: int) -> int:
    """Return the number of candidates to match: the evaluator's, unless another one was asked for.

    A number that differs from the default of evaluations was asked for.
    """
    evaluator = EVALUATORS.get(rule)
    if evaluator is None or evaluator.candidates is None or k_rerank != PUBLISHED_CANDIDATES:
        return k_rerank
    return evaluator.candidates


def text_tokens_for(rule: str, benchmark: str) -> int | None:
    """Return the tokens per caption of a published evaluator on a benchmark; None if unknown."""
    evaluator = EVALUATORS.get(rule)
    return None if evaluator is None else evaluator.text_tokens.get(benchmark)


def keeps_captions_as_written(rule: str) -> bool:
    """Return whether a published evaluator tokenizes captions without cleaning them."""
    evaluator = EVALUATORS.get(rule)
    return evaluator is not None and not evaluator.cleans_captions


def reranking_in_words(rule: str, k_rerank: int) -> str:
    """Describe how pairs are reranked, for the protocol of an evaluation."""
    if not k_rerank:
        return "none"
    found = RULES[rule]
    which = (
        "all pairs are ranked by"
        if found.all_pairs
        else f"the top {k_rerank} by cosine in both directions are reranked by"
    )
    rest = "" if found.all_pairs else "; all others are unscored"
    named = f" ({rule})" if rule in EVALUATORS else ""
    return f"{which} {found.title}{named}{rest}"


def figures_in_words(rule: str, benchmark: str) -> dict[str, str]:
    """Return the lines of a protocol about a published evaluator and its figures.

    Empty for a rule that no evaluator of ALPRO has.
    """
    evaluator = EVALUATORS.get(rule)
    if evaluator is None:
        return {}
    told = {"evaluator": f"{rule}: {evaluator.code}; {'; '.join(evaluator.differences)}"}
    if benchmark in evaluator.figures:
        told["published by this evaluator"] = f"ALPRO: {evaluator.figures[benchmark]}"
    else:
        told["published by this evaluator"] = "no figures for these videos"
    return told
