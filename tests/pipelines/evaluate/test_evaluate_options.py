"""Evaluation of galleries with missing videos, of videos decoded on the fly, and bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from PIL import Image

from pipelines.artifacts import checkpoints
from pipelines.common import storage
from pipelines.common.config import TrackingConfig
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.reproduction import requirements
from pipelines.evaluate.run import run_evaluate
from stgt.errors import CheckpointError, ClipStoreError, STGTError
from tests.helpers.checkpoint import save_untrained
from tests.helpers.data import PROJECT, TinyData
from tests.helpers.faulty_s3 import FaultyS3

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def checkpoint(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_untrained(tiny_data, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    return TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")


@pytest.fixture(scope="module")
def with_a_miss(
    tiny_data: TinyData,
    checkpoint: str,
    tracking: TrackingConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[EvaluateConfig, dict[str, Any]]:
    """Forty clips of which one is in quarantine."""
    config = EvaluateConfig(
        data=tiny_data.train_store,
        manifest=tiny_data.train_manifest,
        checkpoint=checkpoint,
        output=str(tmp_path_factory.mktemp("miss") / "out"),
        k_rerank=5,
        resamples=100,
        num_workers=1,
        tracking=tracking,
    )
    return config, dict(run_evaluate(config))


def test_a_missing_video_is_a_miss_and_is_listed(
    with_a_miss: tuple[EvaluateConfig, dict[str, Any]],
) -> None:
    config, summary = with_a_miss
    assert (summary["clips"], summary["captions"], len(summary["missing"])) == (40, 40, 1)
    assert "1 count as misses" in summary["protocol"]["missing videos"]
    result = storage.read_json(storage.join(config.output, "metrics.json"))
    [gone] = result["missing"]
    assert gone["reason"]
    rows = pq.read_table(Path(config.output) / "ranks.parquet").to_pylist()
    assert len(rows) == 80
    of_it = [row for row in rows if row["clip_id"] == gone["clip_id"]]
    assert [row["sim_rank"] for row in of_it] == [41, 41]
    assert [row["rank"] for row in of_it] == [41, 41]
    found = [row["rank"] for row in rows if row["direction"] == "t2v"]
    assert summary["metrics"]["t2v/R10"] == pytest.approx(100 * np.mean(np.array(found) <= 10))
    page = (Path(config.output) / "report.html").read_text()
    assert "1 missing video counts as a miss" in page
    assert gone["clip_id"] in page


def test_leaving_missing_videos_out_is_said_wherever_the_number_is(
    with_a_miss: tuple[EvaluateConfig, dict[str, Any]], tmp_path: Path
) -> None:
    config, whole = with_a_miss
    embeddings = str(Path(config.output) / "embeddings")
    changed = replace(
        config, output=str(tmp_path / "partial"), allow_missing=True, embeddings=embeddings
    )
    summary = run_evaluate(changed)
    assert (summary["clips"], summary["captions"]) == (39, 39)
    assert all(name.startswith("partial/") for name in summary["metrics"])
    assert "PARTIAL" in summary["protocol"]["missing videos"]
    # The same searches among fewer videos.
    assert summary["metrics"]["partial/sim/t2v/R10"] >= whole["metrics"]["sim/t2v/R10"]
    run = MlflowClient(tracking_uri=config.tracking.uri).get_run(summary["run_id"])
    assert "partial/t2v/R1" in run.data.metrics
    assert "t2v/R1" not in run.data.metrics
    page = (tmp_path / "partial" / "report.html").read_text()
    assert "Partial metrics" in page
    assert page.count("partial R@1") == 2


@pytest.mark.slow
def test_all_of_it_on_s3_while_mlflow_is_away(
    with_a_miss: tuple[EvaluateConfig, dict[str, Any]],
    s3: FaultyS3,
    mlflow_away: TrackingConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, local = with_a_miss
    remote = storage.filesystem("s3://bucket")[0]
    for name in ("data", "checkpoint"):
        remote.put(getattr(config, name), f"bucket/evaluated/{name}", recursive=True)
    remote.put(config.manifest, "bucket/evaluated/manifest.parquet")
    there = replace(
        config,
        data="s3://bucket/evaluated/data",
        manifest="s3://bucket/evaluated/manifest.parquet",
        checkpoint="s3://bucket/evaluated/checkpoint",
        output="s3://bucket/evaluated/out",
        tracking=mlflow_away,
    )
    s3.fail(0.05)
    try:
        summary = run_evaluate(there)
    finally:
        s3.fail(0.0)
    assert summary["metrics"] == pytest.approx(local["metrics"], abs=1e-6)
    assert summary["run_id"] is None
    assert "results are kept in s3://bucket/evaluated/out" in caplog.text
    # Where MLflow is again, the same command enters them; nothing is computed again.
    made = remote.ls("bucket/evaluated/out/embeddings/videos", detail=True, refresh=True)
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    again = run_evaluate(replace(there, tracking=tracking))
    assert made == remote.ls("bucket/evaluated/out/embeddings/videos", detail=True, refresh=True)
    client = MlflowClient(tracking_uri=tracking.uri)
    run = client.get_run(again["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["t2v/R1"] == summary["metrics"]["t2v/R1"]
    kept = {artifact.path for artifact in client.list_artifacts(again["run_id"])}
    assert {"report.html", "metrics.json", "ranks.parquet", "retrieval.png"} <= kept


@pytest.mark.slow
def test_videos_of_a_manifest_are_decoded_on_the_fly(
    with_a_miss: tuple[EvaluateConfig, dict[str, Any]], tiny_data: TinyData, tmp_path: Path
) -> None:
    config, stored = with_a_miss
    changed = replace(
        config, data=tiny_data.train_manifest, manifest=None, output=str(tmp_path / "fly")
    )
    summary = run_evaluate(changed)
    assert (summary["clips"], len(summary["missing"])) == (40, 1)
    assert summary["missing"] == stored["missing"]
    first = pq.read_table(Path(config.output) / "embeddings" / "texts" / "00000.parquet")
    again = pq.read_table(tmp_path / "fly" / "embeddings" / "texts" / "00000.parquet")
    assert first.equals(again)
    assert (tmp_path / "fly" / "report.html").stat().st_size > 10_000


def test_the_report_is_shown_by_a_browser(
    with_a_miss: tuple[EvaluateConfig, dict[str, Any]], tmp_path: Path
) -> None:
    """Headless Chromium renders the number and the pictures, wide and narrow."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not here; install it to run this test")
    config, summary = with_a_miss
    page = (Path(config.output) / "report.html").resolve().as_uri()

    def run(*flags: str) -> str:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", *flags, page]
        shown = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path
        )
        return shown.stdout

    dom = run("--dump-dom")
    number = dom.partition('id="t2v-R1">')[2].partition("<")[0]
    assert float(number) == pytest.approx(summary["metrics"]["t2v/R1"], abs=0.051)
    for width in (1200, 390):
        run(f"--screenshot={width}.png", f"--window-size={width},6000", "--hide-scrollbars")
        with Image.open(tmp_path / f"{width}.png") as picture:
            assert picture.size == (width, 6000)
            pixels = np.asarray(picture.convert("RGB")).astype(int).reshape(-1, 3)
        # Text and lines are grey, bars blue and red; only frames of videos have this many colours.
        colours = np.unique(pixels // 8, axis=0)
        colourful = colours[(colours.max(axis=1) - colours.min(axis=1)) > 6]
        assert len(colourful) > 300


def test_wrong_galleries_are_refused_before_anything_is_encoded(
    with_a_miss: tuple[EvaluateConfig, dict[str, Any]], tiny_data: TinyData, tmp_path: Path
) -> None:
    config, _ = with_a_miss
    config = replace(config, output=str(tmp_path / "out"))
    with pytest.raises(ClipStoreError, match="1 clips of .* are in quarantine.*--manifest"):
        run_evaluate(replace(config, manifest=None))
    with pytest.raises(ClipStoreError, match="40 clips of .* have captions but no video"):
        run_evaluate(replace(config, data=tiny_data.val_store))
    with pytest.raises(ValueError, match="msvd: expected 670 videos, found 40"):
        run_evaluate(replace(config, benchmark="msvd"))
    with pytest.raises(ClipStoreError, match=r"sampling\.resize = squash.*--sampling\.resize crop"):
        run_evaluate(replace(config, resize="crop"))
    with pytest.raises(ClipStoreError, match="contains 12 frames per clip, but the model takes 13"):
        run_evaluate(replace(config, num_frames=13))
    with pytest.raises(ValueError, match="max_text_tokens = 1000: the model supports at most"):
        run_evaluate(replace(config, max_text_tokens=1000))
    assert not (tmp_path / "out").exists()


def test_a_gallery_without_a_single_video_is_an_error(
    with_a_miss: tuple[EvaluateConfig, dict[str, Any]], tiny_data: TinyData, tmp_path: Path
) -> None:
    config, _ = with_a_miss
    table = pq.read_table(tiny_data.train_manifest)
    gone = table.set_column(
        table.schema.get_field_index("video_uri"),
        "video_uri",
        [[str(tmp_path / f"{number}.mp4") for number in range(len(table))]],
    )
    pq.write_table(gone, tmp_path / "gone.parquet")
    changed = replace(
        config,
        data=str(tmp_path / "gone.parquet"),
        manifest=None,
        output=str(tmp_path / "out"),
        allow_missing=True,
        num_workers=None,
    )
    with pytest.raises(ClipStoreError, match=r"none of the 40 videos can be used \(40 missing\)"):
        run_evaluate(changed)
    assert not (tmp_path / "out" / "metrics.json").exists()
    for number in (0, 1):  # two of them are mended: the same command finds them
        shutil.copy(next(Path(tiny_data.videos).rglob("1000003.mp4")), tmp_path / f"{number}.mp4")
    assert len(run_evaluate(replace(changed, num_workers=1))["metrics"]) > 0
    result = storage.read_json(str(tmp_path / "out" / "metrics.json"))
    assert (result["clips"], len(result["missing"])) == (2, 38)


@pytest.mark.slow
def test_more_workers_than_the_cluster_has_are_refused(
    with_a_miss: tuple[EvaluateConfig, dict[str, Any]], tmp_path: Path
) -> None:
    config, _ = with_a_miss
    with pytest.raises(ValueError, match=r"evaluation needs 99 CPUs \(one per worker\)"):
        run_evaluate(replace(config, output=str(tmp_path / "out"), num_workers=99))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [None, 2, pytest.param(4, marks=pytest.mark.soak)])
