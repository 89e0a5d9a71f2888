"""The worker of an evaluation of answers: a Ray Data actor that answers the questions of a part.

Legend: T frames, H and W pixels.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import torch

from pipelines.artifacts.loaded_model import LoadedModel
from pipelines.common import ray_errors, storage
from pipelines.evaluate.question_answering.config import SHOWN_ANSWERS, AnswersConfig
from pipelines.feed.opening import open_source
from pipelines.feed.sources import ClipSource
from stgt.errors import STGTError, VideoDecodeError
from stgt.question_answering.answering import rank_answers, tokenize_questions

if TYPE_CHECKING:
    from stgt.question_answering.head import AnsweringModel


class Answerer:
    """Answers the questions of a part, and writes the answers to the part's file.

    Reads:
        part, shard, and lists with one entry per question: row (of its clip in the shard), number
        (among all questions), question.
    Adds:
        count: Number of questions.
    """

    def __init__(self, config: AnswersConfig, folder: str) -> None:
        self.config = config
        self._folder = folder
        self._loaded = LoadedModel(config.checkpoint, config.precision, config.use_gpu)

    @functools.cached_property
    def _source(self) -> ClipSource:
        config, inputs = self.config, self._loaded.model.config.inputs
        return open_source(
            config.data, inputs.image_size, config.resize, frame_rules=config.frame_rules
        )

    def close(self) -> None:
        """End the decoder, if there is one."""
        if "_source" in self.__dict__:
            self._source.close()

    @ray_errors.errors_as_rows
    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answer the questions of the parts of a batch."""
        counts = []
        for place, part in enumerate(batch["part"]):
            item = {name: column[place] for name, column in batch.items()}
            storage.write_table(part_uri(self._folder, int(part)), self._answers(item))
            counts.append(len(item["number"]))
        return {"count": np.array(counts)}

    def _answers(self, item: dict[str, Any]) -> pa.Table:
        rows = [int(row) for row in item["row"]]
        tables = []
        clips = sorted(set(rows))
        for start in range(0, len(clips), self.config.batch_clips):
            some = set(clips[start : start + self.config.batch_clips])
            chosen = [place for place, row in enumerate(rows) if row in some]
            tables.append(
                self._answer(
                    int(item["shard"]),
                    [rows[place] for place in chosen],
                    [int(item["number"][place]) for place in chosen],
                    [str(item["question"][place]) for place in chosen],
                )
            )
        return pa.concat_tables(tables)

    def _answer(
        self, shard: int, rows: list[int], numbers: list[int], questions: list[str]
    ) -> pa.Table:
        """Return the answers to questions about a few clips, which are encoded together."""
        config, model = self.config, self._loaded.model
        count = config.num_frames or model.config.inputs.num_frames
        frames: dict[int, np.ndarray] = {}
        reasons: dict[int, str] = {}
        for row in sorted(set(rows)):
            clip = self._source.clip(shard, row)
            try:
                # A manifest of questions has no captions, which decoding asks for otherwise.
                clip = {**clip, "captions": ["asked"]}
                frames[row] = self._source.frames(clip, count, "uniform", np.random.default_rng(0))
            except VideoDecodeError as error:
                reasons[row] = f"{error.reason}: {error.message}"
        there = [place for place, row in enumerate(rows) if row in frames]
        labels: dict[int, list[int]] = {}
        probabilities: dict[int, list[float]] = {}
        if there:
            order = {row: number for number, row in enumerate(frames)}
            found = self._rank(
                np.stack(list(frames.values())),
                [order[rows[place]] for place in there],
                [questions[place] for place in there],
            )
            labels = dict(zip(there, found[0], strict=True))
            probabilities = dict(zip(there, found[1], strict=True))
        places = range(len(rows))
        return pa.table(
            {
                "number": pa.array(numbers, pa.int64()),
                "labels": pa.array([labels.get(place, []) for place in places], _LABELS),
                "probabilities": pa.array(
                    [probabilities.get(place, []) for place in places], _PROBABILITIES
                ),
                "reason": pa.array([reasons.get(row) for row in rows], pa.string()),
            }
        )

    def _rank(
        self, frames: np.ndarray, clips: list[int], questions: list[str]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Return classes and probabilities, [N][k] each, of the best answers to N questions.

        Args:
            frames: [V, T, H, W, 3] uint8.
            clips: Number of the clip of each question.
            questions: The questions.
        """
        model, device = self._loaded.model, self._loaded.device
        most = self.config.max_text_tokens or model.config.inputs.max_text_tokens
        text = tokenize_questions(model.config, self._loaded.tokenizer, questions, most).to(device)
        with self._loaded.autocast():
            tokens = model.video_tokens(torch.from_numpy(frames).to(device))
            found = rank_answers(
                cast("AnsweringModel", model),
                tokens,
                torch.tensor(clips, device=device),
                text,
                SHOWN_ANSWERS,
                self.config.batch_pairs,
            )
        if not found.probabilities.isfinite().all():
            raise STGTError(
                f"checkpoint {self.config.checkpoint} yields probabilities of answers that are not "
                "finite; its weights are damaged or have diverged"
            )
        return found.labels.tolist(), found.probabilities.tolist()


_LABELS = pa.list_(pa.int64())
_PROBABILITIES = pa.list_(pa.float32())


def part_uri(folder: str, part: int) -> str:
    """Return the file with the answers of a part."""
    return storage.join(folder, f"{part:05d}.parquet")
