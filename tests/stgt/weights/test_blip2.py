"""The Q-Former of BLIP-2, from LAVIS's files and from models of transformers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    OPTConfig,
)

from pipelines.export.weights.config import ImportConfig
from pipelines.export.weights.run import run_import
from stgt.config import QFormerConfig, stgt_g
from stgt.errors import CheckpointError, CheckpointMismatchError
from stgt.model import STGT
from stgt.network.qformer import QFormer
from stgt.weights.blip2 import read_qformer
from stgt.weights.released import ImportReport

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "ball"]
ENCODER = "visual_encoder."
WIDTH, LAYERS, HEADS, QUERIES, POSITIONS = 48, 4, 4, 5, 40
State = dict[str, torch.Tensor]
TEXT_NAMES = re.compile(r"embeddings\.|qformer\.encoder\.layer\.\d+\.(intermediate|output)\.")


def randomized(model: torch.nn.Module) -> Any:
    """Give all parameters random values, since those that start as 0 or 1 would look alike."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def blip2_config(width: int) -> Blip2Config:
    return Blip2Config(
        vision_config={
            "hidden_size": width,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 28,
            "patch_size": 14,
        },
        qformer_config={
            "vocab_size": len(WORDS) + 1,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": 96,
            "max_position_embeddings": POSITIONS,
            "cross_attention_frequency": 2,
            "encoder_hidden_size": width,
            "use_qformer_text_input": True,
        },
        text_config=OPTConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=1,
            ffn_dim=16,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            max_position_embeddings=16,
        ).to_dict(),
        num_query_tokens=QUERIES,
        image_text_hidden_size=24,
    )


@pytest.fixture(scope="module")
def parts(reference_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small encoder's file, a vocabulary and a BERT."""
    folder = tmp_path_factory.mktemp("parts")
    released = load_file(reference_dir / "stgt" / "weights.safetensors")
    encoder = {
        name.removeprefix(ENCODER): tensor
        for name, tensor in released.items()
        if name.startswith(ENCODER)
    }
    torch.save(encoder, folder / "eva.pth")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=96,
            max_position_embeddings=POSITIONS,
            pad_token_id=0,
        )
    )
    randomized(bert).save_pretrained(folder / "bert")
    return folder


@pytest.fixture(scope="module")
def width(parts: Path) -> int:
    return torch.load(parts / "eva.pth")["cls_token"].shape[-1]


@pytest.fixture(scope="module")
def retrieval(width: int) -> Blip2ForImageTextRetrieval:
    return randomized(Blip2ForImageTextRetrieval(blip2_config(width)))


