"""The inputs of an evaluation whose embeddings come from a file instead of a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.artifacts.training_run import TrainingData
from pipelines.evaluate.benchmarks import Benchmark
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.embedding_file import (
    EmbeddingFile,
    aligned,
    read_embedding_file,
    with_texts,
)
from pipelines.evaluate.gallery import Gallery, open_gallery
from pipelines.evaluate.order_pairs import OrderPairs, read_order_pairs
from stgt.errors import STGTError


@dataclass(frozen=True)
class FileInputs:
    """Everything that an evaluation of a file of embeddings works on."""

    config: EvaluateConfig
    benchmark: Benchmark
    gallery: Gallery
    file: EmbeddingFile
    """Embeddings and pair scores in the order of the gallery. Its further texts are those of
    `order_pairs`, in their order."""
    order_pairs: OrderPairs | None = None
    """Captions and counterparts that differ in the order or direction of events."""
    training: TrainingData | None = None
    """Training data to look for the test clips in, with absolute URIs."""

    @property
    def title(self) -> str:
        """What is evaluated, for readers."""
        return "a file of embeddings"


def open_file_inputs(
    config: EvaluateConfig, benchmark: Benchmark, training: TrainingData | None
) -> FileInputs:
    """Read the file of embeddings, and match it with the gallery.

    Args:
        config: Config with absolute URIs.
        benchmark: What the gallery must be.
        training: Training data to look for the test clips in.

    Raises:
        STGTError: The file cannot be used, its videos or captions are not those of the gallery, or
            it lacks texts or scores of the order pairs.
        ManifestError, ClipStoreError: The manifest or the data cannot be used.
        SettingError: The gallery is not the split of the benchmark.
    """
    assert config.embedding_file is not None
    file = read_embedding_file(config.embedding_file)
    gallery = open_gallery(config, benchmark, file)
    pairs = None
    if config.order_pairs is not None:
        pairs = read_order_pairs(config.order_pairs, gallery)
        # Before the gallery selects its captions: counterparts are not among them.
        file = with_texts(file, pairs.texts)
    ordered = aligned(
        file,
        gallery.clip_ids,
        gallery.captions,
        gallery.video_of_caption,
        may_have_more=benchmark.first_caption_only,
    )
    if pairs is not None:
        _check_scores(ordered, pairs)
    return FileInputs(config, benchmark, gallery, ordered, pairs, training)


def _check_scores(file: EmbeddingFile, pairs: OrderPairs) -> None:
    """Check that pair scores, if there are any, cover both captions of all order pairs."""
    assert file.further is not None, "made by with_texts"
    scores = file.further.pair_scores
    if scores is None:
        return
    lacking = [
        (text, pairs.clip_ids[pair])
        for texts in (pairs.captions, pairs.counterparts)
        for pair, text in enumerate(texts.tolist())
        if np.isneginf(scores[text, pairs.videos[pair]])
    ]
    if lacking:
        text, clip_id = lacking[0]
        raise STGTError(
            f"order_pairs: {file.uri} has no pair score for {len(lacking)} of the "
            f"{2 * len(pairs)} captions and counterparts with their videos, such as "
            f"{pairs.texts[text]!r} with {clip_id}; score these pairs as well"
        )
