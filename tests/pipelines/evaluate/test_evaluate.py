"""Retrieval evaluation on a real Ray: metrics, report, restart, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from pipelines.artifacts import checkpoints
from pipelines.artifacts.clip_store import ClipStore
from pipelines.common.config import TrackingConfig
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.run import run_evaluate
from stgt.errors import CheckpointError, STGTError
from stgt.inputs.frame_choice import choose_frames
from stgt.inputs.transforms import normalize_frames
from stgt.network.similarity import video_text_similarity
from stgt.retrieval.metrics import best_ranks
from stgt.retrieval.ranking import fuse_scores, top_candidates
from tests.helpers.checkpoint import save_untrained
from tests.helpers.data import TinyData


@pytest.fixture(scope="module")
def evaluated(
    tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EvaluateConfig, dict]:
    folder = tmp_path_factory.mktemp("evaluate")
    config = EvaluateConfig(
        data=tiny_data.val_store,
        checkpoint=save_untrained(tiny_data, folder),
        output=str(folder / "out"),
        k_rerank=5,
        tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"),
    )
    return config, dict(run_evaluate(config))


@pytest.mark.ray
def test_metrics_go_to_mlflow_with_a_picture(evaluated: tuple[EvaluateConfig, dict]) -> None:
    config, summary = evaluated
    assert (summary["clips"], summary["captions"]) == (12, 12)
    client = MlflowClient(tracking_uri=config.tracking.uri)
    run = client.get_run(summary["run_id"])
    for name in ("t2v/R1", "v2t/R10", "sim/t2v/R5", "t2v/MdR", "v2t/MnR"):
        assert run.data.metrics[name] == summary["metrics"][name]
    artifacts = {artifact.path for artifact in client.list_artifacts(summary["run_id"])}
    assert artifacts == {
        "config.json",
        "metrics.json",
        "ranks.parquet",
        "report.html",
        "retrieval.png",
    }
    tags = run.data.tags
    assert "each caption against all videos" in tags["mlflow.note.content"]
    assert run.data.metrics["t2v_ci95/R1_low"] <= run.data.metrics["t2v/R1"]
    assert run.data.metrics["t2v/R1"] <= run.data.metrics["t2v_ci95/R1_high"]
    assert not [name for name in run.data.metrics if name.startswith("ci95/")]
    assert tags["lineage"] == f"checkpoint {config.checkpoint} -> evaluated as {config.label}"
    (data,) = run.inputs.dataset_inputs
    assert data.tags[0].value == "test"
    assert data.dataset.digest == ClipStore(config.data).catalogue["digest"][:12]
    with Image.open(summary["picture"]) as picture:
        assert picture.width > 600
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 20


@pytest.mark.ray
def test_ranks_are_those_of_the_model_called_by_hand(
    evaluated: tuple[EvaluateConfig, dict],
) -> None:
    config, summary = evaluated
    store = ClipStore(config.data)
    model, tokenizer = checkpoints.load(config.checkpoint)
    model.eval()
    clips = [
        c for shard in range(len(store.shard_sizes)) for c in store.read_shard(shard).to_pylist()
    ]
    captions = [clip["captions"][0] for clip in clips]
    chosen = choose_frames(12, 6, "uniform")
    frames = np.stack([store.decode([clip["frames"][i] for i in chosen]) for clip in clips])
    with torch.no_grad():
        encoded = model.encode_video(normalize_frames(torch.from_numpy(frames)))
        text = tokenizer(captions, model.config.max_text_tokens)
        similarity = video_text_similarity(encoded.embeds, model.encode_text(text)).T.numpy()
        match = np.empty((12, 12), dtype=np.float32)
        for caption in range(12):
            one = text.select(torch.full((12,), caption))
            match[caption] = model.match(encoded.tokens, one).softmax(1)[:, 1].numpy()
    right = [[row] for row in range(12)]
    wanted = {}
    for name, scores, probability in (
        ("t2v", similarity, match),
        ("v2t", np.ascontiguousarray(similarity.T), np.ascontiguousarray(match.T)),
    ):
        best = top_candidates(scores, 5)
        fused = fuse_scores(scores, best, np.take_along_axis(probability, best, axis=1))
        wanted[name] = (best_ranks(scores, right).tolist(), best_ranks(fused, right).tolist())
    found = pq.read_table(Path(config.output) / "ranks.parquet").to_pylist()
    for name, (by_cosine, reranked) in wanted.items():
        rows = [row for row in found if row["direction"] == name]
        assert [row["sim_rank"] for row in rows] == by_cosine
        assert [row["rank"] for row in rows] == reranked
        ids = [clip["clip_id"] for clip in clips]
        assert [row["clip_id"] for row in rows] == ids
        assert summary["metrics"][f"{name}/R1"] == pytest.approx(
            100 * np.mean(np.array(reranked) == 1)
        )


@pytest.mark.ray
def test_a_result_of_an_earlier_version_is_given_as_it_is(
    evaluated: tuple[EvaluateConfig, dict],
) -> None:
    config, summary = evaluated
    metrics = Path(config.output, "metrics.json")
    now = metrics.read_text()
    earlier = json.loads(now)
    del earlier["tracked"]
    metrics.write_text(json.dumps(earlier))
    try:
        assert run_evaluate(config)["metrics"] == summary["metrics"]
    finally:
        metrics.write_text(now)


@pytest.mark.ray
def test_a_restart_uses_the_embeddings_and_pairs_it_has(
    evaluated: tuple[EvaluateConfig, dict],
) -> None:
    config, summary = evaluated
    parts = sorted(Path(config.output).rglob("0*.parquet"))
    assert {part.parent.name for part in parts} == {"videos", "texts", "pairs"}
    before = [part.stat().st_mtime_ns for part in parts]
    (Path(config.output) / "metrics.json").unlink()
    again = run_evaluate(config)
    assert again["metrics"] == summary["metrics"]
    assert again["run_id"] == summary["run_id"]
    assert [part.stat().st_mtime_ns for part in parts] == before


@pytest.mark.ray
def test_other_settings_need_another_folder_but_not_other_embeddings(
    evaluated: tuple[EvaluateConfig, dict], tmp_path: Path
) -> None:
    config, summary = evaluated
    with pytest.raises(STGTError, match="the evaluation of another checkpoint"):
        run_evaluate(replace(config, k_rerank=0))
    embeddings = str(Path(config.output) / "embeddings")
    again = replace(
        config, output=str(tmp_path / "again"), embeddings=embeddings, k_rerank=0, dual_softmax=True
    )
    found = run_evaluate(again)["metrics"]
    assert found["sim/t2v/R1"] == summary["metrics"]["sim/t2v/R1"]
    assert "t2v/R1" not in found
    assert "dsl/v2t/MdR" in found
    with pytest.raises(STGTError, match="holds embeddings of another"):
        run_evaluate(replace(again, output=str(tmp_path / "fewer"), num_frames=3))


@pytest.mark.ray
@pytest.mark.parametrize(
    ("poison", "named", "workers"), [("text_proj", "captions", None), ("video_proj", "clips", 1)]
)
def test_embeddings_that_are_not_finite_are_an_error(
    tiny_data: TinyData, tmp_path: Path, poison: str, named: str, workers: int | None
) -> None:
    config = EvaluateConfig(
        data=tiny_data.val_store,
        checkpoint=save_untrained(tiny_data, tmp_path, poison=poison),
        output=str(tmp_path / "out"),
        num_workers=workers,
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"),
    )
    with pytest.raises(STGTError, match=f"not finite for 12 {named} "):
        run_evaluate(config)
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.ray
def test_a_folder_that_is_no_checkpoint_is_an_error(tiny_data: TinyData, tmp_path: Path) -> None:
    config = EvaluateConfig(
        data=tiny_data.val_store,
        checkpoint=str(tmp_path),
        output=str(tmp_path / "out"),
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"),
    )
    with pytest.raises(CheckpointError, match="has no COMPLETE marker"):
        run_evaluate(config)