@pytest.fixture(scope="module")
def of_transformers(
    retrieval: Blip2ForImageTextRetrieval, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("blip2")
    retrieval.save_pretrained(folder)
    return folder


def lavis_name(name: str) -> str:
    """The name in LAVIS of a tensor of transformers, as its conversion renames them."""
    name = name.replace("vision_model.post_layernorm.", "ln_vision.")
    name = name.replace("qformer.layernorm.", "Qformer.bert.embeddings.LayerNorm.")
    name = re.sub(r"^qformer\.", "Qformer.bert.", name)
    name = re.sub(r"^embeddings\.", "Qformer.bert.embeddings.", name)
    name = re.sub(r"^vision_projection\.", "vision_proj.", name)
    name = re.sub(r"^text_projection\.", "text_proj.", name)
    name = re.sub(r"^vision_model\.", "visual_encoder.", name)
    return re.sub(r"attention\.attention\.", "attention.self.", name)


def lavis_state(model: torch.nn.Module) -> State:
    """The tensors of the first stage: with texts, their caption head, and copies."""
    state = {lavis_name(name): tensor.clone() for name, tensor in model.state_dict().items()}
    words = state["Qformer.bert.embeddings.word_embeddings.weight"]
    torch.manual_seed(4)
    head = "Qformer.cls.predictions"
    bias = torch.randn(len(words))
    return {
        **state,
        "Qformer.bert.embeddings.position_ids": torch.arange(POSITIONS)[None],
        f"{head}.bias": bias,
        f"{head}.transform.dense.weight": torch.randn(WIDTH, WIDTH),
        f"{head}.transform.dense.bias": torch.randn(WIDTH),
        f"{head}.transform.LayerNorm.weight": torch.randn(WIDTH),
        f"{head}.transform.LayerNorm.bias": torch.randn(WIDTH),
        f"{head}.decoder.weight": words,
        f"{head}.decoder.bias": bias,
        "temp": torch.tensor(0.1),
    }


def second_stage(state: State) -> State:
    """The tensors of the second stage: T5's projection instead of texts."""
    text = re.compile(
        r"Qformer\.cls\.|.*\.(word|position)_embeddings\.|.*\.(intermediate|output)\."
    )
    kept = {
        name: tensor
        for name, tensor in state.items()
        if not (text.match(name) and "attention" not in name)
    }
    for name in ("vision_proj", "text_proj", "itm_head"):
        kept = {key: tensor for key, tensor in kept.items() if not key.startswith(name)}
    return {**kept, "t5_proj.weight": torch.randn(7, WIDTH), "t5_proj.bias": torch.randn(7)}


def lavis_file(path: Path, state: State) -> Path:
    torch.save({"model": state, "config": {"run": {}}, "epoch": 3}, path)
    return path


def imported(parts: Path, output: Path, **changes: Any) -> tuple[STGT, dict[str, Any]]:
    """Import into a model folder; return the model, and the report."""
    values = {
        "vision": str(parts / "eva.pth"),
        "vocab": str(parts / "vocab.txt"),
        "vision_heads": 4,
        "embed_dim": 24,
    }
    run_import(ImportConfig(output=str(output), **{**values, **changes}))
    report = json.loads((output / "import_report.json").read_text())
    return STGT.from_pretrained(output), report


@pytest.mark.slow
@torch.no_grad()
def test_outputs_are_those_of_the_q_former_in_transformers(
    retrieval: Blip2ForImageTextRetrieval,
    of_transformers: Path,
    parts: Path,
    width: int,
    tmp_path: Path,
) -> None:
    model, report = imported(parts, tmp_path / "model", qformer=str(of_transformers))
    ours, theirs = model.qformer, retrieval.qformer
    assert (ours.num_queries, len(ours.bert.encoder.layer)) == (QUERIES, LAYERS)
    torch.manual_seed(5)
    tokens = torch.randn(3, 7, width)
    queries = retrieval.query_tokens.expand(3, -1, -1)
    seen = theirs(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
    torch.testing.assert_close(ours.encode_queries(tokens), seen)
    # Without cross-attention the result would be the same for every video.
    assert (seen[0] - seen[1]).abs().max() > 0.01
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 7, 3, 0, 0], [2, 6, 8, 3, 0]])
    mask = (ids != 0).long()
    text = theirs(
        query_embeds=retrieval.embeddings(ids), query_length=0, attention_mask=mask
    ).last_hidden_state
    real = mask[..., None]
    torch.testing.assert_close(ours.encode_text(ids, mask) * real, text * real)
    joint = theirs(
        query_embeds=retrieval.embeddings(ids, query_embeds=queries),
        query_length=QUERIES,
        attention_mask=torch.cat([torch.ones(3, QUERIES, dtype=torch.long), mask], dim=1),
        encoder_hidden_states=tokens,
    ).last_hidden_state
    torch.testing.assert_close(ours.encode_pairs(tokens, ids, mask), joint[:, :QUERIES])
    norm = retrieval.vision_model.post_layernorm
    torch.testing.assert_close(model.ln_vision.weight, norm.weight)
    torch.testing.assert_close(model.ln_vision.bias, norm.bias)
    own = {name for name in retrieval.state_dict() if name.startswith("vision_model.embeddings.")}
    assert own | {"itm_head.weight", "text_projection.bias"} <= set(report["not_used"])
    assert report["qformer"] == str(of_transformers)
    assert "--bert" in report["neutral"]["qformer (caption head)"]
    assert "qformer.caption_head.bias" in report["initial_values"]
    assert "qformer.query_tokens" not in report["initial_values"]


def test_files_of_lavis_and_of_transformers_give_the_same_q_former(
    retrieval: Blip2ForImageTextRetrieval, of_transformers: Path, parts: Path, tmp_path: Path
) -> None:
    state = lavis_state(retrieval)
    path = lavis_file(tmp_path / "blip2_pretrained.pth", state)
    # LAVIS's file has no config, so the number of heads is given.
    model, report = imported(parts, tmp_path / "lavis", qformer=str(path), qformer_heads=HEADS)
    file = str(of_transformers / "model.safetensors")
    other, _ = imported(parts, tmp_path / "transformers", qformer=file)
    assert model.config.qformer == other.config.qformer
    found = other.state_dict()
    for name, tensor in model.state_dict().items():
        if name.startswith(("qformer.", "ln_vision.")) and "caption_head" not in name:
            assert torch.equal(tensor, found[name]), name
    head = "Qformer.cls.predictions"
    assert torch.equal(model.qformer.caption_head.bias, state[f"{head}.bias"])
    assert torch.equal(
        model.qformer.caption_head.norm.weight, state[f"{head}.transform.LayerNorm.weight"]
    )
    assert {"temp", "itm_head.bias", "vision_proj.weight"} <= set(report["not_used"])
    assert not any(name.startswith(("qformer", "ln_vision")) for name in report["neutral"])
    assert report["constant"] == ["Qformer.bert.embeddings.position_ids"]


