"""Runs the evaluation that a config asks for: of retrieval, or of answers to questions."""

from __future__ import annotations

from collections.abc import Callable

from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.question_answering.config import AnswersConfig
from pipelines.evaluate.question_answering.run import AnswersSummary, run_answers
from pipelines.evaluate.run import EvaluateSummary, run_evaluate


def evaluate_task(
    config: EvaluateConfig, connect: Callable[[EvaluateConfig], None] | None = None
) -> EvaluateSummary | AnswersSummary:
    """Evaluate answers if there are questions, else retrieval.

    Args:
        config: What to evaluate.
        connect: Called once before Ray is needed, after all checks that do not need Ray.
    """
    if config.questions is None:
        return run_evaluate(config, connect=connect)
    return run_answers(
        answers_config(config), connect=None if connect is None else lambda _: connect(config)
    )


def answers_config(config: EvaluateConfig) -> AnswersConfig:
    """Return the settings of an evaluation of answers.

    Args:
        config: A config with questions, which has checked that data and checkpoint are given.
    """
    assert config.data is not None
    assert config.checkpoint is not None
    assert config.questions is not None
    return AnswersConfig(
        benchmark=config.benchmark,
        data=config.data,
        checkpoint=config.checkpoint,
        questions=config.questions,
        answers=config.answers,
        output=config.output,
        name=config.name,
        num_frames=config.num_frames,
        resize=config.resize,
        frame_rules=config.frame_rules,
        max_text_tokens=config.max_text_tokens,
        resamples=config.resamples,
        num_workers=config.num_workers,
        use_gpu=config.use_gpu,
        precision=config.precision,
        batch_clips=config.batch_clips,
        batch_pairs=config.batch_pairs,
        num_pictures=config.num_pictures,
        tracking=config.tracking,
    )
