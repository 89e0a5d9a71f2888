"""The command line of jobs.estimate: flags of the training, and settings from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.command_line import read_command_line
from jobs.estimate import JOB
from pipelines.estimate.config import EstimateConfig


def read(*words: str) -> EstimateConfig:
    config, _ = read_command_line("estimate", JOB.command_line, words)
    return config


def test_flags_of_the_training_have_their_names() -> None:
    config = read(
        "pretrain_stage1", "--clips", "5000", "--gpus", "8", "--global-batch", "1024",
        "--steps", "30", "--model.embed-dim", "1024",
    )  # fmt: skip
    assert (config.clips, config.training.num_workers, config.train.global_batch) == (5000, 8, 1024)
    assert (config.train.steps, config.train.epochs) == (30, None)
    assert config.train.model.embed_dim == 1024


def test_settings_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(
        "recipe: finetune_msrvtt\nclips: 9000\ncaptions_per_clip: 20\nglobal_batch: 80\n"
        "price_cpu_hour: 0.04\n"
    )
    config = read("--config", str(file), "--cpus", "12")
    assert (config.train.recipe, config.train.global_batch) == ("finetune_msrvtt", 80)
    assert (config.clips, config.captions_per_clip, config.cpus) == (9000, 20, 12)
    assert config.price_cpu_hour == 0.04


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pretrain_stage1"], "required settings are missing: --clips"),
        (["pretrain_stage1", "--clips", "many"], "--clips: invalid literal for int"),
        (["pretrain_stage1", "--clips", "0"], "clips = 0: must be at least 1"),
        (["pretrain_stage1", "--clips", "9", "--gpus", "7"], "must divide the global batch of 512"),
        (["pretrain_stage1", "--clips", "9", "--gpu-type", "H10"], "invalid choice 'H10'"),
        (["pretrain", "--clips", "9"], "there is no recipe 'pretrain'"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        read(*words)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert expected in said
