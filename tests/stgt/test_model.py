"""Tests of the model's public interface: invariances, inputs, captions, saving and precision."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.video.synthetic import scenes
from stgt import STGT, ModelConfig, stgt_g, stgt_tiny
from stgt.errors import CheckpointError, CheckpointMismatchError
from stgt.inputs.tokenizer import TextTokens, Tokenizer
from stgt.model_folder import FROZEN_FILE, WEIGHTS_FILE, load_model, load_weights, save_model
from stgt.network.captioning import next_word_logits, query_keys_values, write_captions
from stgt.network.similarity import video_text_similarity
from stgt.precision import autocast, keep_frozen_weights_in
from stgt.retrieval.pair_scorer import PairScorer
from stgt.training.objective import TrainingObjective, total_loss
from stgt.training.optimizer import build_optimizer

CAPTIONS = [
    "a red circle moves left",
    "a blue square moves up then grows",
    "green",
    "a yellow triangle on gray",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(scenes.vocabulary()) + "\n")
    return Tokenizer(path)


def config_for(tokenizer: Tokenizer, **changes: object) -> ModelConfig:
    tiny = stgt_tiny().for_vocabulary(tokenizer.bos_id, len(tokenizer), tokenizer.pad_id)
    return replace(tiny, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> STGT:
    torch.manual_seed(0)
    return STGT(config_for(tokenizer), tokenizer).eval()


def clips(count: int = 4, frames: int = 6, seed: int = 0) -> torch.Tensor:
    """[count, frames, 64, 64, 3] uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, frames, 64, 64, 3), generator=generator).to(torch.uint8)


# Invariances


@torch.no_grad()
def test_permuting_clips_permutes_results(model: STGT) -> None:
    order = torch.tensor([2, 0, 3, 1])
    straight, permuted = model.encode_video(clips()), model.encode_video(clips()[order])
    torch.testing.assert_close(permuted.embeds, straight.embeds[order])
    torch.testing.assert_close(permuted.tokens, straight.tokens[order])
    texts = [CAPTIONS[i] for i in order]
    torch.testing.assert_close(model.encode_text(texts), model.encode_text(CAPTIONS)[order])
    torch.testing.assert_close(model.match(permuted, texts), model.match(straight, CAPTIONS)[order])


@torch.no_grad()
def test_one_frame_is_an_image(model: STGT) -> None:
    video = model.encode_video(clips(frames=1))
    tokens_per_frame = 1 + model.config.vision.grid**2
    assert video.tokens.shape == (4, tokens_per_frame, model.config.vision.width)
    assert model.match(video, CAPTIONS).shape == (4, 2)


@torch.no_grad()
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_full(model: STGT, precision: str) -> None:
    full = model.encode_video(clips())
    text = model.encode_text(CAPTIONS)
    probability = model.match(full, CAPTIONS).softmax(dim=1)
    with autocast(precision, torch.device("cpu")):  # type: ignore[arg-type]
        half = model.encode_video(clips())
        assert (half.embeds.float() - full.embeds).abs().max() <= 2e-2
        assert (model.encode_text(CAPTIONS).float() - text).abs().max() <= 2e-2
        near = model.match(half, CAPTIONS).float().softmax(dim=1)
        assert (near - probability).abs().max() <= 2e-2


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="fp8"):
        autocast("fp8", torch.device("cpu"))  # type: ignore[arg-type]


# Matching and captions that share computation between pairs


