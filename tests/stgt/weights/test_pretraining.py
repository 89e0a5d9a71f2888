"""Tests of models initialized for pre-training from EVA's frame encoder and BERT's layers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from pipelines.artifacts import checkpoints
from pipelines.export.weights.config import ImportConfig
from pipelines.export.weights.run import run_import
from stgt.config import QFormerConfig, stgt_g
from stgt.errors import CheckpointError, CheckpointMismatchError
from stgt.model import STGT
from stgt.weights import pretraining

ENCODER = "visual_encoder."
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "ball"]


@pytest.fixture(scope="module")
def parts(reference_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small encoder's file, a BERT and its vocabulary."""
    folder = tmp_path_factory.mktemp("parts")
    released = load_file(reference_dir / "stgt" / "weights.safetensors")
    encoder = {
        name.removeprefix(ENCODER): tensor.half()
        for name, tensor in released.items()
        if name.startswith(ENCODER)
    }
    torch.save(encoder, folder / "eva.pth")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    torch.manual_seed(1)
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=40,
            pad_token_id=0,
        )
    )
    bert.save_pretrained(folder / "bert")
    return folder


def import_config(parts: Path, output: Path, **changes: object) -> ImportConfig:
    values = {
        "vision": str(parts / "eva.pth"),
        "vocab": str(parts / "vocab.txt"),
        "vision_heads": 4,
        "bert": str(parts / "bert"),
        "embed_dim": 24,
    }
    return ImportConfig(output=str(output), **{**values, **changes})


def test_text_layers_are_berts_and_queries_feed_forward_begins_as_theirs(
    parts: Path, tmp_path: Path
) -> None:
    summary = run_import(import_config(parts, tmp_path / "model"))
    assert summary["embed_dim"] == 24
    checkpoints.require(str(tmp_path / "model"))
    model = STGT.from_pretrained(tmp_path / "model")
    ours = model.qformer.state_dict()
    theirs = BertForMaskedLM.from_pretrained(parts / "bert").state_dict()
    for layer in range(2):
        name = f"bert.encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            assert torch.equal(
                ours[f"{name}.attention.attention.{part}.weight"],
                theirs[f"{name}.attention.self.{part}.weight"],
            )
        text = theirs[f"{name}.intermediate.dense.weight"]
        assert torch.equal(ours[f"{name}.intermediate.dense.weight"], text)
        assert torch.equal(ours[f"{name}.intermediate_query.dense.weight"], text)
    words = theirs["bert.embeddings.word_embeddings.weight"]
    assert ours["word_embeddings.weight"].shape[0] == len(WORDS) + 1
    assert torch.equal(ours["word_embeddings.weight"][:-1], words)
    assert ours["word_embeddings.weight"][-1].abs().sum() > 0
    assert torch.equal(
        ours["caption_head.dense.weight"], theirs["cls.predictions.transform.dense.weight"]
    )
    encoder = torch.load(parts / "eva.pth")
    kept = model.frame_encoder.state_dict()
    assert torch.equal(
        kept["vit.blocks.0.mlp.fc1.weight"].half(), encoder["blocks.0.mlp.fc1.weight"]
    )


def test_the_same_seed_begins_the_same_model(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = QFormerConfig(width=48, layers=2, heads=4, mlp_width=96, max_position=40)
    # Without a BERT the Q-Former has the published size, whose 180 million weights take seconds.
    monkeypatch.setattr(pretraining, "stgt_g", lambda dim: replace(stgt_g(dim), qformer=small))
    run_import(import_config(parts, tmp_path / "one", bert=None))
    run_import(import_config(parts, tmp_path / "two", bert=None))
    run_import(import_config(parts, tmp_path / "other", bert=None, seed=1))
    one, two, other = (
        load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "other")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())
    for name in ("graph.time_embed", "qformer.query_tokens"):
        assert not torch.equal(one[name], other[name])


def test_parts_that_do_not_belong_together_are_refused(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="required without a checkpoint"):
        import_config(parts, tmp_path / "model", vocab=None)
    with pytest.raises(ValueError, match="omit checkpoint"):
        import_config(parts, tmp_path / "model", checkpoint="stgt.pth")
    more = tmp_path / "vocab.txt"
    more.write_text("\n".join([*WORDS, "blue"]) + "\n")
    with pytest.raises(ValueError, match="BERT has 8 words, but the vocabulary has 9"):
        run_import(import_config(parts, tmp_path / "model", vocab=str(more)))
    with pytest.raises(CheckpointError, match="cannot be read"):
        run_import(import_config(parts, tmp_path / "model", bert=str(tmp_path / "nothing")))
    lacking = tmp_path / "lacking"
    shutil.copytree(parts / "bert", lacking)
    tensors = load_file(lacking / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks bert\.encoder\.layer\.1\.output\.dense"):
        run_import(import_config(parts, tmp_path / "model", bert=str(lacking)))
    encoder = torch.load(parts / "eva.pth")
    del encoder["blocks.0.mlp.fc2.weight"]
    torch.save(encoder, tmp_path / "cut.pth")
    with pytest.raises(CheckpointMismatchError, match="fc2"):
        run_import(import_config(parts, tmp_path / "model", vision=str(tmp_path / "cut.pth")))
    assert not (tmp_path / "model").exists()
