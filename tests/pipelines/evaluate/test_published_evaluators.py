"""ALPRO's two published evaluators: their scores, candidates, text lengths and figures."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.artifacts import checkpoints
from pipelines.artifacts.benchmark_names import PUBLISHED_CANDIDATES
from pipelines.artifacts.published_results import RESULTS
from pipelines.common import storage
from pipelines.common.config import TrackingConfig
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.published_evaluators import (
    EVALUATORS,
    candidates_for,
    figures_in_words,
    reranking_in_words,
    text_tokens_for,
)
from pipelines.evaluate.reproduction import requirements
from pipelines.evaluate.run import run_evaluate
from pipelines.feed.opening import open_source
from stgt.alpro.config import alpro_tiny
from stgt.alpro.model import Alpro
from stgt.dual_encoder.config import dual_encoder_tiny
from stgt.errors import SettingError, STGTError
from stgt.inputs.tokenizer import Tokenizer
from stgt.interface.kinds import build
from stgt.retrieval.metrics import best_ranks, retrieval_metrics
from tests.helpers.data import TinyData
from tests.helpers.models import small_tokenizer


def test_published_numbers_of_candidates_and_tokens() -> None:
    assert candidates_for("alpro_lavis", PUBLISHED_CANDIDATES) == 1000
    assert candidates_for("alpro_lavis", 7) == 7
    assert candidates_for("cosine_and_match", PUBLISHED_CANDIDATES) == PUBLISHED_CANDIDATES
    lengths = {
        (rule, benchmark): text_tokens_for(rule, benchmark)
        for rule in EVALUATORS
        for benchmark in ("msrvtt", "didemo")
    }
    assert lengths == {
        ("alpro_repository", "msrvtt"): 40,
        ("alpro_repository", "didemo"): 50,
        ("alpro_lavis", "msrvtt"): 35,
        ("alpro_lavis", "didemo"): 50,
    }
    assert text_tokens_for("alpro_lavis", "msvd") is None
    assert text_tokens_for("cosine_and_match", "msrvtt") is None


def test_figures_of_the_repository_are_those_of_the_table_of_results() -> None:
    """They stand beside results of that evaluator alone."""
    for one in RESULTS:
        if one.system == "ALPRO":
            told = figures_in_words("alpro_repository", one.benchmark)[
                "published by this evaluator"
            ]
            for value in one.recall:
                assert f"{value}" in told
                other = figures_in_words("alpro_lavis", one.benchmark)
                first = other["published by this evaluator"].partition(",")[0]
                assert f"{one.recall[0]}" not in first
    assert figures_in_words("cosine_and_match", "msrvtt") == {}
    assert "no figures" in figures_in_words("alpro_lavis", "any")["published by this evaluator"]


def test_reranking_is_described_by_its_rule() -> None:
    assert reranking_in_words("cosine_and_match", 5) == (
        "the top 5 by cosine in both directions are reranked by cosine + match probability; all "
        "others are unscored"
    )
    assert reranking_in_words("alpro_lavis", 1000).startswith(
        "the top 1000 by cosine in both directions are reranked by cosine + logit of a match "
        "(alpro_lavis)"
    )
    assert re.match(
        "all pairs .* match probability alone", reranking_in_words("alpro_repository", 1)
    )
    assert reranking_in_words("cosine_and_match", 0) == "none"


def test_the_repository_evaluator_needs_pairs() -> None:
    with pytest.raises(SettingError, match="k_rerank = 0: must be positive with scoring"):
        EvaluateConfig(data="d", checkpoint="c", output="o", scoring="alpro_repository", k_rerank=0)


@pytest.mark.parametrize(
    ("changes", "unmet"),
    [
        ({}, set()),
        ({"scoring": "cosine_and_match"}, {"one of ALPRO's two published evaluators"}),
        ({"benchmark": "msvd"}, {"one of ALPRO's two benchmarks"}),
        (
            {"num_frames": 4},
            {
                "the evaluator's candidates; 8 frames, squashed to squares; captions of at most 35 "
                "tokens"
            },
        ),
    ],
)
def test_a_reproduction_needs_an_evaluator_of_alpro(
    changes: dict, unmet: set[str], tmp_path: Path
) -> None:
    """Apart from what only the released file and the videos of a benchmark could meet."""
    tokenizer = small_tokenizer(tmp_path)
    model = Alpro(replace(alpro_tiny(), num_frames=8).for_tokenizer(tokenizer), tokenizer)
    uri = str(tmp_path / "model")
    checkpoints.save(uri, model, tokenizer, step=0)
    values = {"benchmark": "msrvtt", "scoring": "alpro_lavis", "k_rerank": 1000, **changes}
    config = EvaluateConfig(
        data=str(tmp_path / "clips"), checkpoint=uri, output=str(tmp_path / "out"), **values
    )
    found = {one.what: one for one in requirements(config)}
    never = ("weights", "the published sizes", "the vocabulary", "the split", "a clip store")
    missing = {what for what, one in found.items() if not one.met and not what.startswith(never)}
    assert missing == unmet
    assert sum(what.startswith(never) for what in found) == len(never)
    assert all(one.mend for one in found.values())


def test_a_reproduction_with_a_model_of_others_is_refused(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path)
    model = build(dual_encoder_tiny().for_tokenizer(tokenizer), tokenizer)
    uri = str(tmp_path / "model")
    checkpoints.save(uri, model, tokenizer, step=0)
    config = EvaluateConfig(
        benchmark="msrvtt", data=str(tmp_path), checkpoint=uri, output=str(tmp_path / "out")
    )
    [unknown] = [one for one in requirements(config) if "authors' evaluation is known" in one.what]
    assert not unknown.met
    assert "holds CLIP; leave out --against" in unknown.mend


def config_of(tiny_data: TinyData, checkpoint: str, folder: Path, **changes) -> EvaluateConfig:
    values = {
        "data": tiny_data.val_store,
        "checkpoint": checkpoint,
        "output": str(folder / "out"),
        "resamples": 0,
        "tracking": TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"),
    }
    return EvaluateConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def checkpoint(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained ALPRO."""
    tokenizer = Tokenizer(tiny_data.vocab)
    torch.manual_seed(0)
    model = Alpro(alpro_tiny().for_tokenizer(tokenizer), tokenizer)
    uri = str(tmp_path_factory.mktemp("model") / "step-00000000")
    checkpoints.save(uri, model, tokenizer, step=0)
    return uri