def test_bert_fills_what_files_of_the_second_stage_lack(
    retrieval: Blip2ForImageTextRetrieval, parts: Path, tmp_path: Path
) -> None:
    state = second_stage(lavis_state(retrieval))
    path = lavis_file(tmp_path / "blip2_pretrained_flant5xxl.pth", state)
    model, report = imported(parts, tmp_path / "model", qformer=str(path), bert=str(parts / "bert"))
    bert = BertForMaskedLM.from_pretrained(parts / "bert").state_dict()
    ours = model.qformer.state_dict()
    for layer in range(LAYERS):
        name, theirs = f"bert.encoder.layer.{layer}", f"Qformer.bert.encoder.layer.{layer}"
        for part in ("intermediate_query.dense", "output_query.LayerNorm"):
            assert torch.equal(ours[f"{name}.{part}.weight"], state[f"{theirs}.{part}.weight"])
        assert torch.equal(
            ours[f"{name}.attention.attention.key.bias"],
            state[f"{theirs}.attention.self.key.bias"],
        )
        assert torch.equal(ours[f"{name}.output.dense.bias"], bert[f"{name}.output.dense.bias"])
    words = bert["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(ours["word_embeddings.weight"][:-1], words)
    assert torch.equal(ours["query_tokens"], state["query_tokens"])
    left_out = set(report["not_used"])
    assert {"t5_proj.weight", "t5_proj.bias"} <= left_out
    assert not any(name.startswith("Qformer.") for name in left_out)
    for part in ("text embeddings", "text feed-forward layers", "caption head"):
        assert report["neutral"][f"qformer ({part})"] == f"those of {parts / 'bert'}"


def test_without_bert_the_missing_text_parts_are_named(
    retrieval: Blip2ForImageTextRetrieval, parts: Path, tmp_path: Path, caplog: Any
) -> None:
    path = lavis_file(tmp_path / "opt.pth", second_stage(lavis_state(retrieval)))
    _, report = imported(parts, tmp_path / "model", qformer=str(path), qformer_heads=HEADS)
    lacking = {name for name in report["initial_values"] if name.startswith("qformer.")}
    assert lacking == {
        "qformer.word_embeddings.weight",
        "qformer.position_embeddings.weight",
        *(f"qformer.caption_head.{one}" for one in ("bias", "dense.weight", "dense.bias")),
        *(f"qformer.caption_head.norm.{one}" for one in ("weight", "bias")),
        *(
            f"qformer.bert.encoder.layer.{layer}.{part}.{one}"
            for layer in range(LAYERS)
            for part in ("intermediate.dense", "output.dense", "output.LayerNorm")
            for one in ("weight", "bias")
        ),
    }
    assert "qformer (text feed-forward layers) is not in the released files" in caplog.text
    assert "--bert bert-base-uncased starts them from BERT" in caplog.text


def test_divided_models_are_read_without_their_language_model(
    width: int, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomized(Blip2ForConditionalGeneration(blip2_config(width)))
    model.save_pretrained(tmp_path / "blip2", max_shard_size="40KB")
    assert (tmp_path / "blip2" / "model.safetensors.index.json").is_file()
    found, report = imported(
        parts, tmp_path / "model", qformer=str(tmp_path / "blip2"), bert=str(parts / "bert")
    )
    tokens = torch.randn(2, 7, width)
    with torch.no_grad():
        seen = model.qformer(
            query_embeds=model.query_tokens.expand(2, -1, -1), encoder_hidden_states=tokens
        ).last_hidden_state
        torch.testing.assert_close(found.qformer.encode_queries(tokens), seen)
    assert "language_projection.weight" in report["not_used"]
    assert any(name.startswith("language_model.") for name in report["not_used"])


def test_a_bin_file_and_a_file_without_dec_are_read(
    retrieval: Blip2ForImageTextRetrieval, parts: Path, tmp_path: Path
) -> None:
    state = {name: tensor.clone() for name, tensor in retrieval.state_dict().items()}
    words = state["embeddings.word_embeddings.weight"]
    state["embeddings.word_embeddings.weight"] = words[:-1].clone()
    del state["vision_model.post_layernorm.weight"], state["vision_model.post_layernorm.bias"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    path = str(tmp_path / "pytorch_model.bin")
    model, report = imported(parts, tmp_path / "model", qformer=path, qformer_heads=HEADS)
    assert torch.equal(model.qformer.word_embeddings.weight[:-1], words[:-1])
    assert model.qformer.word_embeddings.weight[-1].abs().sum() > 0
    assert "the row of [DEC] in qformer.word_embeddings.weight" in report["neutral"]
    assert report["neutral"]["ln_vision"] == "initial values, ones and zeros"
    assert torch.equal(model.ln_vision.weight, torch.ones_like(model.ln_vision.weight))


def test_divided_bin_files_are_read(
    retrieval: Blip2ForImageTextRetrieval, parts: Path, width: int, tmp_path: Path
) -> None:
    folder = tmp_path / "blip2"
    folder.mkdir()
    names = sorted(retrieval.state_dict())
    weight_map = {
        name: f"pytorch_model-0000{number % 2 + 1}-of-00002.bin"
        for number, name in enumerate(names)
    }
    for file in set(weight_map.values()):
        state = retrieval.state_dict()
        kept = {name: state[name].half() for name in names if weight_map[name] == file}
        torch.save(kept, folder / file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(blip2_config(width).to_json_string())
    model, _ = imported(parts, tmp_path / "model", qformer=str(folder))
    assert model.config.qformer.heads == HEADS
    key = "encoder.layer.2.crossattention.attention.key.weight"
    found, wanted = model.qformer.bert.state_dict()[key], retrieval.qformer.state_dict()[key]
    assert torch.equal(found, wanted.half().float())


LAYER = "Qformer.bert.encoder.layer"


@pytest.mark.parametrize(
    "name",
    [
        "query_tokens",
        "ln_vision.bias",
        "Qformer.bert.embeddings.LayerNorm.weight",
        "Qformer.bert.embeddings.position_embeddings.weight",
        "Qformer.cls.predictions.transform.dense.bias",
        f"{LAYER}.0.intermediate_query.dense.weight",
        f"{LAYER}.1.intermediate.dense.weight",
        f"{LAYER}.1.attention.self.value.bias",
        f"{LAYER}.2.crossattention.self.key.weight",
        f"{LAYER}.3.output_query.LayerNorm.bias",
    ],
)
def test_a_missing_tensor_is_refused_by_its_name(
    retrieval: Blip2ForImageTextRetrieval, parts: Path, tmp_path: Path, name: str
) -> None:
    state = lavis_state(retrieval)
    del state[name]
    path = lavis_file(tmp_path / "cut.pth", state)
    with pytest.raises(CheckpointMismatchError) as refused:
        imported(parts, tmp_path / "model", qformer=str(path), qformer_heads=HEADS)
    assert refused.value.missing == [name]
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("query_tokens", (QUERIES, WIDTH)),
        ("ln_vision.weight", (3,)),
        (f"{LAYER}.0.crossattention.self.key.weight", (WIDTH, 5)),
        (f"{LAYER}.2.attention.output.dense.bias", (WIDTH + 1,)),
        ("Qformer.cls.predictions.transform.dense.weight", (WIDTH, 1)),
    ],
)
def test_a_wrong_shape_is_refused_by_its_name(
    retrieval: Blip2ForImageTextRetrieval,
    parts: Path,
    tmp_path: Path,
    name: str,
    shape: tuple[int, ...],
) -> None:
    path = lavis_file(tmp_path / "odd.pth", lavis_state(retrieval) | {name: torch.zeros(shape)})
    with pytest.raises(CheckpointMismatchError) as refused:
        imported(parts, tmp_path / "model", qformer=str(path), qformer_heads=HEADS)
    [found] = refused.value.unexpected
    assert found.startswith(f"{name} {list(shape)}")


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("evil",)


def test_what_is_not_a_q_former_is_refused(
    retrieval: Blip2ForImageTextRetrieval,
    of_transformers: Path,
    parts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    state = lavis_state(retrieval)

    def refused(match: str, qformer: Path, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            imported(parts, tmp_path / "model", qformer=str(qformer), **changes)
        assert not (tmp_path / "model").exists()

    refused("does not exist; pass LAVIS's .pth file", tmp_path / "none.pth")
    torch.save({"model": state, "scheduler": Evil()}, tmp_path / "evil.pth")
    refused("could run code", tmp_path / "evil.pth")
    assert not (tmp_path / "evil").exists()
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 9)
    refused("is damaged or truncated", tmp_path / "cut.safetensors")
    save_file({"layer.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    refused("contains no Q-Former", tmp_path / "other.safetensors")
    refused(r"contains no model\.safetensors", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"query_tokens": "../other.safetensors"}})
    )
    refused("refers to files outside of its folder", tmp_path)
    extra = lavis_file(tmp_path / "extra.pth", state | {"Qformer.bert.pooler.bias": torch.zeros(2)})
    refused(r"unexpected \['Qformer\.bert\.pooler\.bias", extra, qformer_heads=HEADS)
    untied = state | {"Qformer.cls.predictions.decoder.bias": torch.zeros(len(WORDS) + 1)}
    refused("differs from", lavis_file(tmp_path / "untied.pth", untied))
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "blue", "green"]) + "\n")
    refused(
        r"word_embeddings\.weight of .* has 9 words, but the vocabulary has 11",
        of_transformers,
        vocab=str(tmp_path / "vocab.txt"),
    )
    # Another BERT than the one that the Q-Former was made from: it has other numbers of heads.
    config = json.loads((of_transformers / "config.json").read_text())
    assert config["qformer_config"]["num_attention_heads"] == HEADS
    narrow = BertForMaskedLM(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=96,
            max_position_embeddings=POSITIONS,
            pad_token_id=0,
        )
    )
    narrow.save_pretrained(tmp_path / "narrow")
    refused(
        r"has width 24, but the Q-Former in .* has 48",
        of_transformers,
        bert=str(tmp_path / "narrow"),
    )
    with pytest.raises(ValueError, match="omit checkpoint"):
        ImportConfig(output="out", checkpoint="stgt.pth", qformer="blip2.pth")


