"""The baseline of the training step computes the same losses, and Ray is not needed to measure."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.bench.products import flop_counter
from pipelines.bench.train_step import (
    Size,
    count_flops,
    largest_difference,
    make_batch,
    make_step,
    reduced,
)
from stgt.config import ModelConfig, stgt_g, stgt_tiny
from stgt.training.objective import total_loss

ROOT = Path(__file__).parents[3]
TINY = Size(
    replace(stgt_tiny(), graph=replace(stgt_tiny().graph, attention_dropout=0.0)), 4, "fp32", "fp32"
)
NO_RAY = """
import sys
class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoRay())
"""
MEASURE = """
from pipelines.bench import train_step
from stgt.config import stgt_tiny
train_step.SIZES["cpu"] = train_step.Size(stgt_tiny(), 2, "fp32", "fp32")
sys.argv = ["bench", "train_step", "--repeats", "1", "--output", sys.argv[1]]
import runpy
runpy.run_module("jobs.bench", run_name="__main__")
"""


def test_the_losses_are_those_of_the_training_objective() -> None:
    ours, plain = (make_step(form, TINY, "cpu") for form in ("ours", "baseline"))
    assert largest_difference(ours, plain) < 1e-5
    with torch.no_grad():
        plain.model.graph.time_embed.mul_(1.5)
    assert largest_difference(ours, plain) > 1e-5


def test_the_gradients_are_those_of_the_training_objective() -> None:
    found = []
    for form in ("ours", "baseline"):
        step = make_step(form, TINY, "cpu")
        total_loss(step.losses()).backward()
        found.append({name: one.grad for name, one in step.model.named_parameters()})
    for name, wanted in found[1].items():
        assert (found[0][name] is None) == (wanted is None), name
        if wanted is not None:
            torch.testing.assert_close(found[0][name], wanted, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_ours_needs_fewer_operations() -> None:
    ours, plain = (make_step(form, TINY, "cpu") for form in ("ours", "baseline"))
    counts = count_flops(ours)
    with flop_counter() as counter:
        plain.run()
    assert counts["all"] < counter.get_total_flops()
    assert counts["all"] == sum(count for name, count in counts.items() if name != "all")
    assert min(counts.values()) > 0.1 * counts["all"]


def test_the_reduced_size_keeps_what_frames_and_texts_are() -> None:
    small, full = reduced(stgt_g()), stgt_g()
    assert (small.vision.width, small.vision.depth) == (352, 10)
    assert (small.qformer.width, small.qformer.layers, small.qformer.heads) == (192, 3, 3)
    assert (small.vision.grid, small.num_frames, small.graph.heads) == (16, 8, 16)
    assert small.qformer.width // small.qformer.heads == full.qformer.width // full.qformer.heads
    assert isinstance(small, ModelConfig)


def test_texts_have_different_lengths() -> None:
    batch = make_batch(replace(TINY, clips=16), "cpu")
    lengths = batch.text.attention_mask.sum(dim=1)
    assert lengths.unique().numel() > 1
    assert int(lengths.min()) >= 8
    assert bool((batch.text.input_ids[batch.text.attention_mask == 0] == 0).all())


@pytest.mark.slow
@pytest.mark.soak
def test_it_runs_where_ray_is_not_installed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_RAY + MEASURE, str(tmp_path / "results")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert rows.keys() == {
        "train_step",
        "train_step/memory",
        "train_step/difference",
        "train_step/mfu",
    }
    assert rows["train_step"]["ours"] > 0
    assert rows["train_step/difference"]["ours"] < 1e-4
    assert 0 < rows["train_step/mfu"]["ratio"] < 1
    assert "frame encoder" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_losses_agree_on_a_gpu() -> None:
    size = replace(TINY, ours="bf16", baseline="fp16")
    ours, plain = (make_step(form, size, "cuda") for form in ("ours", "baseline"))
    assert largest_difference(ours, plain) < 0.02
