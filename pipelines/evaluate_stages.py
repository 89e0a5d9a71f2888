"""The stages of an evaluation that run on Ray Data: clips and captions are encoded, pairs matched.

Each part of the work leaves a Parquet file, so a restart goes on with the parts that are left.

Legend: V videos.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy

from pipelines import embeddings, faults, storage
from pipelines.benchmarks import Benchmark
from pipelines.config import EvaluateConfig
from pipelines.embeddings import TEXTS, VIDEOS, Embeddings
from pipelines.gallery import Gallery
from pipelines.progress import Progress
from pipelines.sources import is_manifest

if TYPE_CHECKING:
    from pipelines.evaluate_worker import _Worker

PAIRS = "pairs"
CAPTIONS_PER_PART = 512


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and where its parts lie."""

    config: EvaluateConfig
    benchmark: Benchmark
    gallery: Gallery
    model: dict[str, Any]
    """The model's sizes."""

    @property
    def embeddings(self) -> str:
        """Folder of the embeddings."""
        return self.config.embeddings or storage.join(self.config.output, "embeddings")

    @property
    def pairs(self) -> str:
        """Folder of the matched pairs."""
        return storage.join(self.config.output, PAIRS)

    @property
    def num_frames(self) -> int:
        """Frames a clip."""
        return self.config.num_frames or int(self.model["num_frames"])


def encode(evaluation: Evaluation) -> Embeddings:
    """Embeddings of all clips and captions; what is not encoded yet is encoded."""
    gallery, folder = evaluation.gallery, evaluation.embeddings
    video_parts = gallery.parts()
    items: list[dict[str, Any]] = [
        {
            "kind": VIDEOS,
            "part": number,
            "shard": part.shard,
            "rows": part.rows,
            "videos": part.videos,
            "captions": [""],
        }
        for number, part in enumerate(video_parts)
    ]
    starts = range(0, len(gallery.captions), CAPTIONS_PER_PART)
    items += [
        {
            "kind": TEXTS,
            "part": number,
            "shard": 0,
            "rows": [0],
            "videos": [0],
            "captions": gallery.captions[start : start + CAPTIONS_PER_PART],
        }
        for number, start in enumerate(starts)
    ]
    there = {kind: set(storage.list_names(storage.join(folder, kind))) for kind in (VIDEOS, TEXTS)}
    pending = [
        item
        for item in items
        if f"{item['part']:05d}.parquet" not in there[item["kind"]]
        or (is_manifest(evaluation.config.data) and _lacks_videos(folder, item))
    ]

    def encoder() -> type[_Worker]:
        from pipelines.evaluate_worker import Encoder

        return Encoder

    done = sum(_size(item) for item in items) - sum(_size(item) for item in pending)
    _run_stage(
        evaluation,
        f"{evaluation.config.label}: encode",
        pending,
        encoder,
        (evaluation.config, folder),
        "clips and captions",
        done,
    )
    return embeddings.read_all(
        folder, gallery.num_videos, len(gallery.captions), (len(video_parts), len(starts))
    )


def _lacks_videos(folder: str, item: dict[str, Any]) -> bool:
    """Whether videos of a part could not be decoded the last time; they may have been mended."""
    if item["kind"] != VIDEOS:
        return False
    uri = embeddings.part_uri(folder, VIDEOS, item["part"])
    reasons = storage.read_table(uri, ["reason"])["reason"]
    return reasons.null_count < len(reasons)


def _size(item: dict[str, Any]) -> int:
    return len(item["videos"] if item["kind"] == VIDEOS else item["captions"])


