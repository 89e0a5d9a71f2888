"""A model whose evaluation read a clip store decodes videos as the store did."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipelines.artifacts import embeddings
from pipelines.artifacts.clip_store import ClipStore
from pipelines.common import storage
from pipelines.common.config import TrackingConfig
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.run import run_evaluate
from pipelines.registry.config import RegisterConfig
from pipelines.registry.inference import InferenceSettings, InputRow, RetrievalModel
from pipelines.registry.run import run_register
from tests.helpers.checkpoint import save_untrained
from tests.helpers.data import TinyData

pytestmark = [pytest.mark.ray, pytest.mark.soak]


def test_videos_are_decoded_as_those_of_the_store(
    tiny_data: TinyData, mlflow_database: Path, tmp_path: Path
) -> None:
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="store")
    checkpoint = save_untrained(tiny_data, tmp_path)
    output = str(tmp_path / "evaluation")
    run_evaluate(
        EvaluateConfig(
            data=tiny_data.val_store,
            checkpoint=checkpoint,
            output=output,
            k_rerank=0,
            num_frames=4,
            tracking=tracking,
        )
    )
    run_register(
        RegisterConfig(checkpoint=checkpoint, name="store", evaluation=output, tracking=tracking)
    )
    (description,) = tmp_path.glob("mlartifacts/models/*/artifacts/MLmodel")
    settings = yaml.safe_load(description.read_text())["flavors"]["python_function"]["config"]
    stored = ClipStore(tiny_data.val_store).sampling
    assert settings["num_frames"] == 4
    assert settings["sampling"]["num_frames"] == stored.num_frames > 4
    assert settings["sampling"]["frame_choice"] == stored.frame_choice

    folder = storage.join(output, "embeddings", embeddings.VIDEOS)
    (name,) = storage.list_names(folder)
    table = storage.read_table(storage.join(folder, name))
    rows = {
        row["clip_id"]: row["video_uri"]
        for shard in range(len(ClipStore(tiny_data.val_store).shard_sizes))
        for row in ClipStore(tiny_data.val_store)
        .read_shard(shard, ["clip_id", "video_uri"])
        .to_pylist()
    }
    settings.pop("weights")
    expected = embeddings.tensors_of(table, "embeds")
    clips = [InputRow(video_uri=rows[one]) for one in table["clip_id"].to_pylist()]

    def distance(settings: InferenceSettings) -> float:
        """Largest difference from the evaluation's embeddings."""
        model = RetrievalModel(checkpoint, settings)
        try:
            answer = model.predict(clips, "embeddings")
        finally:
            model.close()
        assert answer["error"] == [None] * len(clips)
        return float(np.abs(np.array(answer["video_embedding"]) - expected).max())

    # The store holds JPEG. Other frames of the same videos differ by three times as much.
    other = {**settings["sampling"], "frame_choice": "middle", "num_frames": 4}
    assert 2 * distance(settings) < distance({**settings, "sampling": other})
