"""What every kind of model must do: the contract in stgt/interface/README.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stgt.inputs.tokenizer import TextTokens
from stgt.inputs.transforms import normalize_frames
from stgt.interface.kinds import KINDS, config_from_dict
from stgt.interface.model import VideoTextModel
from stgt.model_folder import load_model, save_model
from stgt.training.objective import TrainingObjective, total_loss
from tests.helpers.models import CONFIGS, small_model, small_tokenizer

TEXTS = ["a red ball moves left", "a blue square stops", "a ball moves right then stops"]
EXACT = {"rtol": 0.0, "atol": 1e-6}


def clips(model: VideoTextModel, count: int = 3, seed: int = 1) -> torch.Tensor:
    """[count, T, H, W, 3] uint8 frames of noise, as large as the model takes them."""
    inputs = model.config.inputs
    shape = (count, inputs.num_frames, inputs.image_size, inputs.image_size, 3)
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture(params=sorted(KINDS))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> VideoTextModel:
    return small_model(request.param, tmp_path)


def test_every_kind_has_a_small_model() -> None:
    assert CONFIGS.keys() == KINDS.keys()


@torch.no_grad()
def test_shapes_and_lengths_of_embeddings(model: VideoTextModel) -> None:
    encoded, texts = model.encode_video(clips(model)), model.encode_text(TEXTS)
    queries, width = model.embedding_shape
    assert encoded.embeds.shape == (3, queries, width)
    assert encoded.tokens.ndim == 3
    assert len(encoded.tokens) == 3
    assert texts.shape == (3, width)
    for one in (encoded.embeds, texts):
        torch.testing.assert_close(one.norm(dim=-1), torch.ones(one.shape[:-1]))
    assert encoded.similarity(texts).shape == (3, 3)
    assert model.temperature.shape == ()
    assert model.temperature > 0


@torch.no_grad()
def test_frames_are_normalized_as_the_model_states(model: VideoTextModel) -> None:
    inputs = model.config.inputs
    frames = clips(model)
    normalized = normalize_frames(frames, inputs.mean, inputs.std)
    torch.testing.assert_close(
        model.encode_video(frames).embeds, model.encode_video(normalized).embeds
    )
    other = normalize_frames(frames, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert not torch.allclose(
        model.encode_video(frames).embeds, model.encode_video(other).embeds, atol=1e-4
    )


@torch.no_grad()
def test_clips_and_texts_of_a_batch_do_not_affect_each_other(model: VideoTextModel) -> None:
    frames = clips(model)
    together, texts = model.encode_video(frames).embeds, model.encode_text(TEXTS)
    for number in range(3):
        one = slice(number, number + 1)
        torch.testing.assert_close(model.encode_video(frames[one]).embeds, together[one], **EXACT)
        torch.testing.assert_close(model.encode_text(TEXTS[one]), texts[one], **EXACT)


@torch.no_grad()
def test_padding_does_not_change_a_text(model: VideoTextModel) -> None:
    most = model.config.inputs.most_text_tokens
    short = model.tokenizer(TEXTS, 10)
    padded = model.tokenizer(TEXTS, min(16, most))
    assert padded.input_ids.shape[1] > short.input_ids.shape[1]
    torch.testing.assert_close(model.encode_text(short), model.encode_text(padded), **EXACT)


@torch.no_grad()
def test_training_and_evaluation_embed_alike(model: VideoTextModel) -> None:
    frames, text = clips(model), model.tokenizer(TEXTS, 12)
    tokens = model.relate_frames(model.encode_frames(frames))
    torch.testing.assert_close(model.video_tokens(frames), tokens)
    embedded = model.embed(tokens, text)
    torch.testing.assert_close(embedded.videos, model.encode_video(frames).embeds)
    torch.testing.assert_close(embedded.texts, model.encode_text(text))


@torch.no_grad()
def test_pairs_are_scored_alike_one_by_one_and_many_at_a_time(model: VideoTextModel) -> None:
    tokens, text = model.video_tokens(clips(model)), model.tokenizer(TEXTS, 12)
    if not model.matches:
        with pytest.raises(NotImplementedError, match="does not match pairs"):
            model.match(tokens, text)
        with pytest.raises(NotImplementedError, match="does not match pairs"):
            model.pair_scorer(tokens)
        return
    videos, texts = torch.tensor([0, 2, 1, 0]), torch.tensor([1, 0, 2, 0])
    expected = model.match(tokens[videos], text.select(texts))
    assert expected.shape == (4, 2)
    found = model.pair_scorer(tokens)(videos, texts, text, 2)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)


def gradients(model: VideoTextModel, micro_batch: int | None) -> dict[str, torch.Tensor]:
    """Gradients and losses of one batch, in one pass or accumulated."""
    model.train()
    model.zero_grad()
    objective = TrainingObjective(model, "hard")
    batch = (clips(model), model.tokenizer(TEXTS, 12), torch.arange(3), 7)
    if micro_batch is None:
        losses = objective(*batch)
        total_loss(losses).backward()
    else:
        losses = objective.accumulate(*batch, micro_batch=micro_batch, seed=0)
    found = {f"loss/{name}": loss.detach().clone() for name, loss in losses.items()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
    return found


def test_losses_and_accumulated_gradients(model: VideoTextModel) -> None:
    whole = gradients(model, None)
    names = {"loss/itc"} | ({"loss/itm"} if model.matches else set())
    assert names <= {name for name in whole if name.startswith("loss/")}
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    used = {name for name, value in whole.items() if name in trained and value.abs().sum() > 0}
    assert len(used) > 0.8 * len(trained), "most parameters must take part"
    assert model.config.accumulates
    passes = gradients(model, 2)
    assert passes.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(passes[name], value, rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_a_saved_folder_loads_to_the_same_numbers(model: VideoTextModel, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save_model(model, folder, with_frozen=True)
    loaded = load_model(folder).eval()
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert loaded.tokenizer.entries() == model.tokenizer.entries()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    frames = clips(model)
    torch.testing.assert_close(
        loaded.encode_video(frames).embeds, model.encode_video(frames).embeds, rtol=0, atol=0
    )
    torch.testing.assert_close(loaded.encode_text(TEXTS), model.encode_text(TEXTS), rtol=0, atol=0)


def test_a_config_survives_json(model: VideoTextModel, tmp_path: Path) -> None:
    config = model.config
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.title
    assert config.tokenizer_problem(small_tokenizer(tmp_path)) is None


@torch.no_grad()
def test_malformed_input_gets_one_clear_sentence(model: VideoTextModel) -> None:
    frames = clips(model)
    with pytest.raises(ValueError, match=r"frames: expected uint8 \[B, T, "):
        model.encode_video(frames[..., :2])
    with pytest.raises(ValueError, match="frames: the batch is empty"):
        model.encode_video(frames[:0])
    with pytest.raises(ValueError, match="normalized float or uint8"):
        model.encode_video(normalize_frames(frames).long())
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="input_ids range from"):
        model.encode_text(TextTokens(ids + 10**6, torch.ones_like(ids)))
    with pytest.raises(ValueError, match="expected int64 input_ids"):
        model.encode_text(TextTokens(ids.float(), torch.ones_like(ids)))
    longer = torch.zeros(1, model.config.inputs.most_text_tokens + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="positions for only"):
        model.encode_text(TextTokens(longer, torch.ones_like(longer)))