def _run_stage(
    evaluation: Evaluation,
    label: str,
    items: list[dict[str, Any]],
    worker: Callable[[], type[_Worker]],
    arguments: tuple[Any, ...],
    unit: str,
    done: int = 0,
) -> None:
    """Have a pool of actors work on items, each of which leaves a file."""
    if not items:
        return
    config = evaluation.config
    _check_cluster(config)
    total = done + sum(len(item["row"]) if "row" in item else _size(item) for item in items)
    progress = Progress(label, total, unit, done)
    stage = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        worker(),  # type: ignore[arg-type]
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ActorPoolStrategy(size=min(config.num_workers, len(items))),
        num_cpus=1,
        num_gpus=1 if config.use_gpu else 0,
    )
    for row in faults.rows(stage):
        progress.advance(row["count"])


def _check_cluster(config: EvaluateConfig) -> None:
    """Check that the workers fit the cluster; a pool that does not would wait forever.

    Raises:
        ValueError: they do not.
    """
    resources = ray.cluster_resources()
    for name, wanted in (("CPU", True), ("GPU", config.use_gpu)):
        there = resources.get(name, 0)
        if wanted and there < config.num_workers:
            raise ValueError(
                f"evaluation needs {config.num_workers} {name}s, one a worker, the cluster has "
                f"{there:g}; lower num_workers"
            )


def match(
    evaluation: Evaluation,
    gallery: Gallery,
    rows: npt.NDArray[np.int64],
    pairs: npt.NDArray[np.int64],
) -> npt.NDArray[np.float32]:
    """Matching probability of each pair, computed part by part; what is there is not done again.

    Args:
        evaluation: what is evaluated.
        gallery: what is scored of it.
        rows: [V, 2] part and row of each video's embeddings.
        pairs: [n, 2] (text, video), in a fixed order.

    Returns:
        [n] float32.
    """
    part_of_pair = rows[pairs[:, 1], 0]
    # One stable sort: there may be thousands of parts and tens of millions of pairs.
    order = np.argsort(part_of_pair, kind="stable")
    parts, firsts = np.unique(part_of_pair[order], return_index=True)
    groups = dict(zip(parts.tolist(), np.split(order, firsts[1:]), strict=True))
    items = [_pairs_of(part, pairs[group], rows, gallery) for part, group in groups.items()]
    there = set(storage.list_names(evaluation.pairs))
    found = {item["part"]: _matched(evaluation, item, there) for item in items}
    pending = [item for item in items if found[item["part"]] is None]

    def matcher() -> type[_Worker]:
        from pipelines.evaluate_worker import Matcher

        return Matcher

    _run_stage(
        evaluation,
        f"{evaluation.config.label}: match",
        pending,
        matcher,
        (evaluation.config, evaluation.embeddings, evaluation.pairs),
        "pairs",
        len(pairs) - sum(len(item["row"]) for item in pending),
    )
    there |= {f"{item['part']:05d}.parquet" for item in pending}
    probability = np.empty(len(pairs), dtype=np.float32)
    for item in items:
        values = found[item["part"]]
        values = _matched(evaluation, item, there) if values is None else values
        assert values is not None, "the stage has just written it"
        probability[groups[item["part"]]] = values
    return probability


def _pairs_of(
    part: int,
    pairs: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    gallery: Gallery,
) -> dict[str, Any]:
    """What a worker needs to match the pairs of a part; arrays, since there may be millions."""
    texts, places = np.unique(pairs[:, 0], return_inverse=True)
    return {
        "part": part,
        "row": rows[pairs[:, 1], 1],
        "text": pairs[:, 0],
        "place": places,
        "caption": [gallery.captions[text] for text in texts],
    }


def _matched(
    evaluation: Evaluation, item: dict[str, Any], there: set[str]
) -> npt.NDArray[np.float32] | None:
    """Probabilities of a part's pairs; None when they are not there, or those of other pairs."""
    name = f"{item['part']:05d}.parquet"
    if name not in there:
        return None
    table: pa.Table = storage.read_table(storage.join(evaluation.pairs, name))
    same = all(np.array_equal(table[column].to_numpy(), item[column]) for column in ("text", "row"))
    return table["probability"].to_numpy() if same else None