def test_bert_beside_a_whole_q_former_is_said_to_be_unused(
    retrieval: Blip2ForImageTextRetrieval, parts: Path, tmp_path: Path, caplog: Any
) -> None:
    path = lavis_file(tmp_path / "blip2_pretrained.pth", lavis_state(retrieval))
    imported(parts, tmp_path / "model", qformer=str(path), bert=str(parts / "bert"))
    assert "nothing is taken from BERT" in caplog.text


@pytest.fixture
def full_size(reference_dir: Path) -> State:
    """The names and shapes of a full Q-Former, with zeros that take no memory."""
    listing = json.loads((reference_dir / "released_checkpoints.json").read_text())
    return {
        name: torch.zeros(1).expand(shape)
        for name, shape in listing["released_checkpoint"].items()
        if name.startswith(("query_tokens", "Qformer.bert.encoder", "Qformer.bert.embeddings.L"))
    }


def test_the_full_q_former_has_the_published_sizes_and_lacks_no_layer(
    full_size: State, tmp_path: Path
) -> None:
    path = lavis_file(tmp_path / "full.pth", full_size)
    (tmp_path / "config.json").write_text("[]")  # of something else; LAVIS's files have none
    found = read_qformer(path, None, ImportReport("none", None))
    assert found.sizes == QFormerConfig()
    assert found.sizes == stgt_g().qformer
    cut = {name: tensor for name, tensor in full_size.items() if f"{LAYER}.11." not in name}
    found = read_qformer(lavis_file(path, cut), None, ImportReport("none", None))
    with torch.device("meta"):
        own = QFormer(stgt_g()).state_dict()
    with pytest.raises(CheckpointMismatchError) as refused:
        found.fitted_to(
            {f"qformer.{name}": tensor for name, tensor in own.items()},
            stgt_g().vocab_size,
            ImportReport("none", None),
        )
    assert f"{LAYER}.11.attention.self.query.weight" in refused.value.missing
    assert all(name.startswith(f"{LAYER}.11.") for name in refused.value.missing)


def test_errors_of_reading_are_checkpoint_errors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[")
    save_file(
        {"qformer.layernorm.bias": torch.zeros(2), "query_tokens": torch.zeros(1, 2, 2)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"config\.json is not a config of transformers"):
        read_qformer(tmp_path, None, ImportReport("none", None))
