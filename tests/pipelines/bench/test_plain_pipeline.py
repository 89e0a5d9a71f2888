"""The plain script that the stages are compared with: it decodes, trains and evaluates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.artifacts import checkpoints
from pipelines.bench import plain_pipeline
from pipelines.quickstart.store import tiny_sampling
from pipelines.train import recipes
from pipelines.video.synthetic import dataset
from stgt.config import stgt_tiny
from stgt.inputs.tokenizer import Tokenizer
from stgt.model import STGT

CLIPS = 12


@pytest.fixture
def split(tmp_path: Path) -> tuple[Path, Path]:
    """Annotations and videos of a few clips, one of which is damaged."""
    videos = dataset.plan_videos(CLIPS, 2, seed=0)["train"]
    videos[3] = replace(videos[3], damaged=0)
    annotations = dataset.write_split(str(tmp_path), "train", videos)
    dataset.write_vocabulary(str(tmp_path / "vocab.txt"))
    return Path(annotations), tmp_path / "videos"


@pytest.mark.slow
def test_it_decodes_trains_and_evaluates(split: tuple[Path, Path], tmp_path: Path) -> None:
    annotations, videos = split
    clips = plain_pipeline.decode(annotations, videos, tiny_sampling())
    assert clips.frames.shape == (CLIPS - 1, 12, 64, 64, 3)  # without the damaged one
    assert len(clips.captions) == CLIPS - 1

    tokenizer = Tokenizer(tmp_path / "vocab.txt")
    torch.manual_seed(0)
    model = STGT(stgt_tiny().for_vocabulary(tokenizer.bos_id, len(tokenizer), tokenizer.pad_id))
    untrained = str(tmp_path / "untrained")
    checkpoints.save(untrained, model, tokenizer, step=0)
    recipe = replace(
        recipes.pretrain_stage1_tiny(("unused",), "unused", str(tmp_path / "vocab.txt")),
        init_from=untrained,
        steps=2,
        global_batch=8,
    )
    before = model.text_proj.weight.detach().clone()
    plain_pipeline.train(model, tokenizer, clips, recipe)
    assert not torch.equal(model.text_proj.weight, before)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())

    # All of it in one call, from the checkpoint on.
    splits = {"train": annotations, "val": annotations}
    threads = torch.get_num_threads()
    metrics = plain_pipeline.run(splits, videos, tiny_sampling(), recipe, k_rerank=4)
    torch.set_num_threads(threads)
    assert {"t2v/R1", "v2t/R1", "sim/t2v/R1"} <= metrics.keys()
    assert 0 <= metrics["t2v/R1"] <= 100
    assert metrics["t2v/R5"] >= metrics["t2v/R1"]
    assert not np.isnan(metrics["t2v/MnR"])
    # The seeds are the same, so this is the model that was trained above.
    again = plain_pipeline.evaluate(model, tokenizer, clips, recipe, k_rerank=4)
    assert metrics["sim/t2v/MnR"] == pytest.approx(again["sim/t2v/MnR"], abs=1)
