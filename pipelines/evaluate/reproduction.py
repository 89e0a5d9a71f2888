"""Checks of the requirements for reproducing the authors' own evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.artifacts import checkpoints
from pipelines.artifacts.benchmark_names import PUBLISHED_CANDIDATES, PUBLISHED_FRAMES
from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.locations import is_manifest
from pipelines.common import storage
from pipelines.evaluate.benchmarks import BENCHMARKS
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.gallery import open_gallery
from pipelines.evaluate.published_evaluators import EVALUATORS, text_tokens_for
from stgt.alpro.config import AlproConfig, alpro_base
from stgt.config import ModelConfig
from stgt.errors import STGTError
from stgt.retrieval.scoring_rules import DEFAULT_RULE

logger = logging.getLogger(__name__)

PUBLISHED_EMBED_DIMS = (256, 1024)

PUBLISHED_WORDS = 30_523
"""Vocabulary size of bert-base-uncased plus the start token."""

PUBLISHED_SIZES = {"width": 1408, "depth": 39, "image_size": 224}

OPEN = (
    "the released files lack the graph transformer's position embeddings, random values that the "
    "authors did not save; they are replaced by zeros, so results will be close to the authors' at "
    "best",
    "no table of the authors' own results could be found; compare with the paper (for results of "
    "other systems run python -m jobs.compare)",
)
"""What remains open for STGT, whatever requirements are met."""


@dataclass(frozen=True)
class Requirement:
    """A requirement for reproducing the evaluation."""

    what: str
    met: bool
    mend: str
    """What to do if it is not met."""


def requirements(config: EvaluateConfig) -> list[Requirement]:
    """Return all requirements for reproducing the authors' evaluation, and which ones are met.

    Args:
        config: Config with resolved paths.
    """
    there = storage.exists(storage.join(config.checkpoint_uri, checkpoints.COMPLETE))
    if there and checkpoints.model_config(config.checkpoint_uri).kind == AlproConfig.kind:
        return list(_of_alpro(config))
    found = [
        Requirement(
            "a complete checkpoint",
            there,
            "import the authors' file: python -m jobs.import_weights --checkpoint stgt.pth "
            "--vision eva_vit_g.pth --vocab bert-base-uncased --output MODEL",
        )
    ]
    if there:
        found += _of_the_checkpoint(config.checkpoint_uri)
    benchmark = BENCHMARKS[config.benchmark]
    found.append(
        Requirement(
            "one of the four benchmarks under its published protocol",
            config.benchmark in ("msrvtt", "didemo", "lsmdc", "msvd"),
            "choose msrvtt, didemo, lsmdc or msvd",
        )
    )
    found.append(_of_the_split(config))
    found += _of_the_frames(config)
    found.append(
        Requirement(
            f"reranking of {PUBLISHED_CANDIDATES} candidates; {PUBLISHED_FRAMES} frames, squashed "
            "to squares",
            config.k_rerank == PUBLISHED_CANDIDATES
            and config.scoring == DEFAULT_RULE.name
            and config.num_frames in (None, PUBLISHED_FRAMES)
            and config.resize == "squash",
            "leave --k-rerank, --scoring, --num-frames and --resize at their defaults, and choose "
            "an --output in which no evaluation began with another number of candidates",
        )
    )
    found.append(
        Requirement(
            f"captions of at most {benchmark.max_text_tokens} tokens",
            config.max_text_tokens in (None, benchmark.max_text_tokens),
            "omit --max-text-tokens",
        )
    )
    return found


def _of_alpro(config: EvaluateConfig) -> Iterator[Requirement]:
    """Yield the requirements for reproducing one of ALPRO's two published evaluations."""
    uri, again = config.checkpoint_uri, "import the authors' file again"
    model = checkpoints.model_config(uri)
    assert isinstance(model, AlproConfig)
    yield _of_a_release(uri, again)
    published = alpro_base()
    yield Requirement(
        "the published sizes (TimeSformer-base and BERT-base, fused after six layers)",
        (model.vision, model.text, model.embed_dim)
        == (published.vision, published.text, published.embed_dim),
        "pass the folder of an imported release",
    )
    yield _of_the_vocabulary(uri, published.vocab_size, again)
    yield Requirement(
        "one of ALPRO's two published evaluators",
        config.scoring in EVALUATORS,
        f"choose --scoring {' or '.join(EVALUATORS)}",
    )
    evaluator = EVALUATORS.get(config.scoring)
    yield Requirement(
        "one of ALPRO's two benchmarks",
        config.benchmark in ("msrvtt", "didemo"),
        "choose msrvtt or didemo",
    )
    yield _of_the_split(config)
    yield from _of_the_frames(config)
    if evaluator is not None:
        tokens = text_tokens_for(config.scoring, config.benchmark)
        yield Requirement(
            f"the evaluator's candidates; {PUBLISHED_FRAMES} frames, squashed to squares; captions "
            f"of at most {tokens} tokens",
            evaluator.candidates in (None, config.k_rerank)
            and (config.num_frames or model.num_frames) == PUBLISHED_FRAMES
            and config.resize == "squash"
            and config.max_text_tokens in (None, tokens),
            "leave --k-rerank, --num-frames, --resize and --max-text-tokens at their defaults",
        )