@torch.no_grad()
def test_shared_pair_scores_are_those_of_match(model: STGT) -> None:
    video = model.encode_video(clips())
    text = model.tokenize(CAPTIONS)
    videos, texts = torch.tensor([0, 3, 1, 0, 2]), torch.tensor([2, 0, 1, 3, 3])
    logits = PairScorer(model, video.tokens)(videos, texts, text, batch_pairs=2)
    wanted = model.match(video.tokens[videos], text.select(texts))
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_shared_pair_scores_do_not_depend_on_the_side_of_the_padding(model: STGT) -> None:
    video = model.encode_video(clips())
    text = model.tokenize(CAPTIONS)
    left = TextTokens(text.input_ids.flip(1), text.attention_mask.flip(1))
    pairs = torch.arange(4)
    logits = PairScorer(model, video.tokens)(pairs, pairs, left)
    torch.testing.assert_close(logits, model.match(video, left), rtol=0, atol=1e-5)
    assert PairScorer(model, video.tokens)(pairs[:0], pairs[:0], text).shape == (0, 2)


def test_shared_pair_scores_need_eval_mode(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="eval"):
        PairScorer(STGT(config_for(tokenizer)), torch.zeros(1, 4, 96))


@torch.no_grad()
def test_writing_word_by_word_follows_the_caption_logits(model: STGT) -> None:
    video = model.encode_video(clips(2))
    text = model.tokenize(["a red circle moves left", "a blue square moves up"])
    _, logits = model.caption_logits(video.tokens, text)
    queries = query_keys_values(model.qformer, video.tokens)
    ids = text.input_ids.clone()
    ids[:, 0] = model.config.bos_id
    for length in range(1, 6):
        one = next_word_logits(model.qformer, ids[:, :length], queries)
        torch.testing.assert_close(one, logits[:, length - 1], rtol=0, atol=1e-4)


@torch.no_grad()
def test_greedy_captions_take_the_likeliest_word(model: STGT) -> None:
    video = model.encode_video(clips(1))
    tokenizer = model.tokenizer
    assert tokenizer is not None
    ids = [model.config.bos_id]
    queries = query_keys_values(model.qformer, video.tokens)
    while len(ids) < 6:
        word = int(next_word_logits(model.qformer, torch.tensor([ids]), queries).argmax())
        if word == tokenizer.sep_id:
            break
        ids.append(word)
    (written,) = model.caption(video, num_beams=1, max_tokens=5, min_tokens=1)
    assert written == tokenizer.decode(torch.tensor([ids]))[0]


@torch.no_grad()
def test_a_beam_as_wide_as_the_vocabulary_finds_the_likeliest_caption(model: STGT) -> None:
    config, tokenizer = model.config, model.tokenizer
    assert tokenizer is not None
    video = model.encode_video(clips(1, seed=3))
    queries = query_keys_values(model.qformer, video.tokens)
    words = [word for word in range(config.vocab_size) if word != tokenizer.sep_id]
    start = torch.tensor([[config.bos_id]])
    first = next_word_logits(model.qformer, start, queries).log_softmax(dim=-1)[0]
    pairs = torch.tensor([[config.bos_id, word] for word in words])
    second = next_word_logits(model.qformer, pairs, queries.expand(len(words), *queries.shape[1:]))
    both = first[words][:, None] + second.log_softmax(dim=-1)[:, words]
    best = divmod(int(both.argmax()), len(words))
    written = write_captions(
        model.qformer,
        video.tokens,
        bos_id=config.bos_id,
        eos_id=tokenizer.sep_id,
        pad_id=config.pad_id,
        max_tokens=2,
        min_tokens=2,
        num_beams=len(words),
        top_p=None,
        temperature=1.0,
    )
    assert written.tolist() == [[config.bos_id, *(words[place] for place in best)]]


@torch.no_grad()
def test_nucleus_sampling_repeats_with_its_seed_and_varies_without(model: STGT) -> None:
    video = model.encode_video(clips(2))
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model.caption(video, top_p=0.95, max_tokens=8))
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = model.caption(video, num_beams=1, max_tokens=8)
    assert model.caption(video, top_p=1e-6, max_tokens=8) == greedy


