"""Jobs as users call them: exit codes, one clear sentence, a sweep."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipelines.sweep import recipes
from pipelines.sweep.run import run_sweep
from stgt.errors import STGTError
from tests.helpers.data import PROJECT, TinyData

pytestmark = pytest.mark.slow


def job(
    name: str, *flags: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", *flags],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_own_videos_become_a_clip_store(
    tiny_data: TinyData, joining: dict[str, str], tmp_path: Path
) -> None:
    """The way the README shows for one's own videos."""
    made = job(
        "manifest",
        f"--annotations={Path(tiny_data.videos).parent / 'results_val.csv'}",
        f"--videos={tiny_data.videos}",
        f"--output={tmp_path / 'm.parquet'}",
    )
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["clips"] == 12
    stored = job(
        "ingest",
        f"--manifest={tmp_path / 'm.parquet'}",
        f"--output={tmp_path / 'clips'}",
        "--sampling.num-frames=8",
        "--sampling.size=64",
        environment=joining,
    )
    assert stored.returncode == 0, stored.stderr
    summary = json.loads(stored.stdout)
    assert (summary["clips"], summary["quarantined"]) == (12, 0)
    assert Path(summary["store"], "catalogue.json").exists()


def test_a_csv_with_missing_columns_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_text("x")
    (tmp_path / "a.csv").write_text("id,caption\n1,x\n")
    failed = job(
        "manifest",
        f"--annotations={tmp_path / 'a.csv'}",
        f"--videos={tmp_path / 'videos'}",
        f"--output={tmp_path / 'm.parquet'}",
    )
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith("error: ")
    assert "lacks the columns videoid, page_dir, name (found: id, caption)" in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "m.parquet").exists()


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    tiny_data: TinyData, joining: dict[str, str], small_disk: Callable[[str], Path]
) -> None:
    small = small_disk("256k")
    failed = job(
        "ingest", f"--manifest={tiny_data.train_manifest}", f"--output={small}",
        "--sampling.size=224", "--num-workers=1", environment=joining,
    )  # fmt: skip
    assert failed.returncode == 1
    assert "error: no space left on the disk" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not list(small.rglob("catalogue.json"))
    assert not list(small.rglob("*.tmp"))
    assert not list(small.rglob("shards/*.json"))


def test_a_sweep_runs_four_trials_under_one_parent(tiny_data: TinyData, tmp_path: Path) -> None:
    from dataclasses import replace

    config = recipes.sweep_tiny(
        tiny_data.train_store,
        tiny_data.val_store,
        tiny_data.vocab,
        f"sqlite:///{tmp_path}/mlflow.db",
        str(tmp_path / "sweep"),
    )
    train = replace(config.train, steps=4, global_batch=16, block_clips=8, checkpoint_every=2)
    summary = run_sweep(replace(config, train=train, grace_steps=2, max_concurrent_trials=2))
    assert summary["trials"] == 4
    assert set(summary["best_params"]) == {"lr", "similarity_threshold"}
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("sweep")
    assert experiment is not None
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop(summary["run_id"])
    assert parent.info.status == "FINISHED"
    assert len(runs) == 4
    searched = set()
    for run in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status in ("FINISHED", "KILLED")
        params = run.data.params
        searched.add((params["optim.lr"], params["model.graph.similarity_threshold"]))
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss/total")]
        assert sorted(set(steps)) == list(range(1, max(steps) + 1))
    assert searched == {(lr, th) for lr in ("0.0003", "0.001") for th in ("0.5", "0.95")}
    stopped = [run for run in runs.values() if run.info.status == "KILLED"]
    assert len(stopped) == summary["stopped_early"] >= 1
    assert summary["failed"] == 0
    with pytest.raises(STGTError, match="different settings .grace_steps."):
        run_sweep(replace(config, train=train, grace_steps=3))
