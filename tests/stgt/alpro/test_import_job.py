"""The jobs for weights find out which model a file holds, and write complete folders or none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipelines.artifacts import checkpoints
from pipelines.export.weights.config import ExportConfig, ImportConfig
from pipelines.export.weights.export import run_export
from pipelines.export.weights.run import run_import
from stgt.alpro.model import Alpro
from stgt.errors import SettingError
from stgt.model_folder import load_model
from tests.helpers.models import released_alpro, small_tokenizer


@pytest.fixture
def vocab(tmp_path: Path) -> str:
    small_tokenizer(tmp_path)
    return str(tmp_path / "words.txt")


def config_of(folder: Path, file: Path, **changes) -> ImportConfig:
    values = {
        "checkpoint": str(file),
        "output": str(folder / "model"),
        "vision_heads": 4,
        "qformer_heads": 4,
        "fusion_layer": 1,
    }
    return ImportConfig(**{**values, **changes})


@pytest.mark.parametrize("num_answers", [0, 7])
def test_a_file_becomes_a_complete_checkpoint_and_a_file_again(
    num_answers: int, vocab: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file = released_alpro(tmp_path, num_answers)
    summary = run_import(config_of(tmp_path, file, vocab=vocab))
    kind = "question answering" if num_answers else "retrieval"
    assert summary["found"] == f"ALPRO, {kind}"
    assert f"found: ALPRO, {kind}" in caplog.text
    assert "has no frame encoder" not in caplog.text
    model, tokenizer = checkpoints.load(summary["model"])
    assert isinstance(model, Alpro)
    assert checkpoints.describe(summary["model"]) == "ALPRO (alpro)"
    assert len(tokenizer.entries()) == model.config.vocab_size
    assert model.config.num_answers == num_answers
    text = tokenizer(["a red ball moves left"], 8)
    with torch.no_grad():
        frames = torch.zeros(1, 6, 64, 64, 3, dtype=torch.uint8)
        assert model.encode_video(frames).similarity(model.encode_text(text)).isfinite().all()

    exported = run_export(
        ExportConfig(model=summary["model"], output=str(tmp_path / "exported.pt"))
    )
    first, second = (torch.load(path, weights_only=True) for path in (file, exported["checkpoint"]))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name


def test_frames_are_resized_on_request_and_recorded(tmp_path: Path) -> None:
    file = released_alpro(tmp_path)
    summary = run_import(config_of(tmp_path, file, num_frames=12, image_size=32))
    model = load_model(Path(summary["model"]))
    assert model.config.inputs.num_frames == 12
    assert model.config.inputs.image_size == 32
    report = json.loads((Path(summary["model"]) / "import_report.json").read_text())
    assert len(report["resized"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": "eva_vit_g.pth"}, "vision = 'eva_vit_g.pth': does not apply to .*released.pt"),
        ({"num_frames": 0}, "num_frames = 0: must be at least 1"),
        ({"fusion_layer": 3}, "text.fusion_layer = 3"),
        ({"image_size": 50}, "vision.image_size = 50: must be a multiple"),
    ],
)
def test_settings_that_do_not_apply_leave_nothing_behind(
    changes: dict, message: str, tmp_path: Path
) -> None:
    file = released_alpro(tmp_path)
    with pytest.raises(SettingError, match=message):
        run_import(config_of(tmp_path, file, **changes))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["released.pt", "words.txt"]


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    file = released_alpro(tmp_path)
    other = tmp_path / "other.txt"
    other.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    with pytest.raises(SettingError, match="it has 6 entries, but the model has 15"):
        run_import(config_of(tmp_path, file, vocab=str(other)))
    assert not (tmp_path / "model").exists()