@pytest.mark.ray
@pytest.mark.parametrize("rule", EVALUATORS)
def test_metrics_are_those_of_a_direct_computation(
    rule: str,
    tiny_data: TinyData,
    checkpoint: str,
    mlflow_database: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    summary = run_evaluate(config_of(tiny_data, checkpoint, tmp_path, scoring=rule))
    assert rule in summary["protocol"]["reranking"]
    cleaned = "captions cleaned" in summary["protocol"]["text tokens"]
    assert cleaned == (rule == "alpro_lavis")
    assert summary["protocol"]["evaluator"].startswith(f"{rule}: the evaluator of salesforce/")

    model, tokenizer = checkpoints.load(checkpoint)
    model.eval()
    source = open_source(tiny_data.val_store, model.config.inputs.image_size, "squash")
    [size] = source.shard_sizes
    clips = [source.clip(0, row) for row in range(size)]
    frames = np.stack([source.frames(one, 6, "uniform", np.random.default_rng(0)) for one in clips])
    captions = [caption for one in clips for caption in one["captions"]]
    owner = [row for row, one in enumerate(clips) for _ in one["captions"]]
    with torch.no_grad():
        encoding = model.encode_video(torch.from_numpy(frames))
        assert isinstance(tokenizer, Tokenizer)
        tokenize = tokenizer.as_written if rule == "alpro_repository" else tokenizer
        text = tokenize(captions, model.config.inputs.max_text_tokens)
        cosine = encoding.similarity(model.encode_text(text)).T.numpy()
        logits = torch.stack([model.match(encoding.tokens[[row]], text) for row in range(size)])
    if rule == "alpro_repository":
        scores = np.round(logits.softmax(dim=2)[..., 1].T.double().numpy(), 4)
    else:  # fewer videos than candidates, so all are scored
        scores = cosine + logits[..., 1].T.numpy()
    wanted = retrieval_metrics(best_ranks(scores, [[video] for video in owner]), "t2v")
    for name, value in wanted.items():
        assert summary["metrics"][name] == pytest.approx(value), name


@pytest.mark.ray
def test_an_evaluation_under_one_rule_is_not_continued_under_another(
    tiny_data: TinyData, checkpoint: str, mlflow_database: Path, tmp_path: Path
) -> None:
    (tmp_path / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    config = config_of(tiny_data, checkpoint, tmp_path, scoring="alpro_lavis")
    first = run_evaluate(config)
    assert storage.read_json(f"{config.output}/config.json")["k_rerank"] == 1000
    assert run_evaluate(config)["metrics"] == first["metrics"]
    with pytest.raises(STGTError, match="another checkpoint, gallery or config"):
        run_evaluate(replace(config, scoring="alpro_repository"))


@pytest.mark.ray
def test_a_model_without_matching_is_refused(
    tiny_data: TinyData, mlflow_database: Path, tmp_path: Path
) -> None:
    (tmp_path / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    tokenizer = Tokenizer(tiny_data.vocab)
    model = build(dual_encoder_tiny().for_tokenizer(tokenizer), tokenizer)
    uri = str(tmp_path / "step-00000000")
    checkpoints.save(uri, model, tokenizer, step=0)
    with pytest.raises(SettingError, match="scoring = alpro_lavis: needs a model that matches"):
        run_evaluate(config_of(tiny_data, uri, tmp_path, scoring="alpro_lavis"))
