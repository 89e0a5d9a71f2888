"""The files of a model: complete, without an optimizer, and the same for copies of a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipelines.registry.packaging import requirements
from pipelines.registry.weights import are_referred_to, assemble, find_weights, identity_of
from pipelines.video.config import SamplingConfig
from stgt.errors import CheckpointError


def checkpoint(folder: Path, encoder: str | None = None, weights: bytes = b"weights") -> str:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text('{"model": {}}')
    (folder / "vocab.txt").write_text("a\n")
    (folder / "state.json").write_text(json.dumps({"step": 3, "frame_encoder": encoder}))
    (folder / "optimizer.safetensors").write_bytes(b"state")
    (folder / "COMPLETE").touch()
    return str(folder)


def test_a_frame_encoder_in_another_checkpoint_belongs_to_the_model(tmp_path: Path) -> None:
    encoder = checkpoint(tmp_path / "encoder")
    (tmp_path / "encoder" / "frame_encoder.safetensors").write_bytes(b"frozen")
    weights = find_weights(checkpoint(tmp_path / "trained", encoder))
    assert not are_referred_to(weights)
    folder = assemble(weights, tmp_path / "assembled")
    assert sorted(one.name for one in folder.iterdir()) == [
        "COMPLETE",
        "config.json",
        "frame_encoder.safetensors",
        "model.safetensors",
        "state.json",
        "vocab.txt",
    ]
    assert (folder / "frame_encoder.safetensors").read_bytes() == b"frozen"
    assert json.loads((folder / "state.json").read_text())["frame_encoder"] is None
    # The original still names its encoder.
    assert json.loads((tmp_path / "trained" / "state.json").read_text())["frame_encoder"] == encoder


def test_a_lost_frame_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone/frame_encoder.safetensors does not exist, whi"):
        find_weights(checkpoint(tmp_path / "trained", str(tmp_path / "gone")))


def test_an_unfinished_checkpoint_is_refused(tmp_path: Path) -> None:
    uri = checkpoint(tmp_path / "one")
    (tmp_path / "one" / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="has no COMPLETE marker"):
        find_weights(uri)


def test_copies_are_the_same_model_and_other_weights_or_settings_are_not(tmp_path: Path) -> None:
    one = find_weights(checkpoint(tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    (tmp_path / "copy" / "state.json").write_text('{"step": 4, "frame_encoder": null}')
    settings = {"num_frames": 8}
    identity = identity_of(one, settings)
    assert identity_of(find_weights(str(tmp_path / "copy")), settings) == identity
    assert identity_of(one, {"num_frames": 4}) != identity
    other = find_weights(checkpoint(tmp_path / "other", weights=b"WEIGHTS"))
    assert identity_of(other, settings) != identity


def test_requirements_are_names_with_versions_of_dependencies_only() -> None:
    settings = {"sampling": {"decoder": SamplingConfig().decoder}}
    found = requirements(settings)  # type: ignore[arg-type]
    names = {line.partition("==")[0] for line in found}
    assert {"torch", "mlflow", "av"} <= names
    assert not {"decord", "stgt-ray", "ray"} & names
    assert all(version for _, _, version in (line.partition("==") for line in found))
    assert "decord" in " ".join(requirements({"sampling": {"decoder": "auto"}}))  # type: ignore[typeddict-item]
    assert "sentencepiece" not in names
    of_siglip = requirements(settings, ["model.safetensors", "spiece.model"])  # type: ignore[arg-type]
    assert any(line.startswith("sentencepiece==") for line in of_siglip)


def test_the_answer_vocabulary_belongs_to_the_model(tmp_path: Path) -> None:
    folder = Path(checkpoint(tmp_path / "one"))
    without = find_weights(str(folder))
    assert "answers.json" not in without
    (folder / "answers.json").write_text('{"red": 0}')
    assert find_weights(str(folder)).keys() == without.keys() | {"answers.json"}
