"""What it takes to reproduce the authors' own evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.artifacts import checkpoints
from pipelines.artifacts.benchmark_names import PUBLISHED_FRAMES
from pipelines.artifacts.clip_store import ClipStore
from pipelines.common import storage
from pipelines.evaluate.benchmarks import BENCHMARKS
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.gallery import open_gallery
from pipelines.feed.sources import is_manifest
from stgt.errors import STGTError

logger = logging.getLogger(__name__)

PUBLISHED_EMBED_DIMS = (256, 1024)

PUBLISHED_WORDS = 30_523
"""bert-base-uncased with the start token."""

PUBLISHED_SIZES = {"width": 1408, "depth": 39, "image_size": 224}

PUBLISHED_K = 128


@dataclass(frozen=True)
class Requirement:
    """Something that a reproduction needs."""

    what: str
    met: bool
    mend: str
    """How to meet it."""


def requirements(config: EvaluateConfig) -> list[Requirement]:
    """What it takes to reproduce the authors' evaluation, and whether it is there.

    Args:
        config: with resolved paths.
    """
    there = storage.exists(storage.join(config.checkpoint, checkpoints.COMPLETE))
    found = [
        Requirement(
            "a whole checkpoint",
            there,
            "import the authors' file: python -m jobs.import_weights --checkpoint stgt.pth "
            "--vision eva_vit_g.pth --vocab bert-base-uncased --output MODEL",
        )
    ]
    if there:
        found += _of_the_checkpoint(config.checkpoint)
    benchmark = BENCHMARKS[config.benchmark]
    found.append(
        Requirement(
            "one of the four benchmarks by its published protocol",
            config.benchmark in ("msrvtt", "didemo", "lsmdc", "msvd"),
            "name msrvtt, didemo, lsmdc or msvd",
        )
    )
    found.append(_of_the_split(config))
    found += _of_the_frames(config)
    found.append(
        Requirement(
            f"reranking of {PUBLISHED_K} candidates, 8 frames, squashed",
            config.k_rerank == PUBLISHED_K
            and config.num_frames in (None, PUBLISHED_FRAMES)
            and config.resize == "squash",
            "leave --k-rerank, --num-frames and --resize at their defaults",
        )
    )
    found.append(
        Requirement(
            f"captions of {benchmark.max_text_tokens} tokens",
            config.max_text_tokens in (None, benchmark.max_text_tokens),
            "leave out --max-text-tokens",
        )
    )
    return found


def _of_the_checkpoint(uri: str) -> Iterator[Requirement]:
    again = "import the authors' file again"
    report = storage.join(uri, "import_report.json")
    origin = storage.read_json(report)["checkpoint"] if storage.exists(report) else "none"
    yield Requirement("weights from a released file", origin != "none", again)
    yield Requirement(
        "the frozen EVA ViT-g",
        checkpoints.frame_encoder_of(uri) is not None,
        f"{again} with --vision eva_vit_g.pth",
    )
    model = storage.read_json(storage.join(uri, "config.json"))["model"]
    sizes = all(model["vision"][name] == value for name, value in PUBLISHED_SIZES.items())
    yield Requirement(
        "the published sizes (39 blocks of width 1408 at 224 pixels, embed_dim 256 or 1024)",
        sizes and model["embed_dim"] in PUBLISHED_EMBED_DIMS,
        "name the folder of an imported release",
    )
    vocab = storage.join(uri, checkpoints.VOCAB)
    words = len(storage.read_bytes(vocab).splitlines()) + 1 if storage.exists(vocab) else 0
    yield Requirement(
        f"the vocabulary bert-base-uncased ({PUBLISHED_WORDS - 1:,} entries)",
        words == PUBLISHED_WORDS,
        f"{again} with --vocab bert-base-uncased",
    )


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
    if is_manifest(config.data):
        yield Requirement(
            "frames as decord decodes them", False, "ingest with --decoder decord into a store"
        )
        return
    if not storage.exists(storage.join(config.data, "catalogue.json")):
        yield Requirement("a clip store", False, f"{config.data} is none; ingest the split")
        return
    sampling = ClipStore(config.data).sampling
    yield Requirement(
        "frames as decord decodes them (published numbers were computed with those)",
        sampling.decoder in ("decord", "auto"),
        "ingest with --decoder decord, or auto where decord is not exact",
    )
    even = sampling.num_frames % PUBLISHED_FRAMES == 0 and sampling.frame_choice == "uniform"
    yield Requirement(
        "a store of uniform frames, a multiple of 8, squashed to 224 pixels",
        even and sampling.size == PUBLISHED_SIZES["image_size"] and sampling.resize == "squash",
        "ingest with the default --sampling",
    )


def check(config: EvaluateConfig) -> None:
    """Say what a reproduction of the authors' evaluation needs, and whether it is there.

    Raises:
        STGTError: something is missing.
    """
    found = requirements(config)
    for one in found:
        logger.info("[%s] %s%s", "ok" if one.met else "missing", one.what, _mend(one))
    logger.info(
        "[open] the released files lack the graph transformer's position table, noise that the "
        "authors never saved: zeros stand for it, so their figures are reproduced nearly at best"
    )
    logger.info(
        "[open] no table of the authors' own figures was to be found: compare with the paper at "
        "hand; other systems' figures: python -m jobs.compare"
    )
    lacking = [one for one in found if not one.met]
    if lacking:
        raise STGTError(
            f"{len(lacking)} of {len(found)} things that it takes to reproduce the authors' "
            f"evaluation are missing: {'; '.join(one.what for one in lacking)}"
        )


def _mend(one: Requirement) -> str:
    return "" if one.met else f" -> {one.mend}"
