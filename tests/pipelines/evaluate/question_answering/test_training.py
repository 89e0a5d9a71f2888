"""Training with questions, evaluation of answers, and their comparison, as the jobs run them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

from pipelines.artifacts import checkpoints
from pipelines.artifacts.questions import Question, by_clip, read_answers, read_questions
from pipelines.common.config import TrackingConfig
from pipelines.compare.config import CompareConfig
from pipelines.compare.run import run_compare
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.tasks import evaluate_task
from pipelines.feed.sources import StoreSource
from pipelines.train import metrics_log, recipes
from pipelines.train.config import TrainConfig
from pipelines.train.run import run_train
from stgt.config import OptimConfig
from stgt.errors import CheckpointError, PausedError, SettingError, STGTError
from stgt.question_answering.accuracy import accuracy
from tests.helpers.checkpoint import save_untrained
from tests.helpers.data import TinyData
from tests.helpers.questions import TinyQuestions, write_tiny_questions

pytestmark = pytest.mark.ray


@dataclass(frozen=True)
class Trained:
    """A training with questions and the evaluation of its result."""

    data: TinyData
    questions: TinyQuestions
    config: TrainConfig
    training: dict[str, Any]
    evaluation: EvaluateConfig
    summary: dict[str, Any]


def tiny_config(data: TinyData, asked: TinyQuestions, folder: Path, **changes: Any) -> TrainConfig:
    recipe = recipes.RECIPES["qa_msrvtt_stgt_tiny"](
        (data.train_store,),
        str(folder / "run"),
        save_untrained(data, folder),
        data.vocab,
        questions=asked.train,  # type: ignore[call-arg]
        answers=asked.answers,
    )
    values: dict[str, Any] = {
        "steps": 4,
        "global_batch": 16,
        "block_clips": 4,
        "checkpoint_every": 2,
        "hold_out": 0,
        "val_store": data.val_store,
        "val_questions": asked.val,
        "optim": OptimConfig(lr=1e-3, warmup_steps=1),
        "record_samples": True,
        "tracking": TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"),
    }
    return replace(recipe, **{**values, **changes})


@pytest.fixture(scope="module")
def trained(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("questions")
    asked = write_tiny_questions(tiny_data, folder)
    config = tiny_config(tiny_data, asked, folder)
    training = dict(run_train(config))
    evaluation = EvaluateConfig(
        data=tiny_data.val_store,
        checkpoint=config.output,
        questions=asked.val,
        output=str(folder / "answers"),
        tracking=config.tracking,
    )
    summary = dict(evaluate_task(evaluation))
    return Trained(tiny_data, asked, config, training, evaluation, summary)


def answers_of(config: EvaluateConfig) -> list[dict[str, Any]]:
    return pq.read_table(Path(config.output) / "answers.parquet").to_pylist()


def test_steps_have_the_loss_of_answers_and_validation_their_accuracy(trained: Trained) -> None:
    rows = metrics_log.read(trained.config.output, 4)

    assert [row["step"] for row in rows] == [3, 4]  # those of the last checkpoint
    assert all(
        {name for name in row["metrics"] if name.startswith("loss/")}
        == {"loss/total", "loss/answer"}
        for row in rows
    )
    assert 0 <= rows[-1]["metrics"]["val/answers/accuracy"] <= 100
    assert trained.training["best_checkpoint"]


def test_every_question_is_used_once_per_epoch(trained: Trained, tmp_path: Path) -> None:
    """Positions of the plan are pairs of a clip and a question, spread over both workers."""
    folder = Path(trained.config.output) / "samples"
    used = [
        row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()
    ]
    asked = by_clip(read_questions(trained.questions.train))

    assert sorted(row["position"] for row in used) == list(range(64))
    assert {row["clip_id"] for row in used} <= asked.keys()


def test_checkpoint_has_the_classifier_and_its_answers(trained: Trained) -> None:
    model, _ = checkpoints.load(trained.training["checkpoint"])

    assert model.answers == read_answers(trained.questions.answers)
    assert model.config.num_answers == len(read_answers(trained.questions.answers))


def test_accuracy_is_that_of_answering_question_by_question(trained: Trained) -> None:
    """Brute force: one forward pass per question, on frames read one clip at a time."""
    loaded: Any = checkpoints.load(trained.training["best_checkpoint"])
    model = loaded[0].eval()
    vocabulary = read_answers(trained.questions.answers)
    source = StoreSource(trained.data.val_store)
    clips = {
        clip["clip_id"]: clip
        for shard, size in enumerate(source.shard_sizes)
        for clip in source.clips(shard, range(size))
    }
    questions = read_questions(trained.questions.val)

    def answer(one: Question) -> str | None:
        frames = source.frames(clips[one.clip_id], 6, "uniform", np.random.default_rng(0))
        with torch.no_grad():
            tokens = model.video_tokens(torch.from_numpy(frames)[None])
            logits = model.classifier(model.fuse(tokens, [one.question]))
        return vocabulary.answer_of(int(logits.argmax()))

    expected = [answer(one) == one.answer for one in questions]
    rows = answers_of(trained.evaluation)
    assert [row["question"] for row in rows] == [one.question for one in questions]
    assert [row["is_right"] for row in rows] == expected
    assert trained.summary["metrics"] == accuracy(
        np.array(expected), [one.type for one in questions]
    )


def test_report_and_mlflow_have_questions_answers_and_intervals(trained: Trained) -> None:
    page = Path(trained.summary["report"]).read_text()
    rows = answers_of(trained.evaluation)

    assert rows[0]["question"] in page
    assert page.count("data:image/jpeg;base64,") == trained.evaluation.num_pictures
    assert all(len(row["best"]) == 5 for row in rows)
    assert all(row["probabilities"] == sorted(row["probabilities"])[::-1] for row in rows)
    client = MlflowClient(tracking_uri=trained.config.tracking.uri)
    recorded = client.get_run(trained.summary["run_id"]).data.metrics
    for name, value in trained.summary["metrics"].items():
        assert recorded[name] == value
    low, high = (recorded[f"answers_ci95/accuracy_{end}"] for end in ("low", "high"))
    assert low <= recorded["answers/accuracy"] <= high
    files = {one.path for one in client.list_artifacts(trained.summary["run_id"])}
    assert {"answers.parquet", "metrics.json", "report.html"} <= files


def test_answers_outside_the_vocabulary_and_missing_clips_are_wrong(
    trained: Trained, tmp_path: Path
) -> None:
    """Both stay in the denominator, and missing clips are listed."""
    manifest = pq.read_table(trained.questions.val)
    rows = manifest.to_pylist()
    gone = {**rows[-1], "clip_id": "gone", "clip_hash": 2**64 - 1}
    extras = json.loads(rows[0]["extras"])
    extras["questions"][0]["answer"] = "a zebra"
    rows[0]["extras"] = json.dumps(extras)
    changed = str(tmp_path / "changed.parquet")
    pq.write_table(pa.Table.from_pylist([*rows, gone], schema=manifest.schema), changed)
    config = replace(trained.evaluation, questions=changed, output=str(tmp_path / "out"))

    summary: dict[str, Any] = dict(evaluate_task(config))

    lost = len(json.loads(gone["extras"])["questions"])
    assert summary["missing"] == ["gone"]
    assert summary["questions"] == trained.summary["questions"] + lost
    assert summary["outside_vocabulary"] == 1
    found = answers_of(config)
    assert not any(row["is_right"] for row in found if row["clip_id"] == "gone")
    zebra = next(row for row in found if row["answer"] == "a zebra")
    assert not zebra["is_right"]
    right = sum(row["is_right"] for row in found)
    assert summary["metrics"]["answers/accuracy"] == pytest.approx(100 * right / len(found))


def test_a_finished_evaluation_is_read_again_and_another_is_refused(trained: Trained) -> None:
    assert dict(evaluate_task(trained.evaluation))["metrics"] == trained.summary["metrics"]
    with pytest.raises(STGTError, match="another checkpoint, other questions or other settings"):
        evaluate_task(replace(trained.evaluation, num_frames=3))


def test_evaluation_on_ray_gives_the_same_answers(trained: Trained, tmp_path: Path) -> None:
    config = replace(trained.evaluation, output=str(tmp_path / "out"), num_workers=2)

    summary = dict(evaluate_task(config))

    assert summary["metrics"] == trained.summary["metrics"]


def test_comparison_is_paired_and_refuses_other_tasks(trained: Trained, tmp_path: Path) -> None:
    other = replace(trained.evaluation, output=str(tmp_path / "few_frames"), num_frames=2)
    evaluate_task(other)
    summary = run_compare(
        CompareConfig(
            runs=(trained.evaluation.output, other.output), output=str(tmp_path / "compared")
        )
    )

    (differences,) = summary["differences"].values()
    assert {one["metric"] for one in differences} == trained.summary["metrics"].keys()
    assert any(line.startswith("frames: 6 per clip") for line in summary["protocols_differ"])
    page = (tmp_path / "compared" / "compare.html").read_text()
    assert "Answering: classification over an answer vocabulary" in page
    retrieval = EvaluateConfig(
        data=trained.data.val_store,
        checkpoint=trained.config.init_from,
        output=str(tmp_path / "retrieval"),
        tracking=trained.config.tracking,
    )
    evaluate_task(retrieval)
    with pytest.raises(STGTError, match="evaluation of video question answering, .* text-video"):
        run_compare(CompareConfig(runs=(trained.evaluation.output, retrieval.output)))


def test_figures_that_a_language_model_judged_are_refused(trained: Trained, tmp_path: Path) -> None:
    judged = tmp_path / "judged"
    judged.mkdir()
    result = json.loads((Path(trained.evaluation.output) / "metrics.json").read_text())
    result["protocol"]["judging"] = "a language model"
    (judged / "metrics.json").write_text(json.dumps(result))
    table = pq.read_table(Path(trained.evaluation.output) / "answers.parquet")
    pq.write_table(table, judged / "answers.parquet")

    with pytest.raises(STGTError, match="judged: its answers were judged by a language model"):
        run_compare(CompareConfig(runs=(trained.evaluation.output, str(judged))))


def test_generated_answers_are_shown_as_such_without_published_figures(
    trained: Trained, tmp_path: Path
) -> None:
    folders = []
    for name, answering in (("classified", None), ("generated", "likelihood of generated text")):
        folder = tmp_path / name
        folder.mkdir()
        result = json.loads((Path(trained.evaluation.output) / "metrics.json").read_text())
        result["benchmark"] = "msvd_qa"
        if answering is not None:
            result["protocol"]["answering"] = answering
        (folder / "metrics.json").write_text(json.dumps(result))
        table = pq.read_table(Path(trained.evaluation.output) / "answers.parquet")
        pq.write_table(table, folder / "answers.parquet")
        folders.append(str(folder))

    alone = run_compare(CompareConfig(runs=(folders[0],)))
    both = run_compare(CompareConfig(runs=tuple(folders)))

    assert alone["published"] == ["ALPRO: 45.91 % (log in ALPRO's repository)"]
    assert both["published"] == []
    assert any(line.startswith("answering: ") for line in both["protocols_differ"])


def test_wrong_inputs_are_refused_with_one_sentence(trained: Trained, tmp_path: Path) -> None:
    larger = tmp_path / "larger.json"
    larger.write_text(json.dumps({str(number): number for number in range(40)}))
    other = tmp_path / "other.json"
    size = len(read_answers(trained.questions.answers))
    other.write_text(json.dumps({str(number): number for number in range(size)}))
    fresh = replace(trained.evaluation, output=str(tmp_path / "out"))

    with pytest.raises(SettingError, match=r"has 40 answers, but the model's classifier has"):
        evaluate_task(replace(fresh, answers=str(larger)))
    with pytest.raises(CheckpointError, match="is not the answer vocabulary that"):
        evaluate_task(replace(fresh, answers=str(other)))
    with pytest.raises(CheckpointError, match="was not trained to answer questions"):
        evaluate_task(replace(fresh, checkpoint=trained.config.init_from))
    with pytest.raises(SettingError, match="expected 72,821 questions"):
        evaluate_task(replace(fresh, benchmark="msrvtt_qa"))
    with pytest.raises(SettingError, match="is a benchmark of questions"):
        replace(fresh, benchmark="msrvtt_qa", questions=None)
    with pytest.raises(SettingError, match="is a setting of retrieval"):
        replace(fresh, dual_softmax=True)
    assert not (tmp_path / "out").exists()


def test_a_training_with_other_answers_than_its_checkpoint_is_refused(
    trained: Trained, tmp_path: Path
) -> None:
    other = tmp_path / "other.json"
    size = len(read_answers(trained.questions.answers))
    other.write_text(json.dumps({str(number): number for number in range(size)}))
    config = replace(
        trained.config,
        output=str(tmp_path / "run"),
        init_from=trained.training["checkpoint"],
        answers=str(other),
        questions=trained.questions.train,
    )

    with pytest.raises(STGTError):
        run_train(config)


def test_a_model_learns_to_generate_answers_and_the_comparison_says_so(
    trained: Trained, tmp_path: Path
) -> None:
    model: Any = replace(trained.config.model, answering="generation")
    config = replace(trained.config, output=str(tmp_path / "run"), steps=2, model=model)

    training = run_train(config)
    evaluation = replace(
        trained.evaluation, checkpoint=config.output, output=str(tmp_path / "generated")
    )
    summary: dict[str, Any] = dict(evaluate_task(evaluation))
    compared = run_compare(CompareConfig(runs=(trained.evaluation.output, evaluation.output)))

    assert training["step"] == 2
    assert summary["questions"] == trained.summary["questions"]
    assert summary["protocol"]["answering"].startswith("generated, by ranking the likelihoods of ")
    assert all(len(row["best"]) == 5 for row in answers_of(evaluation))
    (line,) = [one for one in compared["protocols_differ"] if one.startswith("answering: ")]
    assert "classification" in line
    assert "generated" in line
    with pytest.raises(CheckpointError, match=r"answering generation in the checkpoint"):
        run_train(
            replace(
                trained.config, output=str(tmp_path / "other"), init_from=training["checkpoint"]
            )
        )


@pytest.mark.soak
def test_a_training_that_pauses_continues_to_the_same_weights(
    trained: Trained, tmp_path: Path
) -> None:
    config = replace(trained.config, output=str(tmp_path / "run"))
    with pytest.raises(PausedError):
        run_train(config, until=2)
    again = run_train(config)

    models: list[Any] = [
        checkpoints.load(uri)[0] for uri in (trained.training["checkpoint"], again["checkpoint"])
    ]
    expected, found = (model.state_dict() for model in models)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.mark.soak
def test_alpro_learns_answers_in_passes(trained: Trained, tmp_path: Path) -> None:
    """From random weights, with accumulated passes; the evaluation names the model."""
    recipe = recipes.RECIPES["qa_msvd_alpro_tiny"](
        (trained.data.train_store,),
        str(tmp_path / "run"),
        init_from=None,
        vocab=trained.data.vocab,
        questions=trained.questions.train,  # type: ignore[call-arg]
        answers=trained.questions.answers,
    )
    config = replace(
        recipe,
        steps=2,
        global_batch=16,
        micro_batch=4,
        block_clips=4,
        checkpoint_every=2,
        hold_out=8,
        optim=OptimConfig(lr=1e-3, warmup_steps=1),
        tracking=trained.config.tracking,
    )

    run_train(config)
    summary: dict[str, Any] = dict(
        evaluate_task(
            replace(trained.evaluation, checkpoint=config.output, output=str(tmp_path / "answers"))
        )
    )

    assert summary["protocol"]["model"] == "ALPRO"
    assert summary["questions"] == trained.summary["questions"]
