"""The work of the quickstart as a plain script: one process, no Ray, no files between the stages.

It decodes all clips into memory, trains on them, and evaluates retrieval. Decoder, model, losses,
optimizer and schedule are those of the stages. It resumes nothing, records nothing, isolates no
damaged video in a process of its own, and needs all frames in memory.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pipelines.artifacts import checkpoints
from pipelines.train.config import TrainConfig
from pipelines.video.child import Decoded, DecodeRequest, decode_file
from pipelines.video.config import DecodeLimits, SamplingConfig
from stgt.inputs.frame_choice import choose_frames
from stgt.inputs.tokenizer import Tokenizer
from stgt.inputs.transforms import augment_clip
from stgt.interface.model import VideoTextModel
from stgt.retrieval.gallery import all_metrics, score_gallery
from stgt.retrieval.similarity import Similarity
from stgt.training.objective import TrainingObjective, total_loss
from stgt.training.optimizer import build_optimizer, learning_rate, set_learning_rate

BATCH = 32
"""Clips that are encoded at a time in the evaluation."""


@dataclass(frozen=True)
class Clips:
    """Decoded clips of a split."""

    frames: npt.NDArray[np.uint8]
    """[N, T, H, W, 3]"""
    captions: list[str]


def run(
    annotations: dict[str, Path],
    videos: Path,
    sampling: SamplingConfig,
    recipe: TrainConfig,
    k_rerank: int,
) -> dict[str, float]:
    """Decode, train and evaluate.

    Args:
        annotations: WebVid-style CSV of the splits `train` and `val`.
        videos: Folder of the videos.
        sampling: Which frames of a clip are kept.
        recipe: Settings of the training. `init_from` and `vocab` are used, places of data are not.
        k_rerank: Candidates to rerank.

    Returns:
        Retrieval metrics on the split `val`.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    splits = {split: decode(file, videos, sampling) for split, file in annotations.items()}
    assert recipe.init_from is not None
    tokenizer = Tokenizer(recipe.vocab)
    model, _ = checkpoints.load(recipe.init_from)
    train(model, tokenizer, splits["train"], recipe)
    return evaluate(model, tokenizer, splits["val"], recipe, k_rerank)


def decode(annotations: Path, videos: Path, sampling: SamplingConfig) -> Clips:
    """Decode the clips of a split, and leave out those that cannot be decoded."""
    limits = DecodeLimits()
    frames, captions = [], []
    with annotations.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            decoded = decode_file(
                DecodeRequest(
                    path=str(videos / row["page_dir"] / f"{row['videoid']}.mp4"),
                    num_frames=sampling.num_frames,
                    frame_choice=sampling.frame_choice,
                    size=sampling.size,
                    resize=sampling.resize,
                    decoder=sampling.decoder,
                    max_pixels=limits.max_pixels,
                    max_bytes=limits.max_bytes,
                )
            )
            if isinstance(decoded, Decoded):
                frames.append(decoded.frames)
                captions.append(row["name"])
    return Clips(np.stack(frames), captions)


def train(model: VideoTextModel, tokenizer: Tokenizer, clips: Clips, recipe: TrainConfig) -> None:
    """Train a model for the steps of a recipe, on epochs in random order."""
    objective = TrainingObjective(
        model, recipe.targets, recipe.gather, recipe.negatives, recipe.label_smoothing
    ).train()
    optimizer = build_optimizer(model, recipe.optim)
    generator = np.random.default_rng(recipe.seed)
    count, size = len(clips.captions), recipe.global_batch
    order = np.concatenate(
        [generator.permutation(count) for _ in range(-(-recipe.steps * size // count))]
    )
    for step in range(recipe.steps):
        rows = order[step * size : (step + 1) * size]
        batch = np.stack([_training_view(clips.frames[row], recipe, generator) for row in rows])
        text = tokenizer([clips.captions[row] for row in rows], recipe.model.inputs.max_text_tokens)
        set_learning_rate(optimizer, learning_rate(step, recipe.steps, recipe.optim))
        places = torch.arange(step * size, step * size + len(rows))
        losses = objective(
            torch.from_numpy(batch),
            text,
            places,
            step,
            torch.ones(len(rows), dtype=torch.bool),
            torch.from_numpy(rows.astype(np.int64)),
        )
        total_loss(losses, recipe.loss_weights).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _training_view(
    frames: npt.NDArray[np.uint8], recipe: TrainConfig, generator: np.random.Generator
) -> npt.NDArray[np.uint8]:
    chosen = choose_frames(len(frames), recipe.num_frames, recipe.frame_choice, generator)
    if recipe.augment.changes_nothing:
        return frames[chosen]
    return augment_clip(frames[chosen], recipe.augment, generator)


@torch.no_grad()
def evaluate(
    model: VideoTextModel, tokenizer: Tokenizer, clips: Clips, recipe: TrainConfig, k_rerank: int
) -> dict[str, float]:
    """Return the retrieval metrics of a model, each clip of a split with its own caption."""
    model.eval()
    chosen = choose_frames(clips.frames.shape[1], recipe.num_frames, "middle")
    encoded = [
        model.encode_video(torch.from_numpy(clips.frames[first : first + BATCH][:, chosen]))
        for first in range(0, len(clips.captions), BATCH)
    ]
    text = tokenizer(clips.captions, recipe.model.inputs.max_text_tokens)
    scorer = model.pair_scorer(torch.cat([one.tokens for one in encoded]))

    def match(pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        texts, videos = (torch.from_numpy(np.ascontiguousarray(part)) for part in pairs.T)
        return scorer(videos, texts, text, BATCH).softmax(dim=-1)[:, 1].numpy()

    count = len(clips.captions)
    similarity = Similarity(
        torch.cat([one.embeds for one in encoded]).numpy(), model.encode_text(text).numpy()
    )
    own = np.arange(count)
    scores = score_gallery(similarity, own, np.ones(count, dtype=np.bool_), k_rerank, match)
    return all_metrics(scores, own, resamples=0)[0]
