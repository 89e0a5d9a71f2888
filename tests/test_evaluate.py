"""Retrieval evaluation on a real Ray: metrics, restart, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from pipelines import checkpoints
from pipelines.clips import ClipStore
from pipelines.config import EvaluateConfig, TrackingConfig
from pipelines.evaluate import Gallery, Scores, compute_metrics, run_evaluate
from stgt.config import stgt_tiny
from stgt.errors import CheckpointError, STGTError
from stgt.model import STGT
from stgt.text import Tokenizer
from tests.conftest import TinyData


def save_untrained(data: TinyData, folder: Path, poison: bool = False) -> str:
    tokenizer = Tokenizer(data.vocab)
    torch.manual_seed(0)
    config = stgt_tiny().for_vocabulary(tokenizer.bos_id, len(tokenizer), tokenizer.pad_id)
    model = STGT(config)
    if poison:
        torch.nn.init.constant_(model.text_proj.weight, float("nan"))
    uri = str(folder / "checkpoint")
    checkpoints.save(uri, model, tokenizer, step=0)
    return uri


@pytest.fixture(scope="module")
def evaluated(
    tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EvaluateConfig, dict]:
    folder = tmp_path_factory.mktemp("evaluate")
    config = EvaluateConfig(
        store=tiny_data.val_store,
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
    assert artifacts == {"config.json", "retrieval.png"}
    with Image.open(summary["picture"]) as picture:
        assert picture.width > 600
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 20


@pytest.mark.ray
def test_scores_are_those_of_the_model_called_by_hand(
    evaluated: tuple[EvaluateConfig, dict],
) -> None:
    from pipelines import evaluate
    from stgt.frames import normalize_frames
    from stgt.losses import video_text_similarity
    from stgt.sampling import choose_frames

    config, _ = evaluated
    store = ClipStore(config.store)
    gallery = evaluate._gallery(store)  # noqa: SLF001
    scores = evaluate._score(evaluate._resolved(config), store, gallery)  # noqa: SLF001
    model, tokenizer = checkpoints.load(config.checkpoint)
    model.eval()
    clips = [
        c for shard in range(len(store.shard_sizes)) for c in store.read_shard(shard).to_pylist()
    ]
    chosen = choose_frames(12, 6, "uniform")
    frames = np.stack([store.decode([clip["frames"][i] for i in chosen]) for clip in clips])
    with torch.no_grad():
        encoded = model.encode_video(normalize_frames(torch.from_numpy(frames)))
        text = tokenizer(gallery.captions, model.config.max_text_tokens)
        similarity = video_text_similarity(encoded.embeds, model.encode_text(text)).T.numpy()
        np.testing.assert_allclose(scores.similarity, similarity, atol=1e-5)
        for caption in range(len(gallery.captions)):
            best = np.argsort(-similarity[caption], kind="stable")[:5]
            one = text.select(torch.full((5,), caption))
            match = model.match(encoded.tokens[best.copy()], one).softmax(1)[:, 1].numpy()
            np.testing.assert_allclose(
                scores.t2v[caption, best], similarity[caption, best] + match, atol=1e-5
            )
            assert np.isneginf(np.delete(scores.t2v[caption], best)).all()


@pytest.mark.ray
def test_a_restart_uses_the_embeddings_it_has(evaluated: tuple[EvaluateConfig, dict]) -> None:
    config, summary = evaluated
    encoded = Path(config.output) / "videos" / "00000.parquet"
    before = encoded.stat().st_mtime_ns
    (Path(config.output) / "metrics.json").unlink()
    again = run_evaluate(config)
    assert again["metrics"] == summary["metrics"]
    assert again["run_id"] == summary["run_id"]
    assert encoded.stat().st_mtime_ns == before


@pytest.mark.ray
def test_the_folder_of_another_evaluation_is_refused(
    evaluated: tuple[EvaluateConfig, dict],
) -> None:
    config, _ = evaluated
    with pytest.raises(STGTError, match="evaluation of another checkpoint"):
        run_evaluate(replace(config, k_rerank=4))


@pytest.mark.ray
def test_embeddings_that_are_not_finite_are_an_error(tiny_data: TinyData, tmp_path: Path) -> None:
    config = EvaluateConfig(
        store=tiny_data.val_store,
        checkpoint=save_untrained(tiny_data, tmp_path, poison=True),
        output=str(tmp_path / "out"),
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"),
    )
    with pytest.raises(STGTError, match="not finite for 12 items"):
        run_evaluate(config)
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.ray
def test_a_folder_that_is_no_checkpoint_is_an_error(tiny_data: TinyData, tmp_path: Path) -> None:
    config = EvaluateConfig(
        store=tiny_data.val_store,
        checkpoint=str(tmp_path),
        output=str(tmp_path / "out"),
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"),
    )
    with pytest.raises(CheckpointError, match="has no COMPLETE marker"):
        run_evaluate(config)


def test_several_captions_of_a_video_count_for_it() -> None:
    gallery = Gallery(["a", "b"], ["a1", "a2", "b1"], [0, 0, 1])
    t2v = np.array([[0.9, 0.1], [0.2, 0.3], [0.1, 0.8]], np.float32)
    v2t = np.array([[0.1, 0.9, 0.5], [0.7, 0.2, 0.3]], np.float32)
    metrics = compute_metrics(Scores(t2v, t2v, v2t), gallery)
    assert metrics["t2v/R1"] == pytest.approx(200 / 3)
    assert metrics["v2t/R1"] == 50