def test_the_number_of_workers_does_not_change_the_metrics(
    with_a_miss: tuple[EvaluateConfig, dict[str, Any]], tmp_path: Path, workers: int | None
) -> None:
    """None is this process. Three parts of videos, one of captions: four workers have one each."""
    config, summary = with_a_miss
    assert config.num_workers == 1
    assert len(list(Path(config.output).glob("embeddings/*/0*.parquet"))) == 4
    changed = replace(config, output=str(tmp_path / "out"), num_workers=workers)
    assert run_evaluate(changed)["metrics"] == pytest.approx(summary["metrics"], abs=1e-6)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_one_sentence(
    with_a_miss: tuple[EvaluateConfig, dict[str, Any]], checkpoint: str, tmp_path: Path
) -> None:
    config, _ = with_a_miss
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    changed = replace(config, checkpoint=str(folder), output=str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="is damaged or truncated"):
        run_evaluate(changed)


def test_folders_of_something_else_are_refused(
    with_a_miss: tuple[EvaluateConfig, dict[str, Any]], checkpoint: str
) -> None:
    config, _ = with_a_miss
    with pytest.raises(ValueError, match="must be a folder other than output"):
        replace(config, embeddings=config.output)
    # A config that is no evaluation's is not overwritten.
    before = (Path(checkpoint) / "config.json").read_bytes()
    with pytest.raises(STGTError, match="holds other files"):
        run_evaluate(replace(config, output=checkpoint))
    assert (Path(checkpoint) / "config.json").read_bytes() == before


