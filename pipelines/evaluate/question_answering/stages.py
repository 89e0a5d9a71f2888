"""Answers all questions in parts, each of which is kept in its own file, and scores the answers.

A restart only computes the missing parts. A small evaluation runs in this process, without Ray.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.common import ray_errors, storage
from pipelines.common.cluster import require_resources
from pipelines.common.progress import Progress
from pipelines.common.waiting import telling_of_wait
from pipelines.evaluate.question_answering.asked import Asked
from pipelines.evaluate.question_answering.config import AnswersConfig
from stgt.question_answering.vocabulary import NO_ANSWER, AnswerVocabulary, normalized

DEFAULT_WORKERS = 2
PARTS = "parts"
BEYOND = "(beyond the vocabulary)"
"""What the table of answers shows for a class without an answer."""


@dataclass(frozen=True)
class Answered:
    """The answers to all questions."""

    table: pa.Table
    """One row per question, in the order of the manifest; see `answer_table`."""
    missing: dict[str, str]
    """Reason of each clip that could not be used, by its id."""


def answer_all(
    config: AnswersConfig, asked: Asked, vocabulary: AnswerVocabulary, runs_here: bool
) -> Answered:
    """Answer the questions that are not answered yet, and return all answers."""
    folder = storage.join(config.output, PARTS)
    items = asked.parts()
    there = set(storage.list_names(folder))
    pending = [item for item in items if not _is_done(folder, item, there)]
    total = sum(len(item["number"]) for item in items)
    done = total - sum(len(item["number"]) for item in pending)
    if pending:
        progress = Progress(f"{config.label}: answer", total, "questions", done)
        for count in (_here if runs_here else _on_ray)(config, folder, pending):
            progress.advance(count)
    tables = [storage.read_table(_uri(folder, item)) for item in items]
    return _answered(asked, vocabulary, pa.concat_tables(tables))


def _uri(folder: str, item: Mapping[str, Any]) -> str:
    return storage.join(folder, f"{item['part']:05d}.parquet")


def _is_done(folder: str, item: Mapping[str, Any], there: set[str]) -> bool:
    """Return whether a part is stored and all its clips could be used; others may be repaired."""
    if f"{item['part']:05d}.parquet" not in there:
        return False
    reasons = storage.read_table(_uri(folder, item), ["reason"])["reason"]
    return reasons.null_count == len(reasons)


def _here(config: AnswersConfig, folder: str, items: list[dict[str, Any]]) -> Iterator[int]:
    """Answer in this process, by the code of the actors."""
    import torch

    from pipelines.evaluate.question_answering.worker import Answerer

    threads = torch.get_num_threads()
    answerer = Answerer(config, folder)
    try:
        for item in items:
            found = answerer({name: [value] for name, value in item.items()})  # type: ignore[arg-type]
            for error in found.get(ray_errors.ERROR, ()):
                ray_errors.raise_packed(error)
            yield int(found["count"][0])
    finally:
        answerer.close()
        torch.set_num_threads(threads)  # an actor limits itself to one


def _on_ray(config: AnswersConfig, folder: str, items: list[dict[str, Any]]) -> Iterator[int]:
    import ray
    import ray.data
    from ray.data import ActorPoolStrategy

    from pipelines.evaluate.question_answering.worker import Answerer

    workers = config.num_workers or DEFAULT_WORKERS
    needed = {"CPU": (float(workers), "one per worker")}
    if config.use_gpu:
        needed["GPU"] = (float(workers), "one per worker")
    require_resources("evaluation", needed, "lower num_workers")
    stage = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Answerer,
        fn_constructor_args=(config, folder),
        batch_size=1,
        compute=ActorPoolStrategy(size=min(workers, len(items))),
        num_cpus=1,
        num_gpus=1 if config.use_gpu else 0,
    )
    each = dict.fromkeys(needed, 1.0)
    begun = threading.Event()
    if all(ray.available_resources().get(name, 0) >= 1 for name in each):
        begun.set()  # the first worker starts at once, and may then work for minutes
    with telling_of_wait(f"{config.label}: answer", each, begun.is_set):
        for row in ray_errors.rows(stage):
            begun.set()
            yield int(row["count"])


def _answered(asked: Asked, vocabulary: AnswerVocabulary, parts: pa.Table) -> Answered:
    found = {row["number"]: row for row in parts.to_pylist()}
    missing = dict(asked.missing)
    rows = []
    for number, one in enumerate(asked.questions):
        row = found.get(number, {"labels": [], "probabilities": [], "reason": None})
        if row["reason"] is not None:
            missing[one.clip_id] = row["reason"]
        best = [vocabulary.answer_of(label) for label in row["labels"]]
        rows.append(
            {
                "clip_id": one.clip_id,
                "question_id": one.question_id,
                "question": one.question,
                "answer": one.answer,
                "type": one.type,
                "in_vocabulary": vocabulary.label_of(one.answer) != NO_ANSWER,
                "is_missing": not best,
                "is_right": bool(best) and best[0] == normalized(one.answer),
                "best": [BEYOND if answer is None else answer for answer in best],
                "probabilities": row["probabilities"],
            }
        )
    return Answered(pa.Table.from_pylist(rows, schema=SCHEMA), missing)


SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("question_id", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("type", pa.string()),
        ("in_vocabulary", pa.bool_()),
        ("is_missing", pa.bool_()),
        ("is_right", pa.bool_()),
        ("best", pa.list_(pa.string())),
        ("probabilities", pa.list_(pa.float32())),
    ]
)
"""Columns of `answers.parquet`: `best` holds the most probable answers, with their
`probabilities`; both are empty if the clip is missing."""


def video_numbers(table: pa.Table) -> np.ndarray:
    """Return [N] int64, a number from 0 for the clip of each question of a table of answers."""
    return np.unique(np.array(table["clip_id"].to_pylist()), return_inverse=True)[1]
