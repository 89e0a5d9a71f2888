"""Configs from files: what a run left gives the same config; earlier forms; errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import compare, evaluate, ingest, manifest, sweep, train
from jobs.command_line import read_command_line
from jobs.config_file import ConfigFileError, read_config_file
from jobs.entry import Job
from pipelines.common.config import flatten, to_dict
from pipelines.common.output_folder import config_record
from pipelines.compare.config import CompareConfig
from pipelines.evaluate.config import EvaluateConfig
from pipelines.ingest.config import FilterConfig, IngestConfig
from pipelines.manifest.config import ManifestConfig
from pipelines.train import recipes
from pipelines.video.config import SamplingConfig


def written(folder: Path, values: dict[str, Any], name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(values) if name.endswith("json") else yaml.safe_dump(values))
    return path


def read(path: Path, job: Job) -> Any:
    return read_config_file(path, job.name, job.command_line)


CONFIGS = [
    (manifest.JOB, ManifestConfig(annotations=("a.csv", "b.csv"), videos="v", output="o.parquet")),
    (
        ingest.JOB,
        IngestConfig(
            manifest="m",
            output="o",
            sampling=SamplingConfig(size=64, decoder="auto"),
            filters=FilterConfig(min_duration_s=1.5),
            retry_quarantined=("missing",),
        ),
    ),
    (evaluate.JOB, EvaluateConfig(benchmark="msvd", data="d", checkpoint="c", output="o")),
    (compare.JOB, CompareConfig(runs=("a", "b"), output="o")),
    (
        sweep.JOB,
        replace(sweep.JOB.command_line.default, space=("optim.lr=uniform(1e-5,1e-4)",), trials=3),
    ),
    *((train.JOB, recipe(("d", "e"), "o", init_from="i")) for recipe in recipes.RECIPES.values()),
]


@pytest.mark.parametrize(("job", "config"), CONFIGS)
def test_the_file_that_a_job_leaves_gives_the_same_config(
    job: Job, config: Any, tmp_path: Path
) -> None:
    path = written(tmp_path, config_record(job.name, config, data_digest="facts"))
    assert read(path, job) == config
    assert read(written(tmp_path, config_record(job.name, config), "c.yaml"), job) == config
    again, _ = read_command_line(job.name, job.command_line, ["--config", str(path)])
    assert again == config


def test_earlier_forms_are_read(tmp_path: Path) -> None:
    config = recipes.finetune_msvd_tiny(("d",), "o", init_from="i")
    values = json.loads(json.dumps(to_dict(config)))
    del values["recipe"]
    earlier = written(tmp_path, {**values, "data_digest": "abc"})
    assert read(earlier, train.JOB) == replace(config, recipe="")
    evaluation = EvaluateConfig(data="d", checkpoint="c", output="o")
    earlier = written(tmp_path, {"identity": "abc", **json.loads(json.dumps(to_dict(evaluation)))})
    assert read(earlier, evaluate.JOB) == evaluation
    wanted = ManifestConfig(annotations=("a.csv",), videos=("v",), output="o")
    values = config_record("manifest", wanted)
    assert values["videos"] == ["v"]
    assert read(written(tmp_path, {**values, "videos": "v"}), manifest.JOB) == wanted
    assert ManifestConfig(annotations=("a.csv",), videos="v", output="o") == wanted  # type: ignore[arg-type]
    searched = sweep.JOB.command_line.default
    flat = flatten(json.loads(json.dumps(to_dict(searched))))
    assert read(written(tmp_path, flat), sweep.JOB) == searched
    for name in ("space", "search", "trials", "scheduler", "repeats", "refit", "round_steps"):
        del flat[name]
    values = {"lr": [3e-4, 1e-3], "similarity_threshold": [0.5, 0.95], "name": "mine"}
    found = read(written(tmp_path, {**flat, **values, "output": "there"}), sweep.JOB)
    space = (
        "optim.lr=grid(0.0003, 0.001)",
        "model.graph.similarity_threshold=grid(0.5, 0.95)",
    )
    train_config = replace(searched.train, output="there", name="mine")
    assert found == replace(searched, train=train_config, space=space)


def test_a_file_of_a_sweep_names_settings_of_the_training_as_flags_do(tmp_path: Path) -> None:
    values = {
        "recipe": "finetune_msvd_tiny",
        "data": ["clips"],
        "output": "out",
        "init_from": "model",
        "optim": {"weight_decay": 0.1},
        "space": ["optim.lr=loguniform(1e-5,1e-3)"],
        "trials": 5,
    }
    found = read(written(tmp_path, values, "mine.yaml"), sweep.JOB)
    assert (found.train.data, found.train.output, found.trials) == (("clips",), "out", 5)
    assert found.train.optim.weight_decay == 0.1
    assert found.train.global_batch == 32


def test_yaml_changes_a_recipe_and_flags_win(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {
            "recipe": "finetune_msrvtt",
            "data": ["clips"],
            "output": "run",
            "init_from": "model",
            "optim": {"lr": 1e-3},
            "augment.flip": False,
            "steps": 7,
        },
        "mine.yaml",
    )
    words = ["--config", str(path), "--optim.min-lr", "1e-7", "--output", "other"]
    config, _ = read_command_line("train", train.JOB.command_line, words)
    recipe = recipes.finetune_msrvtt(("clips",), "other", "model")
    assert config == replace(
        recipe,
        steps=7,
        epochs=None,
        optim=replace(recipe.optim, lr=1e-3, min_lr=1e-7),
        augment=replace(recipe.augment, flip=False),
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"optim": {"lrr": 1}}, r"there is no setting 'optim.lrr'; did you mean optim.lr"),
        ({"recipe": "finetune_msrvt"}, r"there is no recipe .*; did you mean finetune_msrvtt"),
        ({"steps": "many"}, r"steps: .*integer"),
        ({"precision": "fp64"}, r"precision: .*'fp32', 'bf16' or 'fp16'"),
        ({"global_batch": 1}, r"global_batch = 1: must be at least 2"),
        ({"job": "evaluate"}, r"is a config of the job evaluate"),
        ({"data": None}, r"data: "),
    ],
)
def test_what_cannot_be_used_is_named(
    values: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    complete = config_record("train", recipes.finetune_msrvtt_tiny(("d",), "o", "i"))
    with pytest.raises(ConfigFileError, match=expected) as raised:
        read(written(tmp_path, {**complete, **values}), train.JOB)
    assert "config.json" in str(raised.value)


def test_a_setting_that_is_needed_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, {"recipe": "pretrain_stage1_tiny", "data": ["d"]}, "c.yaml")
    with pytest.raises(ConfigFileError, match="output is not set"):
        read(path, train.JOB)


@pytest.mark.parametrize("text", ["steps: [1", "- a\n- b\n", "\udcff"])
def test_a_file_that_is_no_config_is_refused_in_one_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigFileError, match=r"broken\.yaml") as raised:
        read(path, train.JOB)
    assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(ConfigFileError, match=r"none\.yaml cannot be read"):
        read(tmp_path / "none.yaml", train.JOB)


def test_a_recipe_and_a_file_exclude_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, {"recipe": "finetune_msrvtt"}, "c.yaml")
    with pytest.raises(SystemExit):
        read_command_line(
            "train", train.JOB.command_line, ["finetune_msrvtt", "--config", str(path)]
        )
    assert "either a recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("recipe: [a]", "there is no recipe"),
        ("model: 3\nmodel.vision.image_size: 64", "model has a value of its own"),
    ],
)
def test_values_of_a_wrong_kind_are_the_mistake_of_the_file(
    tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(ConfigFileError, match=words):
        read(path, train.JOB)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"steps": ' + "9" * 5000 + "}"])
def test_json_that_python_cannot_read_is_the_mistake_of_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "my.json"
    path.write_text(text)
    with pytest.raises(ConfigFileError, match="is not valid JSON"):
        read(path, train.JOB)