def _of_a_release(uri: str, again: str) -> Requirement:
    report = storage.join(uri, "import_report.json")
    origin = storage.read_json(report)["checkpoint"] if storage.exists(report) else "none"
    return Requirement("weights from a released file", origin != "none", again)


def _of_the_vocabulary(uri: str, entries: int, again: str) -> Requirement:
    vocab = storage.join(uri, checkpoints.VOCAB)
    words = len(storage.read_bytes(vocab).splitlines()) if storage.exists(vocab) else 0
    return Requirement(
        f"the vocabulary bert-base-uncased ({entries:,} entries)",
        words == entries,
        f"{again} with --vocab bert-base-uncased",
    )


def _of_the_checkpoint(uri: str) -> Iterator[Requirement]:
    again = "import the authors' file again"
    yield _of_a_release(uri, again)
    config = checkpoints.model_config(uri)
    if not isinstance(config, ModelConfig):
        yield Requirement(
            "a model whose authors' evaluation is known, STGT or ALPRO",
            False,
            f"{uri} holds {config.title}; leave out --against",
        )
        return
    yield Requirement(
        "the frozen EVA ViT-g",
        checkpoints.frame_encoder_of(uri) is not None,
        f"{again} with --vision eva_vit_g.pth",
    )
    sizes = all(getattr(config.vision, name) == value for name, value in PUBLISHED_SIZES.items())
    yield Requirement(
        "the published sizes (39 blocks of width 1408 at 224 pixels, embed_dim 256 or 1024)",
        sizes and config.embed_dim in PUBLISHED_EMBED_DIMS,
        "pass the folder of an imported release",
    )
    yield _of_the_vocabulary(uri, PUBLISHED_WORDS - 1, again)


def _of_the_split(config: EvaluateConfig) -> Requirement:
    benchmark = BENCHMARKS[config.benchmark]
    what = f"the split: {benchmark.split}"
    try:
        gallery = open_gallery(config, benchmark)
    except (STGTError, ValueError) as error:
        return Requirement(what, False, str(error))
    missing = len(gallery.missing)
    return Requirement(what, missing == 0, f"{missing} videos are missing")


def _of_the_frames(config: EvaluateConfig) -> Iterator[Requirement]:
    if is_manifest(config.data_uri):
        yield Requirement(
            "frames decoded by decord", False, "ingest into a store with --decoder decord"
        )
        return
    if not storage.exists(storage.join(config.data_uri, "catalogue.json")):
        yield Requirement("a clip store", False, f"{config.data_uri} is not one; ingest the split")
        return
    sampling = ClipStore(config.data_uri).sampling
    yield Requirement(
        "frames decoded by decord, as used for the published results",
        sampling.decoder in ("decord", "auto"),
        "ingest with --decoder decord, or with auto if decord is not exact for some videos",
    )
    even = sampling.num_frames % PUBLISHED_FRAMES == 0 and sampling.frame_choice == "uniform"
    yield Requirement(
        "a store of uniformly sampled frames, a multiple of 8 per clip, squashed to 224 pixels",
        even and sampling.size == PUBLISHED_SIZES["image_size"] and sampling.resize == "squash",
        "ingest with the default --sampling",
    )


def check(config: EvaluateConfig) -> None:
    """Log the requirements for reproducing the authors' evaluation and check that all are met.

    Raises:
        STGTError: A requirement is not met.
    """
    found = requirements(config)
    for one in found:
        logger.info("[%s] %s%s", "ok" if one.met else "missing", one.what, _mend(one))
    evaluator = EVALUATORS.get(config.scoring)
    for line in OPEN if evaluator is None else evaluator.differences:
        logger.info("[open] %s", line)
    lacking = [one for one in found if not one.met]
    if lacking:
        raise STGTError(
            f"{len(lacking)} of {len(found)} requirements for reproducing the authors' evaluation "
            f"are not met: {'; '.join(one.what for one in lacking)}"
        )


def _mend(one: Requirement) -> str:
    return "" if one.met else f" -> {one.mend}"