@torch.no_grad()
def test_seeded_captions_depend_on_their_video_and_its_seed_alone(model: STGT) -> None:
    video = model.encode_video(clips(3))
    settings: dict = {"top_p": 0.95, "max_tokens": 8, "num_captions": 2}
    together = model.caption(video, seeds=[5, 6, 7], **settings)
    assert together == model.caption(video, seeds=[5, 6, 7], **settings)
    assert len(set(together)) == 6
    alone = model.caption(video.tokens[[2, 1]], seeds=[7, 5], **settings)
    assert alone[:2] == together[4:]
    assert alone[2:] != together[2:4]
    # The first caption of a video is the same, however many are asked for.
    settings["num_captions"] = 1
    assert model.caption(video, seeds=[5, 6, 7], **settings) == together[::2]


@torch.no_grad()
def test_seeded_words_have_the_probabilities_of_the_nucleus(model: STGT) -> None:
    config, tokenizer = model.config, model.tokenizer
    assert tokenizer is not None
    video = model.encode_video(clips(1))
    draws, temperature, top_p = 4000, 0.7, 0.6
    queries = query_keys_values(model.qformer, video.tokens)
    logits = next_word_logits(model.qformer, torch.tensor([[config.bos_id]]), queries)[0]
    logits[tokenizer.sep_id] = -torch.inf  # a caption has at least one word
    shares, order = (logits / temperature).softmax(dim=0).sort(descending=True)
    inside = shares.cumsum(dim=0) - shares < top_p
    expected = torch.zeros(config.vocab_size).index_put((order[inside],), shares[inside])
    expected /= expected.sum()
    written = write_captions(
        model.qformer,
        video.tokens,
        bos_id=config.bos_id,
        eos_id=tokenizer.sep_id,
        pad_id=config.pad_id,
        max_tokens=1,
        min_tokens=1,
        num_beams=1,
        top_p=top_p,
        temperature=temperature,
        num_captions=draws,
        seeds=[0],
    )
    found = torch.bincount(written[:, 1], minlength=config.vocab_size) / draws
    assert (found[expected == 0] == 0).all()
    # Five standard deviations of a share of that many draws.
    assert (found - expected).abs().max() < 5 * math.sqrt(0.25 / draws)


@torch.no_grad()
def test_a_beam_search_gives_several_captions_the_best_one_first(model: STGT) -> None:
    video = model.encode_video(clips(2))
    best = model.caption(video, num_beams=3, max_tokens=6)
    several = model.caption(video, num_beams=3, num_captions=3, max_tokens=6)
    assert several[::3] == best
    assert len(set(several[:3])) == 3


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_captions": 0}, "num_captions"),
        ({"num_captions": 4, "num_beams": 3}, "num_captions"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"num_beams": 0}, "num_beams"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1000}, "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    ],
)
def test_caption_settings_out_of_range_are_named(model: STGT, settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        model.caption(torch.zeros(1, 4, model.config.vision.width), **settings)


# Bad input


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (torch.zeros(2, 6, 3, 32, 32), r"expected \[B, T, 3, 64, 64\], got \[2, 6, 3, 32, 32\]"),
        (torch.zeros(6, 3, 64, 64), "expected"),
        (torch.zeros(2, 3, 6, 64, 64), "expected"),
        (torch.zeros(2, 6, 3, 64, 64, dtype=torch.int64), "int64"),
        (torch.zeros(2, 6, 3, 64, 64, dtype=torch.uint8), "uint8"),
        (torch.zeros(2, 7, 3, 64, 64), "7 frames per clip, but the model takes 1 to 6"),
        (torch.zeros(2, 0, 3, 64, 64), "0 frames"),
        (torch.zeros(0, 6, 3, 64, 64), "the batch is empty"),
        (clips().numpy(), "expected a torch.Tensor, got ndarray"),
    ],
)
def test_frames_of_another_form_are_refused(model: STGT, frames: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=f"frames: .*{said}|{said}"):
        model.encode_video(frames)


