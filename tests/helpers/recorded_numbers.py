"""Numbers of a tiny model of ours, recorded so that a clone alone notices when they change.

    python -m tests.helpers.recorded_numbers

writes them again to `recorded_numbers.json` beside this file. Do so only after a change that is
meant to alter numbers, and once the parity tests (`pytest -m parity`) have passed, which compare
with the published model: the numbers here show that something changed, not that it is right.

Weights and inputs do not depend on torch's random number generators: they are uniform numbers of
numpy's PCG64, seeded by the name of a tensor, so that a new parameter leaves the others as they
are. Everything is computed in float64 as far as the model lets it, on one thread. What is left to
torch is the draw of hard negatives, one uniform number a pair from its generator on the CPU.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from stgt import STGT, stgt_tiny
from stgt.config import ModelConfig, Targets
from stgt.inputs.tokenizer import TextTokens
from stgt.network.graph_attention import patch_similarity
from stgt.training.objective import TrainingObjective, total_loss

RECORDED = Path(__file__).with_name("recorded_numbers.json")
CLIPS, FRAMES, WORDS, LENGTHS = 4, 3, 32, (4, 7, 3, 6)
DIGITS = 9
"""Significant digits that are kept: the tolerance is 1e-5."""

Numbers = dict[str, float | list[float]]


def uniform(name: str, shape: Sequence[int]) -> torch.Tensor:
    """Numbers in [-1, 1) that depend on a name alone."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(np.asarray(2 * generator.random(tuple(shape)) - 1))


def _config() -> ModelConfig:
    tiny = stgt_tiny(vocab_size=WORDS, bos_id=WORDS - 1)
    return replace(
        tiny,
        vision=replace(tiny.vision, image_size=32, width=48),
        graph=replace(tiny.graph, similarity_threshold=0.3),
        qformer=replace(tiny.qformer, width=48, mlp_width=96, query_tokens=4, max_position=16),
        embed_dim=12,
        num_frames=FRAMES,
        max_text_tokens=max(LENGTHS),
    )


def _model() -> STGT:
    """The model, with weights of the size that a layer's fan-in asks for."""
    model = STGT(_config()).double()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            values = uniform(name, tensor.shape)
            if name.endswith("temperature"):
                continue  # as every model begins
            if tensor.dim() < 2:
                scaled = 0.1 * values + (1.0 if "norm" in name.lower() and "weight" in name else 0)
            else:
                scaled = values * (3 / tensor[0].numel()) ** 0.5
            tensor.copy_(scaled)
    return model


def _inputs() -> tuple[torch.Tensor, TextTokens, torch.Tensor]:
    size = _config().vision.image_size
    # Frames of a clip resemble each other, so that the graph has edges between them.
    still = uniform("still", (CLIPS, 1, 3, size, size))
    frames = still + 0.5 * uniform("frames", (CLIPS, FRAMES, 3, size, size))
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    words = (uniform("words", mask.shape) + 1) / 2 * (WORDS - 2)
    return frames, TextTokens((1 + words.long()) * mask, mask), torch.tensor([2, 0, 3, 1])


def edge_margin() -> float:
    """Distance of the nearest similarity from the threshold: larger than any rounding."""
    model, (frames, _, _) = _model(), _inputs()
    with torch.no_grad():
        patches = model.frame_encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        similarity = patch_similarity(patches[:, :, 1:])
    return float((similarity - model.config.graph.similarity_threshold).abs().min())


def numbers() -> Mapping[str, Numbers]:
    """Embeddings, match logits, losses and gradient norms."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {"outputs": _outputs(), **{t: _training(t) for t in ("hard", "self_similarity")}}
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _outputs() -> Numbers:
    model, (frames, text, _) = _model().eval(), _inputs()
    video = model.encode_video(frames)
    pairs = [torch.arange(CLIPS).repeat_interleave(CLIPS), torch.arange(CLIPS).repeat(CLIPS)]
    found = {
        "video_embeds": video.embeds,
        "text_embeds": model.encode_text(text),
        "match_logits": model.match(video.tokens[pairs[0]], text.select(pairs[1])),
        "caption_logits": model.caption_logits(video.tokens, text)[1][:, :2],
        "visual_tokens": video.tokens.mean(dim=-1),
    }
    return {name: tensor.flatten().tolist() for name, tensor in found.items()}


def _training(targets: Targets) -> Numbers:
    model = _model()
    frames, text, positions = _inputs()
    losses = TrainingObjective(model, targets).train()(frames, text, positions, draw_seed=3)
    total_loss(losses).backward()
    norms = {
        f"gradient norm of {name}": float(parameter.grad.norm())
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {**{f"loss {name}": float(loss.detach()) for name, loss in losses.items()}, **norms}


def main() -> None:
    """Record them."""

    def short(value: float | list[float]) -> float | list[float]:
        if isinstance(value, list):
            return [float(f"{one:.{DIGITS}g}") for one in value]
        return float(f"{value:.{DIGITS}g}")

    kept = {
        part: {name: short(value) for name, value in found.items()}
        for part, found in numbers().items()
    }
    RECORDED.write_text(json.dumps(kept, separators=(",", ":")).replace('],"', '],\n"') + "\n")


if __name__ == "__main__":
    main()
