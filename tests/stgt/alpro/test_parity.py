"""With a recorded reference's weights and inputs, ALPRO's tensors, losses and gradients result."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stgt.alpro.model import Alpro
from stgt.alpro.released import UnstoredSizes, import_alpro, our_name
from stgt.config import LabelSmoothing
from stgt.inputs.tokenizer import TextTokens
from stgt.network.similarity import video_text_similarity
from stgt.retrieval.ranking import fuse_scores, top_candidates
from stgt.training.losses import Pairs, contrastive_loss, matching_losses
from stgt.training.objective import TrainingObjective

pytestmark = pytest.mark.parity

TENSOR_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-3
UNSCORED = -100.0
"""Marks unscored pairs in the recorded reference."""


@pytest.fixture(scope="module")
def fixture(reference_dir: Path) -> dict:
    return json.loads((reference_dir / "alpro" / "fixture.json").read_text())


@pytest.fixture
def model(fixture: dict, reference_dir: Path, tmp_path: Path) -> Alpro:
    """The recorded weights, imported like a released file."""
    file = tmp_path / "released.pt"
    torch.save(load_file(reference_dir / "alpro" / "weights.safetensors"), file)
    sizes = fixture["config"]
    model, _ = import_alpro(
        file,
        UnstoredSizes(
            vision_heads=sizes["heads"],
            text_heads=sizes["heads"],
            fusion_layer=sizes["fusion_layer"],
        ),
    )
    assert model.config.num_frames == sizes["video_frames"]
    assert model.config.num_answers == sizes["num_answers"]
    return model


@pytest.fixture(scope="module")
def expected(reference_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(reference_dir / "alpro" / "expected.safetensors")


@pytest.fixture(scope="module")
def inputs(fixture: dict, reference_dir: Path) -> tuple[torch.Tensor, TextTokens]:
    tensors = load_file(reference_dir / "alpro" / "inputs.safetensors")
    mean = torch.tensor(fixture["norm_mean"]).view(1, 3, 1, 1, 1)
    std = torch.tensor(fixture["norm_std"]).view(1, 3, 1, 1, 1)
    video = (tensors["video"].float() / 255 - mean) / std
    frames = video.transpose(1, 2).contiguous()  # [N, 3, T, H, W] -> [N, T, 3, H, W]
    return frames, TextTokens(tensors["input_ids"], tensors["attention_mask"])


def head_of(text: TextTokens, count: int) -> TextTokens:
    return text.select(torch.arange(count))


def close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    assert actual.shape == wanted.shape
    difference = (actual - wanted).abs().max().item()
    assert difference <= TENSOR_TOLERANCE, f"max abs difference {difference:.2e}"


@torch.no_grad()
def test_every_recorded_tensor_is_reproduced(fixture, model, inputs, expected) -> None:
    batch = fixture["batch"]
    frames, text = inputs[0][:batch], head_of(inputs[1], batch)
    tokens = model.video_tokens(frames)
    close(tokens, expected["video_tokens"])
    real = text.attention_mask[..., None]
    close(model.text_states(text) * real, expected["text_tokens"] * real)
    assert model.classifier is not None
    close(model.classifier(model.fuse(tokens, text)), expected["qa_logits"])


def test_losses_negatives_and_gradient_norms_are_reproduced(fixture, model, inputs) -> None:
    batch = fixture["batch"]
    frames, text = inputs[0][:batch], head_of(inputs[1], batch)
    wanted = fixture["scalars"]
    tokens = model.video_tokens(frames)
    embedded = model.embed(tokens, text)
    pairs = Pairs(embedded.videos, embedded.texts)
    itc = contrastive_loss(
        pairs, pairs, torch.arange(batch), model.temperature, "hard", label_smoothing=0.0
    )
    logits = video_text_similarity(pairs.video_embeds, pairs.text_embeds) / model.temperature
    masked = logits.detach().masked_fill(torch.eye(batch, dtype=torch.bool), -torch.inf)
    video_for_text, text_for_video = masked.T.argmax(dim=1), masked.argmax(dim=1)
    assert video_for_text.tolist() == wanted["negative_video_for_text"]
    assert text_for_video.tolist() == wanted["negative_text_for_video"]
    pair_text = TextTokens(
        torch.cat([text.input_ids, text.input_ids, text.input_ids[text_for_video]]),
        torch.cat([text.attention_mask, text.attention_mask, text.attention_mask[text_for_video]]),
    )
    match_logits = model.match(torch.cat([tokens, tokens[video_for_text], tokens]), pair_text)
    labels = torch.tensor([1] * batch + [0] * 2 * batch)
    itm = matching_losses(match_logits, labels).mean()
    loss = itc + itm
    for name, value in (("loss_vtc", itc), ("loss_vtm", itm), ("loss", loss)):
        assert value.item() == pytest.approx(wanted[name], rel=LOSS_TOLERANCE), name

    loss.backward()
    parameters = dict(model.named_parameters())
    # Biases of attention keys have no gradient, since a softmax ignores an offset of all scores.
    # The recorded values are float32 rounding errors relative to the largest gradient.
    rounding = torch.finfo(torch.float32).eps * max(wanted["grad_norm"].values())
    for published, norm in wanted["grad_norm"].items():
        gradient = parameters[our_name(published)].grad
        actual = 0.0 if gradient is None else gradient.norm().item()
        assert actual == pytest.approx(norm, rel=GRADIENT_TOLERANCE, abs=rounding), published


@torch.no_grad()
def test_the_training_objective_has_the_recorded_contrastive_loss(fixture, model, inputs) -> None:
    """The settings of ALPRO's recipes give its loss: hard targets without label smoothing."""
    batch = fixture["batch"]
    objective = TrainingObjective(
        model, "hard", label_smoothing=LabelSmoothing(contrastive=0.0), negatives="published"
    )
    losses = objective(
        inputs[0][:batch], head_of(inputs[1], batch), torch.arange(batch), draw_seed=0
    )
    assert set(losses) == {"itc", "itm"}
    wanted = fixture["scalars"]["loss_vtc"]
    assert losses["itc"].item() == pytest.approx(wanted, rel=LOSS_TOLERANCE)


def test_frames_are_normalized_as_recorded(fixture, model) -> None:
    assert list(model.config.inputs.mean) == fixture["norm_mean"]
    assert list(model.config.inputs.std) == fixture["norm_std"]


@torch.no_grad()
def test_retrieval_scores_are_reproduced(fixture, model, inputs, expected) -> None:
    """The recorded scores are those of LAVIS: logit + cosine of the best few by cosine."""
    frames, text = inputs
    k = fixture["config"]["k_test"]
    encoding = model.encode_video(frames)
    similarity = video_text_similarity(encoding.embeds, model.encode_text(text))
    scorer = model.pair_scorer(encoding.tokens)
    for direction, scores in (("v2t", similarity), ("t2v", similarity.T)):
        candidates = top_candidates(scores.numpy(), k)
        rows = torch.arange(len(candidates)).repeat_interleave(k)
        columns = torch.from_numpy(candidates.copy()).flatten()
        videos, texts = (rows, columns) if direction == "v2t" else (columns, rows)
        logits = scorer(videos, texts, text, 4)[:, 1].numpy().reshape(candidates.shape)
        fused = fuse_scores(scores.numpy(), candidates, logits)
        fused[np.isneginf(fused)] = UNSCORED
        close(torch.from_numpy(fused), expected[f"retrieval_{direction}"])
