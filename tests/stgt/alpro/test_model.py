"""ALPRO's model computes what its parts promise, and a tiny one learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stgt.alpro.config import AlproConfig, FusionBertSizes, TimeSformerSizes, alpro_tiny
from stgt.alpro.model import LEAST_TEMPERATURE, MOST_TEMPERATURE, Alpro
from stgt.config import LabelSmoothing
from stgt.errors import SettingError
from stgt.inputs.tokenizer import TextTokens
from stgt.training.footprint import training_footprint
from stgt.training.objective import TrainingObjective, total_loss

WORDS = 40


def small(**changes) -> AlproConfig:
    return replace(alpro_tiny(WORDS), **changes)


@pytest.fixture
def model() -> Alpro:
    torch.manual_seed(0)
    return Alpro(small()).eval()


def some_frames(model: Alpro, count: int, num_frames: int | None = None) -> torch.Tensor:
    size = model.config.vision.image_size
    frames = num_frames or model.config.num_frames
    generator = torch.Generator().manual_seed(1)
    return torch.randint(
        0, 256, (count, frames, size, size, 3), dtype=torch.uint8, generator=generator
    )


def some_texts(lengths: list[int], width: int = 12) -> TextTokens:
    generator = torch.Generator().manual_seed(2)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, WORDS, (len(lengths), width), generator=generator) * mask
    return TextTokens(ids, mask)


@torch.no_grad()
def test_padding_changes_neither_embeddings_nor_matches(model: Alpro) -> None:
    tokens = model.video_tokens(some_frames(model, 2))
    text = some_texts([4, 7])
    longer = some_texts([4, 7], width=12)
    shorter = TextTokens(longer.input_ids[:, :7], longer.attention_mask[:, :7])
    torch.testing.assert_close(model.encode_text(text), model.encode_text(shorter))
    torch.testing.assert_close(model.match(tokens, text), model.match(tokens, shorter))


@torch.no_grad()
def test_embeddings_have_unit_length_and_one_row_per_clip(model: Alpro) -> None:
    encoding = model.encode_video(some_frames(model, 3))
    texts = model.encode_text(some_texts([3, 5]))
    grid = model.config.vision.grid
    assert encoding.tokens.shape == (3, 1 + grid**2, model.config.vision.width)
    assert encoding.embeds.shape == (3, 1, model.config.embed_dim)
    for embeds in (encoding.embeds, texts):
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(embeds.shape[:-1]))


@torch.no_grad()
def test_the_order_of_frames_matters_and_that_of_clips_does_not(model: Alpro) -> None:
    frames = some_frames(model, 3)
    tokens = model.video_tokens(frames)
    torch.testing.assert_close(model.video_tokens(frames[[2, 0, 1]]), tokens[[2, 0, 1]])
    assert (model.video_tokens(frames.flip(1)) - tokens).abs().max() > 1e-3


@torch.no_grad()
def test_fewer_frames_take_the_nearest_time_embeddings(model: Alpro) -> None:
    """A model whose time table was cut to the nearest entries gives the same tokens."""
    frames = some_frames(model, 2, num_frames=3)
    tokens = model.video_tokens(frames)
    torch.manual_seed(0)
    cut = Alpro(small(num_frames=3)).eval()
    state = dict(model.state_dict())
    name = "video_encoder.embeddings.time_embeddings"
    state[name] = state[name][:, [0, 2, 4]]  # of six
    cut.load_state_dict(state)
    torch.testing.assert_close(cut.video_tokens(frames), tokens)
    # A whole clip afterwards is encoded as before.
    whole = some_frames(model, 1)
    other = Alpro(small()).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.video_tokens(whole), other.video_tokens(whole))


@torch.no_grad()
def test_pairs_are_scored_as_one_by_one(model: Alpro) -> None:
    tokens = model.video_tokens(some_frames(model, 3))
    text = some_texts([2, 9, 5, 12])
    videos = torch.tensor([0, 2, 1, 1, 0, 2, 2])
    texts = torch.tensor([3, 0, 1, 2, 2, 1, 3])
    wanted = torch.cat(
        [
            model.match(tokens[[video]], text.select(torch.tensor([row])))
            for video, row in zip(videos.tolist(), texts.tolist(), strict=True)
        ]
    )
    scorer = model.pair_scorer(tokens)
    torch.testing.assert_close(scorer(videos, texts, text, 3), wanted, rtol=1e-5, atol=1e-5)
    assert scorer(videos[:0], texts[:0], text, 3).shape == (0, 2)


def test_a_scorer_refuses_a_model_in_training(model: Alpro) -> None:
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        model.train().pair_scorer(torch.zeros(1, 17, model.config.vision.width))


@pytest.mark.parametrize(
    ("value", "wanted"), [(5.0, MOST_TEMPERATURE), (-1.0, LEAST_TEMPERATURE), (0.2, 0.2)]
)
def test_the_temperature_is_kept_in_its_range_in_training(
    model: Alpro, value: float, wanted: float
) -> None:
    with torch.no_grad():
        model.temperature.fill_(value)
    model.train()
    tokens = model.video_tokens(some_frames(model, 2))
    model.embed(tokens, some_texts([3, 4]))
    assert model.temperature.item() == pytest.approx(wanted)


def test_checkpointed_activations_give_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = Alpro(small(gradient_checkpointing=checkpointing)).train()
        tokens = model.video_tokens(some_frames(model, 2))
        model.match(tokens, some_texts([3, 4])).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_passes_over_parts_of_the_batch_give_the_gradients_of_the_whole() -> None:
    frames = texts = None
    found = []
    for micro_batch in (None, 2):
        torch.manual_seed(0)
        model = Alpro(small()).train()
        frames = some_frames(model, 5)
        texts = some_texts([3, 4, 6, 8, 5])
        objective = TrainingObjective(model, "hard")
        positions = torch.arange(5)
        if micro_batch is None:
            losses = objective(frames, texts, positions, draw_seed=3)
            total_loss(losses).backward()
        else:
            losses = objective.accumulate(
                frames, texts, positions, draw_seed=3, micro_batch=micro_batch, seed=0
            )
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((losses, gradients))
    (whole, gradients), (parts, others) = found
    for name, loss in whole.items():
        torch.testing.assert_close(parts[name], loss.detach())
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_every_parameter_is_trained_by_the_objective(model: Alpro) -> None:
    """DistributedDataParallel would wait for a parameter without a gradient."""
    model.train()
    losses = TrainingObjective(model, "hard")(
        some_frames(model, 3), some_texts([3, 4, 6]), torch.arange(3), draw_seed=0
    )
    total_loss(losses).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.slow
def test_a_tiny_model_tells_clips_apart_that_differ_in_order() -> None:
    """Two captions say whether a bright frame comes first or last; average frames are equal."""
    torch.manual_seed(0)
    model = Alpro(small(num_frames=2, vision=replace(small().vision, image_size=32))).train()
    dark = torch.zeros(32, 32, 3, dtype=torch.uint8)
    bright = torch.full((32, 32, 3), 255, dtype=torch.uint8)
    frames = torch.stack([torch.stack([dark, bright]), torch.stack([bright, dark])])
    text = TextTokens(torch.tensor([[1, 2, 3], [1, 4, 3]]), torch.ones(2, 3, dtype=torch.int64))
    objective = TrainingObjective(model, "hard", label_smoothing=LabelSmoothing(contrastive=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for step in range(40):
        losses = objective(frames, text, torch.arange(2), draw_seed=step)
        optimizer.zero_grad()
        total_loss(losses).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        similarity = model.encode_video(frames).similarity(model.encode_text(text))
        matched = model.match(model.video_tokens(frames), text).softmax(dim=1)[:, 1]
        crossed = model.match(model.video_tokens(frames.flip(0)), text).softmax(dim=1)[:, 1]
    assert similarity.argmax(dim=1).tolist() == [0, 1]
    assert (matched > 0.5).all()
    assert (crossed < 0.5).all()


@pytest.mark.slow
def test_memory_and_arithmetic_of_a_step_are_estimated_without_weights() -> None:
    config = small(vision=replace(small().vision, drop_path=0.1))
    whole, half = (training_footprint(config, "fp32", clips, 6, "hard") for clips in (4, 2))
    assert whole.parameters == whole.trained == Alpro(config).count_parameters().total
    assert whole.flops == pytest.approx(2 * half.flops, rel=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TimeSformerSizes(image_size=100), "must be a multiple of vision.patch_size"),
        (lambda: FusionBertSizes(fusion_layer=12), "text.fusion_layer = 12"),
        (lambda: AlproConfig(text=FusionBertSizes(heads=7)), "text.heads = 7"),
        (lambda: AlproConfig(max_text_tokens=513), "must be between 2 and text.max_position"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make()


def test_clips_of_the_wrong_form_are_refused(model: Alpro) -> None:
    with pytest.raises(ValueError, match="the model takes 1 to 6"):
        model.encode_video(some_frames(model, 1, num_frames=7))
    tokens = torch.zeros(2, 17, model.config.vision.width)
    with pytest.raises(ValueError, match="got 2 videos and 3 texts"):
        model.match(tokens, some_texts([3, 4, 5]))
    with pytest.raises(ValueError, match="the vocabulary has 40 entries"):
        model.encode_text(TextTokens(torch.tensor([[41]]), torch.tensor([[1]])))


def test_a_config_survives_its_dict() -> None:
    config = small(num_answers=5)
    assert AlproConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["kind"] == "alpro"
