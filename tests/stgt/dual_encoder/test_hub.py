"""Dual encoders are read from folders of the hub, and embed as transformers does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from stgt.dual_encoder import hub
from stgt.dual_encoder.config import DualEncoderConfig
from stgt.errors import CheckpointError, CheckpointMismatchError, SettingError
from stgt.inputs.tokenizer import Tokenizer
from stgt.interface.kinds import hub_module
from stgt.model_folder import load_model, save_model
from tests.helpers.hub_models import FOLDERS, POSITIONS, SENTENCES, SIZE, change_json, clip_folder

CLOSE = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture(params=sorted(FOLDERS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return FOLDERS[request.param](tmp_path / request.param)


def frames(clips: int = 2, count: int = 3) -> torch.Tensor:
    shape = (clips, count, SIZE, SIZE, 3)
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )


@torch.no_grad()
def test_embeddings_equal_those_of_transformers(folder: Path) -> None:
    ours = hub.load(folder)
    theirs = AutoModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    clips = frames()
    pixels = processor(
        images=list(clips.flatten(0, 1).permute(0, 3, 1, 2)), return_tensors="pt"
    ).pixel_values
    of_frames = theirs.get_image_features(pixel_values=pixels).pooler_output.unflatten(0, (2, 3))
    found = ours.encode_video(clips)
    torch.testing.assert_close(found.tokens, of_frames, **CLOSE)
    # CLIP4Clip: the mean of normalized frames, normalized again.
    mean = F.normalize(F.normalize(of_frames, dim=-1).mean(dim=1), dim=-1)
    torch.testing.assert_close(found.embeds[:, 0], mean, **CLOSE)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(
        list(SENTENCES), padding="max_length", truncation=True, max_length=POSITIONS,
        return_tensors="pt",
    )  # fmt: skip
    wanted = {"input_ids": inputs["input_ids"]}
    if theirs.config.model_type == "clip":
        wanted["attention_mask"] = inputs["attention_mask"]
    texts = F.normalize(theirs.get_text_features(**wanted).pooler_output, dim=-1)
    torch.testing.assert_close(ours.encode_text(list(SENTENCES)), texts, **CLOSE)
    torch.testing.assert_close(ours.temperature, (-theirs.logit_scale).exp().reshape(()), **CLOSE)


@torch.no_grad()
def test_inputs_are_taken_from_the_files(folder: Path) -> None:
    model = hub.load(folder)
    inputs = model.config.inputs
    assert (inputs.image_size, inputs.max_text_tokens) == (SIZE, POSITIONS)
    processor = AutoImageProcessor.from_pretrained(folder)
    assert list(inputs.mean) == pytest.approx(list(processor.image_mean))
    assert list(inputs.std) == pytest.approx(list(processor.image_std))
    assert hub_module(model.config.hub["model_type"]) is hub


@torch.no_grad()
def test_our_folder_of_a_model_of_the_hub_gives_the_same_embeddings(
    folder: Path, tmp_path: Path
) -> None:
    model = hub.load(folder)
    save_model(model, tmp_path / "ours")
    loaded = load_model(tmp_path / "ours").eval()
    assert loaded.config == model.config
    torch.testing.assert_close(
        loaded.encode_text(list(SENTENCES)), model.encode_text(list(SENTENCES)), rtol=0, atol=0
    )
    torch.testing.assert_close(
        loaded.encode_video(frames()).embeds, model.encode_video(frames()).embeds, rtol=0, atol=0
    )


def test_settings_of_the_image_processor_may_be_in_the_file_of_the_processor(
    folder: Path,
) -> None:
    before = hub.read_config(folder)
    settings = json.loads((folder / hub.PREPROCESSOR).read_text())
    (folder / hub.PREPROCESSOR).unlink()
    (folder / hub.PROCESSOR).write_text(json.dumps({"image_processor": settings}))
    assert hub.read_config(folder) == before
    assert before.resize == ("crop" if "clip" in folder.name else "squash")


@pytest.mark.parametrize(
    "changes",
    [
        {"image_mean": None},
        {"image_mean": [0.5]},
        {"image_std": [0.5, 0.0, 0.5]},
        {"do_normalize": False},
    ],
    ids=str,
)
def test_wrong_settings_of_the_image_processor_are_refused(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    folder = clip_folder(tmp_path)
    change_json(folder / hub.PREPROCESSOR, **changes)
    with pytest.raises(CheckpointError, match="image processor"):
        hub.read_config(folder)


def test_wrong_configs_are_refused(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path)
    change_json(folder / "config.json", text_config=5)
    with pytest.raises(CheckpointError, match="is not a valid config of clip"):
        hub.read_config(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        hub.read_config(folder)


def test_captions_of_siglip_2_are_lower_cased(tmp_path: Path) -> None:
    tokenizer = hub.read_tokenizer(FOLDERS["siglip2"](tmp_path))
    upper, lower = tokenizer.encode(["A Red BALL", "a red ball"], POSITIONS)[0]
    assert upper.tolist() == lower.tolist()


def test_missing_files_are_named(folder: Path) -> None:
    for name in (hub.PREPROCESSOR, hub.WEIGHTS, "tokenizer_config.json"):
        path = folder / name
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(CheckpointError, match=name.partition(".")[0]):
            hub.load(folder)
        path.write_bytes(content)
    hub.load(folder)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path)
    torch.save(load_file(folder / hub.WEIGHTS), folder / "pytorch_model.bin")
    (folder / hub.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"pickled weights only.*save_pretrained"):
        hub.load(folder)


def test_tensors_are_compared_strictly(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path)
    tensors = load_file(folder / hub.WEIGHTS)
    positions = torch.arange(POSITIONS)[None]
    save_file({**tensors, "text_model.embeddings.position_ids": positions}, folder / hub.WEIGHTS)
    hub.load(folder)  # earlier versions of transformers wrote this table
    lost = tensors.pop("visual_projection.weight")
    save_file({**tensors, "visual_projection.other": lost}, folder / hub.WEIGHTS)
    with pytest.raises(CheckpointMismatchError) as error:
        hub.load(folder)
    assert error.value.missing == ["visual_projection.weight"]
    assert error.value.unexpected == ["visual_projection.other"]
    (folder / hub.WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        hub.load(folder)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip")
    config = hub.read_config(folder)
    words = tmp_path / "vocab.txt"
    words.write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a")) + "\n")
    with pytest.raises(SettingError, match="give the tokenizer of the model"):
        config.for_tokenizer(Tokenizer(words))
    text = config.hub["text_config"]
    change_json(folder / "config.json", text_config={**text, "vocab_size": 20})
    with pytest.raises(CheckpointError, match=r"its tokenizer has \d+ entries, but the model has"):
        hub.read_tokenizer(folder)
    # In configs of earlier versions, 2 stands for the largest id, which then ends a text.
    change_json(folder / "config.json", text_config={**text, "eos_token_id": 2})
    hub.read_tokenizer(folder)
    larger = {**text, "eos_token_id": 2, "vocab_size": text["vocab_size"] + 1}
    change_json(folder / "config.json", text_config=larger)
    with pytest.raises(CheckpointError, match="ends texts with the id"):
        hub.read_tokenizer(folder)
    siglip = FOLDERS["siglip"](tmp_path / "siglip")
    found = hub.read_config(siglip).hub["text_config"]
    larger = {**found, "vocab_size": found["vocab_size"] + 1}
    change_json(siglip / "config.json", text_config=larger)
    with pytest.raises(CheckpointError, match=r"its tokenizer has \d+ entries, but the model has"):
        hub.read_tokenizer(siglip)


def test_text_lengths_are_those_of_the_model(tmp_path: Path) -> None:
    clip = hub.load(FOLDERS["clip"](tmp_path / "clip"))
    assert clip.encode_text(clip.tokenizer(list(SENTENCES), 8)).shape == (4, 24)
    with pytest.raises(SettingError, match=f"must be between 2 and {POSITIONS}"):
        DualEncoderConfig(most_text_tokens=POSITIONS, max_text_tokens=POSITIONS + 1)
    siglip = hub.load(FOLDERS["siglip"](tmp_path / "siglip"))
    with pytest.raises(ValueError, match=f"takes texts padded to {POSITIONS}"):
        siglip.encode_text(siglip.tokenizer(list(SENTENCES), 8))
    with pytest.raises(SettingError, match="takes no other length"):
        DualEncoderConfig(most_text_tokens=POSITIONS, max_text_tokens=8, pads_fully=True)


def test_frames_of_another_size_than_the_weights_are_refused(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path)
    change_json(folder / hub.PREPROCESSOR, crop_size={"height": 64, "width": 64})
    with pytest.raises(CheckpointError, match="frames of 64 pixels"):
        hub.read_config(folder)
