"""Evaluates a model's answers to questions about clips.

Stages: find the clips of all questions; answer them in parts that are kept, on Ray Data or, if they
are few, in this process; compute accuracy overall and by type of question; write a report.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np

from pipelines.artifacts import checkpoints
from pipelines.artifacts.answer_benchmarks import (
    ANSWERS,
    CLASSIFICATION,
    GENERATION,
    JUDGED_EXACTLY,
    TASK,
)
from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.locations import find_checkpoint, find_data, is_manifest
from pipelines.artifacts.questions import read_answers
from pipelines.artifacts.training_run import origin_of
from pipelines.common import storage, timeline, tracking
from pipelines.common.config import fingerprint, to_dict
from pipelines.common.output_folder import CONFIG, RUN, claim_folder, config_record, settings_of
from pipelines.common.provenance import About
from pipelines.common.recording import Recording, recorded_result
from pipelines.evaluate.question_answering.asked import Asked, open_asked, reasons_of
from pipelines.evaluate.question_answering.config import AnswersConfig
from pipelines.feed.dataset_checks import check_frames, digest_of
from pipelines.feed.dataset_inputs import dataset_input
from pipelines.feed.opening import open_source
from pipelines.feed.sources import ClipSource
from stgt.errors import CheckpointError, ClipStoreError, STGTError
from stgt.interface.inputs import VideoTextConfig, answering_of
from stgt.question_answering.accuracy import accuracy, resampled_accuracy
from stgt.question_answering.vocabulary import FILE, AnswerVocabulary, check_size
from stgt.retrieval.bootstrap import interval

logger = logging.getLogger(__name__)

METRICS = "metrics.json"
REPORT = "report.html"
MISSING_SHOWN = 20
SMALL_MODEL_BYTES = 50_000_000
SMALL_NUM_FRAMES = 4096
"""Up to these sizes of weights and clips, one process is done before Ray has started workers."""


class AnswersSummary(TypedDict):
    """Result of `run_answers`."""

    benchmark: str
    protocol: dict[str, str]
    metrics: dict[str, float]
    clips: int
    questions: int
    outside_vocabulary: int
    missing: list[str]
    """The first few clips that could not be used. `metrics.json` lists all of them with reasons."""
    report: str
    run_id: str | None
    """MLflow run id; None if MLflow could not be used yet."""
    seconds: float


@dataclass(frozen=True)
class _Inputs:
    config: AnswersConfig
    model: VideoTextConfig
    vocabulary: AnswerVocabulary
    asked: Asked

    @property
    def num_frames(self) -> int:
        return self.config.num_frames or self.model.inputs.num_frames

    @property
    def runs_here(self) -> bool:
        """Whether the work is so small that this process does it, without Ray."""
        config = self.config
        if config.num_workers is not None or config.use_gpu:
            return False
        weights = storage.size_bytes(storage.join(config.checkpoint, checkpoints.WEIGHTS))
        frames = len(self.asked.places) * self.num_frames
        return weights <= SMALL_MODEL_BYTES and frames <= SMALL_NUM_FRAMES


def run_answers(
    config: AnswersConfig,
    parent_id: str | None = None,
    connect: Callable[[AnswersConfig], None] | None = None,
) -> AnswersSummary:
    """Evaluate a checkpoint, or return the result of an earlier run with the same settings.

    Args:
        config: What to evaluate.
        parent_id: MLflow run that becomes the parent of this one.
        connect: Called once before Ray is needed, after all checks that do not need Ray.

    Raises:
        STGTError: The clips, the questions, the vocabulary or the checkpoint cannot be used.
        SettingError: The questions are not those of the benchmark, or the vocabulary has another
            size than the classifier.
    """
    started = time.monotonic()
    config = _resolved(config)
    checkpoints.require(config.checkpoint)
    checkpoints.check_vocabulary(config.checkpoint)
    model = checkpoints.model_config(config.checkpoint)
    logger.info("%s holds %s", config.checkpoint, checkpoints.describe(config.checkpoint))
    vocabulary = _vocabulary(config, model)
    size = model.inputs.image_size
    if not is_manifest(config.data):
        frames = config.num_frames or model.inputs.num_frames
        check_frames(ClipStore(config.data), size, frames, config.resize)
    source = open_source(config.data, size, config.resize, frame_rules=config.frame_rules)
    try:
        inputs = _Inputs(config, model, vocabulary, open_asked(config, source))
    finally:
        source.close()
    with storage.lock(config.output):
        _claim(inputs)

        def prepare() -> None:
            if connect is not None and not inputs.runs_here:
                connect(config)

        recording = _recording(inputs, parent_id)
        result = recorded_result(
            storage.join(config.output, METRICS),
            recording=recording,
            prepare=prepare,
            work=lambda: _evaluate(inputs),
            record=lambda result: _record(inputs, recording, result),
        )
    return AnswersSummary(
        benchmark=config.benchmark,
        protocol=result["protocol"],
        metrics=result["metrics"],
        clips=result["clips"],
        questions=result["questions"],
        outside_vocabulary=result["outside_vocabulary"],
        missing=[one["clip_id"] for one in result["missing"][:MISSING_SHOWN]],
        report=storage.join(config.output, REPORT),
        run_id=tracking.recorded_run_id(storage.join(config.output, RUN)),
        seconds=round(time.monotonic() - started, 1),
    )


def _resolved(config: AnswersConfig) -> AnswersConfig:
    return replace(
        config,
        data=find_data(config.data),
        checkpoint=find_checkpoint(config.checkpoint),
        questions=storage.resolve(config.questions),
        answers=None if config.answers is None else storage.resolve(config.answers),
        output=storage.resolve(config.output),
        tracking=tracking.resolve(config.tracking),
    )


def _vocabulary(config: AnswersConfig, model: VideoTextConfig) -> AnswerVocabulary:
    """Return the answer vocabulary, after checking that the model was trained with it."""
    num_answers = getattr(model, "num_answers", 0)
    if not num_answers:
        raise CheckpointError(
            f"{config.checkpoint} was not trained to answer questions; train one with a recipe "
            "such as qa_msrvtt_stgt --init-from this checkpoint, and evaluate the result"
        )
    own = storage.join(config.checkpoint, FILE)
    if config.answers is None and not storage.exists(own):
        raise CheckpointError(
            f"{config.checkpoint} contains no {FILE}; give the answer vocabulary that the model "
            "was trained with: --answers train_ans2label.json"
        )
    uri = config.answers or own
    vocabulary = read_answers(uri)
    check_size(vocabulary, num_answers, uri)
    if storage.exists(own) and (trained_with := read_answers(own)) != vocabulary:
        raise CheckpointError(
            f"{uri} is not the answer vocabulary that {config.checkpoint} was trained with "
            f"({FILE} there, with {len(trained_with)} answers); leave out --answers"
        )
    return vocabulary


def _claim(inputs: _Inputs) -> None:
    """Claim the output folder, so that answers of different evaluations are never mixed."""
    config = inputs.config
    identity = fingerprint(
        [
            config.benchmark,
            config.checkpoint,
            storage.version(storage.join(config.checkpoint, checkpoints.WEIGHTS)),
            config.data,
            digest_of(config.data),
            digest_of(config.questions),
            inputs.vocabulary.answers,
            inputs.num_frames,
            config.resize,
            config.max_text_tokens,
            config.precision,
            config.resamples,
        ]
    )

    def refuse(found: Mapping[str, Any], differing: list[str]) -> STGTError:
        del differing
        if settings_of(found).get("identity") is None:
            return STGTError(
                f"{config.output} holds other files, with their own {CONFIG}; choose another folder"
            )
        return STGTError(
            f"{config.output} holds an evaluation of another checkpoint, other questions or other "
            "settings; choose another folder, or delete this one"
        )

    # Imported here, since it loads Ray.
    from pipelines.evaluate.question_answering.stages import PARTS

    uri = storage.join(config.output, CONFIG)
    begun = bool(storage.list_names(storage.join(config.output, PARTS)))
    begun = begun or storage.exists(storage.join(config.output, METRICS))
    foreign = storage.exists(uri) and settings_of(storage.read_json(uri)).get("identity") is None
    claim_folder(
        config.output,
        CONFIG,
        config_record("evaluate", config, identity=identity),
        refuse,
        compared=lambda found: {"identity": settings_of(found).get("identity")},
        has_results=begun or foreign,
    )


def _evaluate(inputs: _Inputs) -> None:
    """Answer all questions, score the answers, and write the results."""
    with timeline.span("import the stages"):  # with Ray and torch
        from pipelines.evaluate.question_answering import report
        from pipelines.evaluate.question_answering.stages import answer_all, video_numbers

    config, asked = inputs.config, inputs.asked
    found = answer_all(config, asked, inputs.vocabulary, inputs.runs_here)
    table, missing = found.table, found.missing
    if len(missing) == asked.num_clips:
        raise ClipStoreError(
            f"none of the {len(missing):,} clips can be used ({reasons_of(missing)}); check the "
            "videos and their paths in the manifest"
        )
    if missing:
        logger.warning(
            "%d of %d clips cannot be used, and the questions about them count as wrong: %s",
            len(missing),
            asked.num_clips,
            reasons_of(missing),
        )
    is_right = np.array(table["is_right"].to_pylist(), dtype=bool)
    types = table["type"].to_pylist()
    metrics, intervals = accuracy(is_right, types), {}
    if config.resamples:
        drawn = resampled_accuracy(is_right, types, video_numbers(table), config.resamples)
        intervals = {name: interval(values) for name, values in drawn.items()}
    outside = len(table) - sum(table["in_vocabulary"].to_pylist())
    result = {
        "task": TASK,
        "benchmark": config.benchmark,
        "title": config.named.title if config.named else "Video question answering",
        "protocol": _protocol(inputs, outside, missing),
        "metrics": metrics,
        "intervals": intervals,
        "clips": asked.num_clips,
        "questions": len(table),
        "outside_vocabulary": outside,
        "missing": [
            {"clip_id": clip_id, "reason": reason} for clip_id, reason in sorted(missing.items())
        ],
        "checkpoint": config.checkpoint,
        "tracked": False,
    }
    storage.write_table(storage.join(config.output, ANSWERS), table)
    source = open_source(
        config.data,
        inputs.model.inputs.image_size,
        config.resize,
        frame_rules=config.frame_rules,
    )
    try:
        frames_of = functools.partial(_frames, source, asked, report.FRAMES)
        page = report.page(result, table, frames_of, config.num_pictures, config.named)
    finally:
        source.close()
    storage.write_bytes(storage.join(config.output, REPORT), page.encode())
    for name, value in result["protocol"].items():
        logger.info("%s: %s", name, value)
    for name, value in metrics.items():
        low, high = intervals.get(name, (None, None))
        around = "" if low is None else f" (95% interval {low:.2f} to {high:.2f})"
        logger.info("%s: %.2f %%%s", name, value, around)
    storage.write_json(storage.join(config.output, METRICS), result)


def _frames(source: ClipSource, asked: Asked, count: int, clip_id: str) -> np.ndarray:
    """Return frames [count, size, size, 3] uint8 of a clip, for the report."""
    clip = {**source.clip(*asked.places[clip_id]), "captions": ["asked"]}
    return source.frames(clip, count, "middle", np.random.default_rng(0))


def _protocol(inputs: _Inputs, outside: int, missing: Mapping[str, str]) -> dict[str, str]:
    """Describe how the questions were answered and judged."""
    config, vocabulary = inputs.config, inputs.vocabulary
    questions = inputs.asked.questions
    split = f", {config.named.split}" if config.named else ""
    tokens = config.max_text_tokens or inputs.model.inputs.max_text_tokens
    gone = set(missing)
    lost = sum(one.clip_id in gone for one in questions)
    return {
        "protocol": f"{len(questions):,} questions about {inputs.asked.num_clips:,} clips{split}; "
        "every question counts",
        "answering": f"{_answering(inputs.model)} of {len(vocabulary):,} answers",
        "judging": JUDGED_EXACTLY,
        "outside the vocabulary": f"{outside:,} questions, counted as wrong",
        "missing videos": f"{len(gone):,} clips with {lost:,} questions, counted as wrong",
        "frames": f"{inputs.num_frames} per clip, evenly spaced, {config.resize}",
        "question length": f"at most {tokens} tokens",
        "model": inputs.model.title,
        "checkpoint": config.checkpoint,
    }


def _answering(model: VideoTextConfig) -> str:
    return GENERATION if answering_of(model) == "generation" else CLASSIFICATION


def _recording(inputs: _Inputs, parent_id: str | None) -> Recording:
    config = inputs.config
    data = [dataset_input(config.data, "test"), dataset_input(config.questions, "test")]
    return Recording(
        config.tracking,
        config.label,
        storage.join(config.output, RUN),
        to_dict(config),
        parent_id,
        meanwhile=f"the evaluation continues and its results are kept in {config.output}; they "
        "will be sent once MLflow can be used",
        about=About(
            job="evaluate",
            summary=_description(inputs),
            datasets=tuple(data),
            fingerprints={"data": data[0].digest, "questions": data[1].digest},
            step="evaluated",
            origin=origin_of(config.checkpoint),
        ),
    )


def _description(inputs: _Inputs, protocol: Mapping[str, str] | None = None) -> str:
    """Return what the run does, for readers who do not know the project."""
    config, asked = inputs.config, inputs.asked
    title = config.named.title if config.named else "questions of the user"
    parts = [
        f"Evaluates video question answering of the model {inputs.model.title} ({title}): "
        f"{len(asked.questions):,} questions about {asked.num_clips:,} clips. Answers, report and "
        f"settings are in `{config.output}`.",
        *(f"**{name}**: {value}" for name, value in (protocol or {}).items()),
    ]
    return "\n\n".join(parts)


def _record(inputs: _Inputs, recording: Recording, result: dict[str, Any]) -> None:
    """Send a result to MLflow."""
    output = inputs.config.output

    def metrics(run: tracking.Run) -> None:
        found = {
            **result["metrics"],
            "data/missing": float(len(result["missing"])),
            "data/outside_vocabulary": float(result["outside_vocabulary"]),
        }
        for name, (low, high) in result["intervals"].items():
            # MLflow's pages sort groups by name, so intervals follow the metrics themselves.
            group, _, rest = name.partition("/")
            found |= {f"{group}_ci95/{rest}_low": low, f"{group}_ci95/{rest}_high": high}
        run.log_metrics(found)
        run.describe(_description(inputs, result["protocol"]))

    def files(run: tracking.Run) -> None:
        for name in (REPORT, ANSWERS):
            run.log_file(name, storage.read_bytes(storage.join(output, name)))
        run.log_json(METRICS, {name: value for name, value in result.items() if name != "tracked"})

    recording.deliver(metrics)
    recording.deliver(files, "files")