def test_another_vocabulary_than_the_checkpoints_is_refused(
    with_a_miss: tuple[EvaluateConfig, dict[str, Any]], checkpoint: str, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    words = (folder / "vocab.txt").read_text().splitlines()
    words[-1], words[-2] = words[-2], words[-1]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    with pytest.raises(CheckpointError, match="is not the vocabulary that the model was trained"):
        checkpoints.load(str(folder))
    changed = replace(with_a_miss[0], checkpoint=str(folder), output=str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="is not the vocabulary that the model was trained"):
        run_evaluate(changed)
    assert not (tmp_path / "out").exists()
    (folder / "vocab.txt").write_text("\n".join([*words, "more"]) + "\n")
    with pytest.raises(CheckpointError, match=r"vocab\.txt has \d+ entries, but the model has \d+"):
        checkpoints.load(str(folder))


def test_what_a_reproduction_needs_is_checked_before_it_starts(
    with_a_miss: tuple[EvaluateConfig, dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, _ = with_a_miss
    config = replace(config, output=str(tmp_path / "out"), against="published", benchmark="msrvtt")
    with caplog.at_level("INFO"), pytest.raises(STGTError, match="for reproducing the authors'"):
        run_evaluate(config)
    assert "expected 1,000 videos, found 40" in caplog.text
    assert "[missing] weights from a released file -> import the authors' file" in caplog.text
    assert "[ok] a complete checkpoint" in caplog.text
    assert "no table of the authors' own results could be found" in caplog.text
    assert not (tmp_path / "out").exists()
    met = {one.what: one.met for one in requirements(config)}
    assert not met["the vocabulary bert-base-uncased (30,522 entries)"]


def run_job(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.evaluate", *flags],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_the_job_says_its_protocol_and_refuses_in_one_sentence(
    tiny_data: TinyData, checkpoint: str, tracking: TrackingConfig, tmp_path: Path
) -> None:
    flags = [
        f"--store={tiny_data.val_store}",
        f"--checkpoint={checkpoint}",
        f"--output={tmp_path / 'out'}",
        f"--tracking.uri={tracking.uri}",
    ]
    unknown = run_job("msrvt", *flags)
    assert unknown.returncode == 2
    assert "msrvtt_full" in unknown.stderr
    wrong = run_job("msrvtt", *flags)
    assert wrong.returncode == 1
    assert (
        wrong.stderr.strip()
        .splitlines()[-1]
        .startswith("error: msrvtt: expected 1,000 videos, found 12 in ")
    )
    assert "Traceback" not in wrong.stderr
    right = run_job("any", *flags, "--k-rerank=3")
    assert right.returncode == 0, right.stderr
    summary = json.loads(right.stdout)
    assert summary["protocol"]["reranking"].startswith("the top 3 by cosine")
    assert "protocol: each caption against all videos" in right.stderr
    assert "t2v: R1 " in right.stderr
