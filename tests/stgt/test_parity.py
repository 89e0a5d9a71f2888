"""With a recorded reference's weights and inputs, its tensors, losses and gradients result."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stgt import STGT, GraphConfig, ModelConfig, QFormerConfig, VisionConfig
from stgt.inputs.caption_text import clean_caption
from stgt.inputs.frame_choice import choose_frames
from stgt.inputs.tokenizer import TextTokens
from stgt.network.similarity import video_text_similarity
from stgt.retrieval.metrics import best_ranks, retrieval_metrics
from stgt.retrieval.ranking import fuse_scores, top_candidates
from stgt.training.losses import Pairs, caption_loss, contrastive_loss, matching_losses
from stgt.weights.released import our_name

pytestmark = pytest.mark.parity

TENSOR_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def fixture(reference_dir: Path) -> dict:
    return json.loads((reference_dir / "stgt" / "fixture.json").read_text())


@pytest.fixture(scope="module")
def config(fixture: dict, reference_dir: Path) -> ModelConfig:
    sizes = fixture["config"]
    weights = load_file(reference_dir / "stgt" / "weights.safetensors")
    patch = weights["visual_encoder.patch_embed.proj.weight"].shape[-1]
    grid = round((weights["graph_cross_model.pos_2D_embed"].shape[0] - 1) ** 0.5)
    return ModelConfig(
        vision=VisionConfig(
            image_size=patch * grid,
            patch_size=patch,
            width=sizes["vit_width"],
            depth=sizes["vit_depth"],
            heads=sizes["vit_heads"],
            mlp_ratio=sizes["vit_mlp_ratio"],
        ),
        graph=GraphConfig(
            layers=sizes["graph_layers"],
            heads=sizes["graph_heads"],
            similarity_threshold=sizes["sim_th"],
        ),
        qformer=QFormerConfig(
            width=sizes["q_hidden"],
            layers=sizes["q_layers"],
            heads=sizes["q_heads"],
            mlp_width=sizes["q_intermediate"],
            cross_attention_every=sizes["cross_attention_freq"],
            query_tokens=sizes["num_query_token"],
            max_position=sizes["q_max_position"],
        ),
        embed_dim=sizes["embed_dim"],
        num_frames=sizes["video_frames"],
        max_text_tokens=sizes["max_txt_len"],
        vocab_size=sizes["vocab_size"],
        bos_id=fixture["bos_id"],
        pad_id=fixture["pad_id"],
    )


@pytest.fixture
def model(config: ModelConfig, reference_dir: Path) -> STGT:
    published = load_file(reference_dir / "stgt" / "weights.safetensors")
    # The file stores the caption head's bias twice, and its weight, the word embeddings, too.
    bias = published.pop("Qformer.cls.predictions.decoder.bias")
    assert torch.equal(bias, published["Qformer.cls.predictions.bias"])
    weight = published.pop("Qformer.cls.predictions.decoder.weight")
    assert torch.equal(weight, published["Qformer.bert.embeddings.word_embeddings.weight"])
    model = STGT(config)
    model.load_state_dict({our_name(name): tensor for name, tensor in published.items()})
    return model.eval()


@pytest.fixture(scope="module")
def expected(reference_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(reference_dir / "stgt" / "expected.safetensors")


@pytest.fixture(scope="module")
def inputs(fixture: dict, reference_dir: Path) -> tuple[torch.Tensor, TextTokens]:
    tensors = load_file(reference_dir / "stgt" / "inputs.safetensors")
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


@pytest.mark.slow
@torch.no_grad()
def test_every_recorded_tensor_is_reproduced(fixture, model, inputs, expected) -> None:
    batch = fixture["batch"]
    frames, text = inputs[0][:batch], head_of(inputs[1], batch)
    vit_tokens = model.frame_encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
    close(vit_tokens, expected["vit_tokens"])
    graph_tokens = model.graph(vit_tokens)
    close(graph_tokens, expected["graph_tokens"])
    tokens = model.video_tokens(frames)
    close(tokens, expected["video_tokens"])
    close(model.video_tokens(frames[:, :1]), expected["image_tokens"])

    query_states, logits = model.caption_logits(tokens, text)
    close(query_states, expected["query_output"])
    close(model.qformer.encode_queries(tokens), expected["query_output"])
    close(model.encode_video(frames).embeds, expected["video_embeds"])
    real = text.attention_mask[..., None]
    states = model.qformer.encode_text(text.input_ids, text.attention_mask)
    close(states * real, expected["text_output"])
    close(model.encode_text(text), expected["text_embeds"])
    close(logits * real, expected["lm_logits"])
    for video in range(batch):
        every_text = tokens[video].expand(batch, -1, -1)
        probability = model.match(every_text, text).softmax(dim=1)[:, 1]
        close(probability, expected["itm_prob"][video])


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["self_similarity", "hard"])
def test_losses_negatives_and_gradient_norms_are_reproduced(
    fixture, model, inputs, targets
) -> None:
    batch = fixture["batch"]
    frames, text = inputs[0][:batch], head_of(inputs[1], batch)
    wanted = fixture["scalars"]["self_similarity" if targets != "hard" else "hard_targets"]
    tokens = model.video_tokens(frames)
    query_states, caption_logits = model.caption_logits(tokens, text)
    pairs = Pairs(model.project_video(query_states), model.encode_text(text))
    itc = contrastive_loss(pairs, pairs, torch.arange(batch), model.temperature, targets)
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
    total, count = caption_loss(caption_logits, text.input_ids, text.attention_mask)
    lm = total / count
    loss = itc + itm + lm
    for name, value in (("itc", itc), ("itm", itm), ("lm", lm)):
        assert value.item() == pytest.approx(wanted[f"loss_{name}"], rel=LOSS_TOLERANCE), name
    assert loss.item() == pytest.approx(wanted["loss"], rel=LOSS_TOLERANCE)

    loss.backward()
    parameters = dict(model.named_parameters())
    # Biases of attention keys have no gradient, since a softmax ignores an offset of all scores.
    # The recorded values are float32 rounding errors relative to the largest gradient.
    rounding = torch.finfo(torch.float32).eps * max(wanted["grad_norm"].values())
    for published, norm in wanted["grad_norm"].items():
        gradient = parameters[our_name(published)].grad
        actual = 0.0 if gradient is None else gradient.norm().item()
        assert actual == pytest.approx(norm, rel=GRADIENT_TOLERANCE, abs=rounding), published


@pytest.mark.slow
@torch.no_grad()
def test_retrieval_scores_are_reproduced(fixture, model, inputs, expected) -> None:
    frames, text = inputs
    k = fixture["config"]["k_test"]
    encoding = model.encode_video(frames)
    similarity = video_text_similarity(encoding.embeds, model.encode_text(text))
    close(similarity[: fixture["batch"], : fixture["batch"]], expected["sim_v2t"])
    for direction, scores in (("v2t", similarity), ("t2v", similarity.T)):
        candidates = top_candidates(scores.numpy(), k)
        probability = np.zeros(candidates.shape, dtype=np.float32)
        for row, columns in enumerate(candidates):
            fixed, varying = torch.full((k,), row), torch.from_numpy(columns.copy())
            videos, texts = (fixed, varying) if direction == "v2t" else (varying, fixed)
            logits = model.match(encoding.tokens[videos], text.select(texts))
            probability[row] = logits.softmax(dim=1)[:, 1].numpy()
        fused = fuse_scores(scores.numpy(), candidates, probability)
        fused[np.isneginf(fused)] = -100  # marks unscored pairs in the recorded reference
        close(torch.from_numpy(fused), expected[f"retrieval_{direction}"])


def test_caption_cleaning_is_reproduced(reference_dir: Path) -> None:
    cases = json.loads((reference_dir / "text_and_frames.json").read_text())["caption_cleaning"]
    assert [clean_caption(case["in"]) for case in cases] == [case["out"] for case in cases]


def test_uniform_frame_indices_are_reproduced(reference_dir: Path) -> None:
    cases = json.loads((reference_dir / "text_and_frames.json").read_text())
    for case in cases["uniform_frame_indices"]:
        chosen = choose_frames(case["num_source_frames"], case["num_frames"], "uniform")
        assert chosen.tolist() == case["uniform"], case


def test_published_retrieval_metrics_are_reproduced(reference_dir: Path) -> None:
    for case in json.loads((reference_dir / "retrieval_metrics.json").read_text()):
        video_of_caption = case["caption_video"]
        captions_of_video: list[list[int]] = [[] for _ in case["scores_v2t"]]
        for caption, video in enumerate(video_of_caption):
            captions_of_video[video].append(caption)
        t2v = retrieval_metrics(
            best_ranks(np.array(case["scores_t2v"]), [[video] for video in video_of_caption]), "t2v"
        )
        v2t = retrieval_metrics(best_ranks(np.array(case["scores_v2t"]), captions_of_video), "v2t")
        wanted = case["expected"]
        for k in (1, 5, 10):
            assert t2v[f"t2v/R{k}"] == pytest.approx(wanted[f"img_r{k}"]), case["name"]
            assert v2t[f"v2t/R{k}"] == pytest.approx(wanted[f"txt_r{k}"]), case["name"]
        assert t2v["t2v/MdR"] == wanted["MedianR"], case["name"]
