"""Every protocol in circulation on the data sets' own files, with made-up embeddings."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.common.config import TrackingConfig
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.embedding_file import read_embedding_file
from pipelines.evaluate.run import run_evaluate
from stgt.errors import SettingError
from stgt.retrieval.metrics import best_ranks, retrieval_metrics
from stgt.retrieval.similarity import similarity_matrix

WIDTH = 6
Captions = dict[str, list[str]]


def of_1k_a(annotations: Path) -> Captions:
    with (annotations / "msrvtt" / "MSRVTT_JSFUSION_test.csv").open() as file:
        return {row["video_id"]: [row["sentence"]] for row in csv.DictReader(file)}


def of_ids(annotations: Path, name: str, captions: int) -> Captions:
    """Videos of a list of ids, with made-up captions."""
    ids = (annotations / "msrvtt" / name).read_text().split()
    return {one: [f"sentence {n} of {one}" for n in range(captions)] for one in ids}


def part(found: Captions, count: int) -> Captions:
    return dict(list(found.items())[:count])


def of_didemo(annotations: Path, by_stem: bool) -> Captions:
    found: dict[str, list[str]] = {}
    for row in json.loads((annotations / "didemo" / "test_data.json").read_text()):
        name = row["video"].partition(".")[0] if by_stem else row["video"]
        found.setdefault(name, []).append(row["description"].strip())
    return {name: [" ".join(texts)] for name, texts in found.items()}


def of_msvd(annotations: Path, pooled: bool) -> Captions:
    msvd = annotations / "msvd"
    texts = json.loads((msvd / "captions_msvd.test_val_subset.json").read_text())
    ids = (msvd / "test_list.txt").read_text().split()
    return {one: texts[one][:1] if pooled else texts[one] for one in ids}


PROTOCOLS: list[tuple[str, str, str, Callable[[Path], Captions]]] = [
    ("msrvtt", "MSR-VTT 1k-A", "msrvtt_full", of_1k_a),
    (
        "msrvtt_full",
        "MSR-VTT full",
        "msrvtt",
        lambda annotations: of_ids(annotations, "test_list_full.txt", 20),
    ),
    (
        "any",
        "MSR-VTT 1k-B",
        "msrvtt",
        lambda annotations: of_ids(annotations, "test_list_miech.txt", 1),
    ),
    ("any", "MSR-VTT 884", "msrvtt", lambda annotations: part(of_1k_a(annotations), 884)),
    ("any", "MSR-VTT 879", "msrvtt", lambda annotations: part(of_1k_a(annotations), 879)),
    ("didemo", "DiDeMo grouped by stem", "msvd", lambda annotations: of_didemo(annotations, True)),
    (
        "any",
        "DiDeMo grouped by file name",
        "didemo",
        lambda annotations: of_didemo(annotations, False),
    ),
    ("msvd", "MSVD per caption", "msvd_670", lambda annotations: of_msvd(annotations, False)),
    ("msvd_670", "MSVD pooled", "msvd", lambda annotations: of_msvd(annotations, True)),
]
LATER = {"MSR-VTT full", "MSR-VTT 1k-B", "MSR-VTT 879"}
"""Protocols that are only recognized, in `test_known_galleries.py`, in every run of the tests."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("benchmark", "name", "other", "captions_of"),
    [
        pytest.param(*one, id=one[1], marks=[pytest.mark.soak] if one[1] in LATER else [])
        for one in PROTOCOLS
    ],
)
def test_a_protocol_is_scored_by_brute_force_and_named(
    benchmark: Any,
    name: str,
    other: Any,
    captions_of: Callable[[Path], Captions],
    annotations_dir: Path,
    mlflow_database: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    found = captions_of(annotations_dir)
    ids = list(found)
    owners = np.array([video for video, one in enumerate(ids) for _ in found[one]])
    generator = np.random.default_rng(0)
    videos = generator.normal(size=(len(ids), WIDTH))
    texts = videos[owners] + generator.normal(size=(len(owners), WIDTH))
    videos, texts = (
        (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)
        for array in (videos, texts)
    )
    file = str(tmp_path / "embeddings.npz")
    np.savez(
        file,
        video_ids=np.array(ids),
        video_embeds=videos,
        caption_video_ids=np.array([ids[video] for video in owners]),
        caption_embeds=texts,
        captions=np.array([text for one in ids for text in found[one]]),
    )
    config = EvaluateConfig(
        benchmark=benchmark,
        embedding_file=file,
        output=str(tmp_path / "out"),
        resamples=0,
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"),
    )
    summary = run_evaluate(config)
    read = read_embedding_file(file)
    scores = similarity_matrix(read.videos, read.texts[:, 0])
    right = scores[np.arange(len(owners)), owners]
    wanted = retrieval_metrics((scores >= right[:, None]).sum(axis=1), "t2v")
    groups: list[list[int]] = [[] for _ in ids]
    for text, video in enumerate(owners):
        groups[video].append(text)
    wanted |= retrieval_metrics(best_ranks(np.ascontiguousarray(scores.T), groups), "v2t")
    for metric, value in wanted.items():
        assert summary["metrics"][f"sim/{metric}"] == pytest.approx(value), metric
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert result["gallery"] == name
    if benchmark == "any":
        assert summary["protocol"]["gallery"].startswith(f"recognized as {name} (")
        assert "not comparable" in summary["protocol"]["gallery"]
    # It is refused under another benchmark's name, except the first captions of MSVD.
    wrong = EvaluateConfig(
        benchmark=other, embedding_file=file, output=str(tmp_path / "wrong"), resamples=0
    )
    if (benchmark, other) == ("msvd", "msvd_670"):
        return
    with pytest.raises(SettingError, match=f"^{other}: .* which is {name} "):
        run_evaluate(wrong)
    assert not (tmp_path / "wrong").exists()