@torch.no_grad()
def test_raw_and_normalized_frames_give_the_same(model: STGT) -> None:
    from stgt.inputs.transforms import normalize_frames

    raw, normal = model.encode_video(clips()), model.encode_video(normalize_frames(clips()))
    assert torch.equal(raw.embeds, normal.embeds)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "non-empty"),
        ("a bare string", "non-empty list"),
        (TextTokens(torch.zeros(2, 3), torch.ones(2, 3)), "int64"),
        (TextTokens(torch.zeros(3).long(), torch.ones(3).long()), r"\[N, S\]"),
        (TextTokens(torch.zeros(2, 3).long(), torch.ones(2, 4).long()), r"\[N, S\]"),
        (TextTokens(torch.zeros(2, 65).long(), torch.ones(2, 65).long()), "positions for only 64"),
        (TextTokens(torch.full((2, 3), 9999), torch.ones(2, 3).long()), "range from 9999"),
        (TextTokens(torch.full((2, 3), -1), torch.ones(2, 3).long()), "range from -1"),
        (TextTokens(torch.zeros(2, 3).long(), torch.ones(2, 3)), "attention_mask of int64 or bool"),
        ([1, 2], "list of strings"),
        ([b"a"], "list of strings"),
    ],
)
def test_texts_of_another_form_are_refused(model: STGT, texts: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model.encode_text(texts)  # type: ignore[arg-type]


@torch.no_grad()
def test_a_caption_beyond_the_limit_is_truncated(model: STGT) -> None:
    text = "a red circle moves left then a blue square moves up " * 5
    assert model.tokenize([text]).input_ids.shape == (1, model.config.max_text_tokens)
    assert model.encode_text([text]).shape == (1, model.config.embed_dim)


def test_unequal_numbers_of_videos_and_texts_are_refused(model: STGT) -> None:
    with pytest.raises(ValueError, match="2 videos and 4 texts"):
        model.match(torch.zeros(2, 4, 96), CAPTIONS)


@pytest.mark.parametrize("shape", [(4, 4, 95), (0, 4, 96), (4, 96)])
def test_visual_tokens_of_another_form_are_refused(model: STGT, shape: tuple[int, ...]) -> None:
    for call in (lambda tokens: model.match(tokens, CAPTIONS), model.caption):
        with pytest.raises(ValueError, match=r"expected visual tokens \[N, M, 96\]"):
            call(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@torch.no_grad()
def test_frames_of_any_float_type_are_taken(model: STGT, dtype: torch.dtype) -> None:
    from stgt.inputs.transforms import normalize_frames

    frames = normalize_frames(clips())
    other = model.encode_video(frames.to(dtype)).embeds
    torch.testing.assert_close(other, model.encode_video(frames).embeds, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("patch_size", {"patch_size": 0}),
        ("vision.heads", {"heads": 0}),
        ("no_such_vit", {"name": "no_such_vit"}),
        ("resnet18", {"name": "resnet18"}),
    ],
)
def test_an_encoder_that_cannot_be_is_named(tokenizer: Tokenizer, name: str, changes: dict) -> None:
    config = config_for(tokenizer)
    with pytest.raises(ValueError, match=name):
        STGT(replace(config, vision=replace(config.vision, **changes)))


@torch.no_grad()
def test_another_vision_transformer_of_timm_can_be_the_encoder(tokenizer: Tokenizer) -> None:
    config = config_for(tokenizer)
    vision = replace(
        config.vision, name="vit_tiny_patch16_224", frozen=True, unfreeze_last_blocks=1
    )
    model = STGT(replace(config, vision=vision), tokenizer).eval()
    assert model.encode_video(clips()).embeds.shape == (4, 8, 64)
    assert any(p.requires_grad for p in model.frame_encoder.vit.blocks[-1].parameters())
    assert not any(p.requires_grad for p in model.frame_encoder.vit.blocks[0].parameters())


def test_losses_are_float32_in_any_precision(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    videos = torch.nn.functional.normalize(torch.randn(4, 8, 64), dim=-1)
    texts = torch.nn.functional.normalize(torch.randn(4, 64), dim=-1)
    full = video_text_similarity(videos, texts)
    with autocast("bf16", torch.device("cpu")):
        half = video_text_similarity(videos, texts)
    assert torch.equal(half, full)


def test_a_model_without_a_vocabulary_says_so(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="has no vocabulary"):
        STGT(config_for(tokenizer)).encode_text(["x"])


# Learning


@pytest.mark.slow
def test_four_pairs_are_overfitted(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    config = config_for(tokenizer)
    model = STGT(config, tokenizer)
    objective = TrainingObjective(model, "hard").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text, positions = model.tokenize(CAPTIONS), torch.arange(4)
    from stgt.inputs.transforms import normalize_frames

    frames = normalize_frames(clips())
    for step in range(45):
        losses = objective(frames, text, positions, step)
        optimizer.zero_grad()
        total_loss(losses).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        video = model.encode_video(frames)
        similarity = video_text_similarity(video.embeds, model.encode_text(CAPTIONS))
        pairs = [(v, t) for v in range(4) for t in range(4)]
        videos, texts = (torch.tensor(part) for part in zip(*pairs, strict=True))
        match = model.match(video.tokens[videos], text.select(texts)).softmax(1)[:, 1].view(4, 4)
    for scores in (similarity, match):
        assert scores.argmax(dim=1).tolist() == [0, 1, 2, 3]
        assert scores.argmax(dim=0).tolist() == [0, 1, 2, 3]


def test_gradient_checkpointing_changes_nothing(tokenizer: Tokenizer) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        tiny = config_for(tokenizer, gradient_checkpointing=checkpointing)
        tiny = replace(tiny, graph=replace(tiny.graph, attention_dropout=0.2))
        model = STGT(tiny, tokenizer)
        objective = TrainingObjective(model, "hard").train()
        torch.manual_seed(1)
        losses = objective(
            torch.randn(4, 6, 3, 64, 64), model.tokenize(CAPTIONS), torch.arange(4), 0
        )
        total_loss(losses).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6)


# Frozen encoder


def frozen_config(tokenizer: Tokenizer, unfreeze: int = 0) -> ModelConfig:
    tiny = config_for(tokenizer)
    vision = replace(tiny.vision, frozen=True, unfreeze_last_blocks=unfreeze)
    return replace(tiny, vision=vision)


@pytest.mark.parametrize("unfreeze", [0, 1, 2])
def test_only_the_last_blocks_of_a_frozen_encoder_learn(
    tokenizer: Tokenizer, unfreeze: int
) -> None:
    torch.manual_seed(0)
    model = STGT(frozen_config(tokenizer, unfreeze), tokenizer)
    objective = TrainingObjective(model, "hard").train()
    before = {name: tensor.clone() for name, tensor in model.frame_encoder.state_dict().items()}
    optimizer = build_optimizer(model, recipes_optim())
    losses = objective(torch.randn(4, 6, 3, 64, 64), model.tokenize(CAPTIONS), torch.arange(4), 0)
    total_loss(losses).backward()
    optimizer.step()
    changed = {
        name
        for name, tensor in model.frame_encoder.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    blocks = {int(name.split(".")[2]) for name in changed if name.startswith("vit.blocks.")}
    assert blocks == set(range(2 - unfreeze, 2))
    assert all(name.startswith("vit.blocks.") for name in changed)
    assert changed.isdisjoint(model.frame_encoder.frozen_names())


def recipes_optim():
    from stgt.config import OptimConfig

    return OptimConfig(lr=1e-2)


@pytest.mark.parametrize(("depth", "count"), [(2, 3), (2, -1)])
def test_more_unfrozen_blocks_than_there_are_is_refused(depth: int, count: int) -> None:
    with pytest.raises(ValueError, match="unfreeze_last_blocks"):
        replace(stgt_tiny().vision, depth=depth, frozen=True, unfreeze_last_blocks=count)
    with pytest.raises(ValueError, match="requires a frozen encoder"):
        replace(stgt_tiny().vision, unfreeze_last_blocks=1)


def test_frozen_weights_are_kept_in_the_type_of_the_pass(tokenizer: Tokenizer) -> None:
    model = STGT(frozen_config(tokenizer, unfreeze=1), tokenizer).eval()
    full = model.encode_video(clips()).embeds
    keep_frozen_weights_in("bf16", model)
    types = {name: tensor.dtype for name, tensor in model.frame_encoder.state_dict().items()}
    frozen = model.frame_encoder.frozen_names()
    assert {types[name] for name in frozen} == {torch.bfloat16}
    assert {types[name] for name in types.keys() - frozen} == {torch.float32}
    with torch.no_grad(), autocast("bf16", torch.device("cpu")):
        half = model.encode_video(clips()).embeds.float()
    assert (half - full).abs().max() <= 2e-2


# Saving


def test_a_saved_model_comes_back_whole(model: STGT, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    again = STGT.from_pretrained(tmp_path / "model")
    assert again.config == model.config
    assert not again.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(again.encode_text(CAPTIONS), model.encode_text(CAPTIONS))
    assert not list((tmp_path / "model").glob("*.bin"))


def test_a_frozen_encoder_is_saved_with_the_model_and_left_out_of_checkpoints(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = STGT(frozen_config(tokenizer, unfreeze=1), tokenizer)
    model.save_pretrained(tmp_path / "whole")
    save_model(model, tmp_path / "part")
    assert (tmp_path / "whole" / FROZEN_FILE).exists()
    assert not (tmp_path / "part" / FROZEN_FILE).exists()
    for again in (
        STGT.from_pretrained(tmp_path / "whole"),
        load_model(tmp_path / "part", frame_encoder=tmp_path / "whole"),
    ):
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
    with pytest.raises(CheckpointError, match="different frozen frame encoder"):
        load_model(tmp_path / "part")


def test_a_model_kept_in_half_precision_is_read_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = STGT(frozen_config(tokenizer, unfreeze=1), tokenizer)
    save_model(model, tmp_path / "before")
    model.save_pretrained(tmp_path / "whole")
    keep_frozen_weights_in("bf16", model)
    model.save_pretrained(tmp_path / "half")
    again = STGT.from_pretrained(tmp_path / "half")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.float()), name
    load_model(tmp_path / "before", frame_encoder=tmp_path / "whole")


def test_a_cut_off_or_foreign_checkpoint_is_refused(model: STGT, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    weights = tmp_path / WEIGHTS_FILE
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        load_model(tmp_path)
    weights.write_bytes(data)
    other = STGT(replace(model.config, embed_dim=32))
    with pytest.raises(CheckpointMismatchError, match=r"video_proj.weight \[64, 96\] \(model \[32"):
        load_weights(other, tmp_path)
    (tmp_path / "config.json").write_text('{"model": {"vision": {"colour": 1}}}')
    with pytest.raises(CheckpointError, match="is not a valid config of a model"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="contains no config.json"):
        load_model(tmp_path / "nowhere")


# Sizes


@pytest.mark.parametrize(("embed_dim", "total", "trained"), [(256, 1_232_493_502, 246_237_118)])
def test_the_published_size_has_the_published_number_of_parameters(
    embed_dim: int, total: int, trained: int
) -> None:
    with torch.device("meta"):
        model = STGT(stgt_g(embed_dim))
    counts = model.count_parameters()
    assert counts.trained == trained
    assert counts.total == total


def test_no_parameter_is_without_a_gradient(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = STGT(config_for(tokenizer), tokenizer)
    objective = TrainingObjective(model, "self_similarity").train()
    losses = objective(torch.randn(4, 6, 3, 64, 64), model.tokenize(CAPTIONS), torch.arange(4), 0)
    total_loss(losses).backward()
    assert math.isfinite(total_loss(losses).item())
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert idle == []
