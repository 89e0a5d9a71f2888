"""The stages of an evaluation that run on Ray Data: encoding clips and captions, matching pairs.

Each part of the work is written to its own Parquet file, so a restart only computes missing parts.

Legend: V videos.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.artifacts import embeddings
from pipelines.artifacts.embeddings import TEXTS, VIDEOS, Embeddings
from pipelines.artifacts.locations import is_manifest
from pipelines.common import ray_errors, storage
from pipelines.common.cluster import require_resources
from pipelines.common.progress import Progress
from pipelines.evaluate.gallery import Gallery
from pipelines.evaluate.inputs import EvaluationInputs
from stgt.retrieval.scoring_rules import RULES

CAPTIONS_PER_PART = 512


def encode(inputs: EvaluationInputs) -> Embeddings:
    """Return embeddings of all clips and captions, after encoding those that are not stored yet."""
    gallery, folder = inputs.gallery, inputs.embeddings
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
    text_items = _text_items(gallery.captions)
    items += text_items
    there = {kind: set(storage.list_names(storage.join(folder, kind))) for kind in (VIDEOS, TEXTS)}
    pending = [
        item
        for item in items
        if f"{item['part']:05d}.parquet" not in there[item["kind"]]
        or (is_manifest(inputs.config.data_uri) and _lacks_videos(folder, item))
    ]

    done = sum(_size(item) for item in items) - sum(_size(item) for item in pending)
    _run_stage(
        inputs,
        f"{inputs.config.label}: encode",
        pending,
        _encoder,
        (inputs.config, folder),
        "clips and captions",
        done,
    )
    return embeddings.read_all(
        folder, gallery.num_videos, len(gallery.captions), (len(video_parts), len(text_items))
    )


def encode_captions(
    inputs: EvaluationInputs, captions: Sequence[str], folder: str
) -> npt.NDArray[np.float32]:
    """Return embeddings [N, E] of further captions, after encoding parts that are not stored yet.

    Args:
        inputs: Inputs of the evaluation.
        captions: N captions, in a fixed order.
        folder: Folder for these embeddings alone.
    """
    items = _text_items(captions)
    there = set(storage.list_names(storage.join(folder, TEXTS)))
    pending = [item for item in items if f"{item['part']:05d}.parquet" not in there]
    done = len(captions) - sum(_size(item) for item in pending)
    label = f"{inputs.config.label}: encode further captions"
    _run_stage(inputs, label, pending, _encoder, (inputs.config, folder), "captions", done)
    return np.concatenate(
        [
            embeddings.tensors_of(
                storage.read_table(embeddings.part_uri(folder, TEXTS, item["part"])), "embeds"
            )
            for item in items
        ]
    )


def _text_items(captions: Sequence[str]) -> list[dict[str, Any]]:
    """Divide captions into parts, as inputs of a worker."""
    return [
        {
            "kind": TEXTS,
            "part": number,
            "shard": 0,
            "rows": [0],
            "videos": [0],
            "captions": list(captions[start : start + CAPTIONS_PER_PART]),
        }
        for number, start in enumerate(range(0, len(captions), CAPTIONS_PER_PART))
    ]


def _encoder() -> Callable[..., Any]:
    from pipelines.evaluate.worker import Encoder

    return Encoder


def _lacks_videos(folder: str, item: dict[str, Any]) -> bool:
    """Return whether videos of a stored part could not be decoded; they may be repaired by now."""
    if item["kind"] != VIDEOS:
        return False
    uri = embeddings.part_uri(folder, VIDEOS, item["part"])
    reasons = storage.read_table(uri, ["reason"])["reason"]
    return reasons.null_count < len(reasons)


def _size(item: dict[str, Any]) -> int:
    return len(item["videos"] if item["kind"] == VIDEOS else item["captions"])


def _run_stage(
    inputs: EvaluationInputs,
    label: str,
    items: list[dict[str, Any]],
    worker: Callable[[], Callable[..., Any]],
    arguments: tuple[Any, ...],
    unit: str,
    done: int = 0,
) -> None:
    """Process items, each of which leaves a file, in a pool of actors or in this process."""
    if not items:
        return
    total = done + sum(len(item["row"]) if "row" in item else _size(item) for item in items)
    progress = Progress(label, total, unit, done)
    if inputs.runs_here:
        _run_here(worker()(*arguments), items, progress)
        return
    import ray
    import ray.data
    from ray.data import ActorPoolStrategy

    from pipelines.common.waiting import telling_of_wait

    config = inputs.config
    needed = {"CPU": (float(inputs.num_workers), "one per worker")}
    if config.use_gpu:
        needed["GPU"] = (float(inputs.num_workers), "one per worker")
    require_resources("evaluation", needed, "lower num_workers")
    stage = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        worker(),  # type: ignore[arg-type]
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ActorPoolStrategy(size=min(inputs.num_workers, len(items))),
        num_cpus=1,
        num_gpus=1 if config.use_gpu else 0,
    )
    each = {"CPU": 1.0, **({"GPU": 1.0} if config.use_gpu else {})}
    free = ray.available_resources()
    begun = threading.Event()
    if all(free.get(name, 0) >= amount for name, amount in each.items()):
        begun.set()  # the first worker starts at once, and may then work for minutes
    with telling_of_wait(label, each, begun.is_set):
        for row in ray_errors.rows(stage):
            begun.set()
            progress.advance(row["count"])


def _run_here(local: Any, items: list[dict[str, Any]], progress: Progress) -> None:
    """Process items in this process, by the code of the actors."""
    import torch

    threads = torch.get_num_threads()
    try:
        for item in items:
            (row,) = _rows(local({name: [value] for name, value in item.items()}))
            ray_errors.raise_packed(row.get(ray_errors.ERROR))
            progress.advance(row["count"])
    finally:
        local.close()
        torch.set_num_threads(threads)  # an actor limits itself to one


def _rows(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def match(
    inputs: EvaluationInputs,
    gallery: Gallery,
    rows: npt.NDArray[np.int64],
    pairs: npt.NDArray[np.int64],
) -> npt.NDArray[np.float32]:
    """Return what matching adds to the score of each pair, after computing missing parts.

    Args:
        inputs: Inputs of the evaluation.
        gallery: The part of its gallery that is scored.
        rows: [V, 2] int64: part and row of each video's embeddings.
        pairs: [n, 2] int64: text and video of each pair, in a fixed order.

    Returns:
        [n] float32.
    """
    part_of_pair = rows[pairs[:, 1], 0]
    # A single stable sort, because there may be thousands of parts and tens of millions of pairs.
    order = np.argsort(part_of_pair, kind="stable")
    parts, firsts = np.unique(part_of_pair[order], return_index=True)
    groups = dict(zip(parts.tolist(), np.split(order, firsts[1:]), strict=True))
    items = [_pairs_of(part, pairs[group], rows, gallery) for part, group in groups.items()]
    there = set(storage.list_names(inputs.pairs))
    found = {item["part"]: _matched(inputs, item, there) for item in items}
    pending = [item for item in items if found[item["part"]] is None]

    def matcher() -> Callable[..., Any]:
        from pipelines.evaluate.worker import Matcher

        return Matcher

    _run_stage(
        inputs,
        f"{inputs.config.label}: match",
        pending,
        matcher,
        (inputs.config, inputs.embeddings, inputs.pairs),
        "pairs",
        len(pairs) - sum(len(item["row"]) for item in pending),
    )
    there |= {f"{item['part']:05d}.parquet" for item in pending}
    matched = np.empty(len(pairs), dtype=np.float32)
    for item in items:
        values = found[item["part"]]
        values = _matched(inputs, item, there) if values is None else values
        assert values is not None, "written by the stage above"
        matched[groups[item["part"]]] = values
    return matched


def _pairs_of(
    part: int,
    pairs: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    gallery: Gallery,
) -> dict[str, Any]:
    """Return a worker's input for the pairs of a part, as arrays since there may be millions."""
    texts, places = np.unique(pairs[:, 0], return_inverse=True)
    return {
        "part": part,
        "row": rows[pairs[:, 1], 1],
        "text": pairs[:, 0],
        "place": places,
        "caption": [gallery.captions[text] for text in texts],
    }


def _matched(
    inputs: EvaluationInputs, item: dict[str, Any], there: set[str]
) -> npt.NDArray[np.float32] | None:
    """Return stored values of a part; None if there are none or they are of other pairs."""
    name = f"{item['part']:05d}.parquet"
    if name not in there:
        return None
    table: pa.Table = storage.read_table(storage.join(inputs.pairs, name))
    same = all(np.array_equal(table[column].to_numpy(), item[column]) for column in ("text", "row"))
    return table[RULES[inputs.config.scoring].value].to_numpy() if same else None
