"""Command lines of all jobs: short help, full help, settings that replace others, near names."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace

import pytest

from jobs.__main__ import job_names
from jobs.command_line import read_command_line
from jobs.config_file import setting_names
from jobs.entry import Job
from jobs.settings import CommandLine
from jobs.short_help import is_flat, is_positional, short_help
from stgt.field_marks import Common, config_fields
from tests.helpers.data import PROJECT

JOBS: dict[str, Job] = {name: importlib.import_module(f"jobs.{name}").JOB for name in job_names()}
PAGES = [
    (name, recipe) for name, job in JOBS.items() for recipe in (None, *job.command_line.recipes)
]
TRAIN = JOBS["train"].command_line
REQUIRED = ["--data", "clips", "--output", "run", "--init-from", "model"]


@pytest.mark.parametrize("columns", [80, 100, 200])
@pytest.mark.parametrize(("name", "recipe"), PAGES)
def test_help_fits_a_screen(
    name: str, recipe: str | None, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = short_help(name, JOBS[name].command_line, recipe).splitlines()
    assert 8 <= len(lines) <= 60
    assert max(map(len, lines)) <= max(columns, 34)
    assert any("--help-all" in line for line in lines)


def test_help_shows_marked_settings_with_their_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    text = short_help("train", TRAIN, "finetune_msrvtt")
    marked = [
        field.name
        for field, _, marks in config_fields(TRAIN.config)
        if any(isinstance(mark, Common) and not mark.if_set for mark in marks)
        and field.name != "tracking"
    ]
    assert len(marked) > 10
    for name in [*marked, "optim.lr", "tracking.uri"]:
        flag = name.replace("_", "-")
        assert f"  --{flag} " in text or f"  --no-{flag} " in text, name
    assert "--block-clips" not in text
    assert "--questions" not in text  # of other recipes
    assert "(default: 160)" in text
    assert "--no-use-gpu" in text  # it is on, and can be turned off
    assert "(required)" in text


def test_help_of_steps_shows_that_epochs_replace_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    lines = short_help("train", TRAIN, "finetune_msrvtt").splitlines()
    (steps,) = [line for line in lines if line.strip().startswith("--steps")]
    assert "(default: none)" in steps


@pytest.mark.parametrize("name", JOBS)
def test_full_help_shows_every_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = JOBS[name].command_line
    # A setting of one kind of model is shown by the recipes that train it.
    text = ""
    for recipe in line.recipes or (None,):
        if recipe not in (None, *first_of_each_kind(line)):
            continue
        with pytest.raises(SystemExit) as left:
            read_command_line(name, line, [*([recipe] if recipe else []), "--help-all"])
        assert left.value.code == 0
        text += capsys.readouterr().out
    by_position = {field.name for field, _, _ in config_fields(line.config) if is_positional(field)}
    flat = {field.name for field, _, _ in config_fields(line.config) if is_flat(field)}
    for setting in set(setting_names(line.config)) - by_position:
        first, _, below = setting.partition(".")
        setting = below if first in flat else setting
        assert f"--{setting.replace('_', '-')}" in text, setting


def first_of_each_kind(line: CommandLine) -> list[str]:
    """A recipe for each kind of model that the recipes of a job train."""
    found: dict[str, str] = {}
    for name, recipe in line.recipes.items():
        train = getattr(recipe.config, "train", recipe.config)
        found.setdefault(train.model.kind, name)
    return list(found.values())


def test_every_job_has_a_target_and_a_line_in_the_list() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs"], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    for name, job in JOBS.items():
        assert job.name == name
        assert callable(job.load_target())
        assert f"  {name:<16}{job.summary}" in done.stdout


def test_steps_on_the_command_line_replace_the_epochs_of_a_recipe() -> None:
    config, _ = read_command_line("train", TRAIN, ["finetune_msrvtt", *REQUIRED, "--steps", "12"])
    assert (config.steps, config.epochs) == (12, None)
    assert config.steps_for(9000) == 12
    config, _ = read_command_line("train", TRAIN, ["finetune_msrvtt", *REQUIRED, "--steps=12"])
    assert (config.steps, config.epochs) == (12, None)
    config, _ = read_command_line("train", TRAIN, ["finetune_msrvtt", *REQUIRED, "--epochs", "2"])
    assert config.steps_for(1600) == 20


def test_steps_and_epochs_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    both = ["finetune_msrvtt", *REQUIRED, "--steps", "12", "--epochs", "2"]
    with pytest.raises(SystemExit) as left:
        read_command_line("train", TRAIN, both)
    assert left.value.code == 2
    assert "give either --steps or --epochs, not both" in capsys.readouterr().err
    both[-1] = "None"
    config, _ = read_command_line("train", TRAIN, both)
    assert (config.steps, config.epochs) == (12, None)


def test_a_validation_store_replaces_held_out_clips() -> None:
    store = ["--val-store", "val"]
    config, _ = read_command_line("train", TRAIN, ["finetune_msrvtt", *REQUIRED, *store])
    assert (config.val_store, config.hold_out) == ("val", 0)
    config, _ = read_command_line("train", TRAIN, ["finetune_msrvtt", *REQUIRED])
    assert config.hold_out == 500
    none = ["--val-store", "None"]
    config, _ = read_command_line("train", TRAIN, ["finetune_msrvtt", *REQUIRED, *none])
    assert (config.val_store, config.hold_out) == (None, 500)


def test_a_validation_store_beside_held_out_clips_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    both = ["finetune_msrvtt", *REQUIRED, "--val-store", "val", "--hold-out", "5"]
    with pytest.raises(SystemExit):
        read_command_line("train", TRAIN, both)
    said = capsys.readouterr()
    assert "hold_out = 5" in " ".join((said.out + said.err).split())


def test_shared_options_may_stand_anywhere() -> None:
    words = ["--verbose", "finetune_msrvtt", "--timeline", "t.json", *REQUIRED]
    config, options = read_command_line("train", TRAIN, words)
    assert (options.verbose, options.timeline, options.config) == (True, "t.json", None)
    assert config == replace(config, data=("clips",), recipe="finetune_msrvtt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "give a recipe or --config FILE"),
        (["finetune_msrvt"], "there is no recipe 'finetune_msrvt'"),
        (["finetune_msrvtt"], "required settings are missing: --data, --output, --init-from"),
        (["finetune_msrvtt", *REQUIRED, "--optim.lrr", "1"], "did you mean --optim.lr or"),
        (["finetune_msrvtt", *REQUIRED, "--steps", "x"], "--steps: invalid literal for int"),
        (["finetune_msrvtt", *REQUIRED, "--precision", "fp64"], "invalid choice 'fp64'"),
        (["finetune_msrvtt", *REQUIRED, "--global-batch", "1"], "global_batch = 1: must be"),
    ],
)
def test_an_error_is_one_sentence(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        read_command_line("train", TRAIN, words)
    assert left.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("error: ")
    assert expected in said.err
    assert "--help" in said.err or "recipe" in said.err


def test_an_error_in_settings_without_a_prefix_is_one_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--format=folder", "--videos=a", "--output=b", "--cut=shots", "--window-s=3"]
    with pytest.raises(SystemExit) as left:
        read_command_line("manifest", JOBS["manifest"].command_line, words)
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        "error: window_s = 3.0: has an effect only with --cut windows; see python -m jobs.manifest "
        "--help\n"
    )


def run_bash(command: str) -> subprocess.CompletedProcess[str]:
    line = command.replace("python", sys.executable)
    return subprocess.run(
        ["bash", "-c", line], cwd=PROJECT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "command",
    [
        "python -m jobs | true",
        "python -m jobs.train finetune_msrvtt --help | head -n 1",
        "python -m jobs.train finetune_msrvtt --help-all | head -n 1",
    ],
)
def test_output_that_nobody_reads_ends_quietly(command: str) -> None:
    assert run_bash(command).stderr == ""


@pytest.mark.slow
def test_wrong_settings_are_refused_without_ray_and_torch() -> None:
    code = (
        "import sys, runpy\n"
        "sys.argv = ['jobs.train', 'finetune_msrvtt_tiny', '--data', '/no/store', '--output',\n"
        "            '/tmp/never', '--init-from', '/no/model']\n"
        "try:\n"
        "    runpy.run_module('jobs.train', run_name='__main__')\n"
        "finally:\n"
        "    heavy = {'ray', 'torch', 'mlflow', 'timm'} & set(sys.modules)\n"
        "    print('loaded:', *sorted(heavy), file=sys.__stdout__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "error: clip store /no/store has no catalogue.json" in done.stderr
    assert done.stdout.strip() == "loaded:"
